"""Sequential read by a fresh server process, beside parallel range GETs of the same size."""

from harness.bench import figure
from harness.loads import GIB, MIB, fill, fio
from harness.report import Row


def run(bench):
    size = bench.size(GIB)

    def load(server):
        return fio(server.uri, rw="read", bs="1M", iodepth=16, size=size).mb_per_s()

    def filled(server):
        fill(server.uri, size)
        return load(server)

    memory = bench.memory_ceiling("seq_read", size, filled)
    raw = bench.raw("get", size_bytes=MIB, concurrency=16)
    with bench.volume(size) as volume:
        with volume.serve() as server:
            fill(server.uri, size)
        with volume.serve() as server:
            measured = load(server)
    return [Row("cold 1M reads, depth 16", measured, memory, figure(raw, "mb_per_s"))]
