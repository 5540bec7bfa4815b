"""Random 4 KiB reads by a fresh server process, beside range GETs of the same size."""

from harness.bench import figure
from harness.loads import GIB, fill, fio
from harness.report import Row, Target


def run(bench):
    size = bench.size(GIB)

    def load(server):
        job = dict(rw="randread", bs="4k", iodepth=16, size=size)
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(8))

    def filled(server):
        fill(server.uri, size)
        return load(server).iops()

    memory = bench.memory_ceiling("cold_read", size, filled)
    raw = bench.raw("get", size_bytes=4096, concurrency=16)
    with bench.filled_volume(size) as volume, volume.serve() as server:
        read, cost = bench.measure(server, load)
    target = Target("raw", at_least=0.85)
    return [Row("4K random reads, depth 16", read.iops(), memory, figure(raw, "iops"), target, cost)]
