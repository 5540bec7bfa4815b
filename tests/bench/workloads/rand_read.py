"""Random 4 KiB reads by a fresh server process, beside range GETs of the same size."""

from harness.bench import figure
from harness.loads import GIB, fill, fio
from harness.report import Row


def run(bench):
    size = bench.size(GIB)

    def load(server):
        job = dict(rw="randread", bs="4k", iodepth=16, size=size)
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(8)).iops()

    def filled(server):
        fill(server.uri, size)
        return load(server)

    memory = bench.memory_ceiling("rand_read", size, filled)
    raw = bench.raw("get", size_bytes=4096, concurrency=16)
    with bench.volume(size) as volume:
        with volume.serve() as server:
            fill(server.uri, size)
        with volume.serve() as server:
            measured = load(server)
    return [Row("cold 4K random reads, depth 16", measured, memory, figure(raw, "iops"))]
