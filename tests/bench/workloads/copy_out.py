"""nbdcopy of a whole volume out of a fresh server process, beside parallel range GETs of nbdcopy's size."""

from harness.bench import figure
from harness.loads import GIB, fill, nbdcopy
from harness.report import Row


def run(bench):
    size = bench.size(GIB)

    def load(server):
        return nbdcopy(server.uri, "null:", size)

    def filled(server):
        fill(server.uri, size)
        return load(server)

    memory = bench.memory_ceiling("copy_out", size, filled)
    raw = bench.raw("get", size_bytes=256 * 1024, concurrency=64)
    with bench.volume(size) as volume:
        with volume.serve() as server:
            fill(server.uri, size)
        with volume.serve() as server:
            measured = load(server)
    return [Row("nbdcopy out, cold", measured, memory, figure(raw, "mb_per_s"))]
