"""Random reads and writes of 4 to 512 KiB, half of each, on a full volume served by a fresh process."""

from harness.bench import figure
from harness.loads import GIB, fio
from harness.report import Row


def run(bench):
    size = bench.size(GIB)

    def load(server):
        job = dict(rw="randrw", rwmixread=50, bsrange="4k-512k", iodepth=16, size=size, end_fsync=1)
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(12))

    memory = bench.memory_ceiling("mixed", size, lambda server: load(server).mb_per_s())
    raw = bench.raw("get", size_bytes=256 * 1024, concurrency=16)
    with bench.filled_volume(size) as volume, volume.serve() as server:
        mixed, cost = bench.measure(server, load)
    return [Row("4K-512K, half reads, depth 16", mixed.mb_per_s(), memory, figure(raw, "mb_per_s"), cost=cost)]
