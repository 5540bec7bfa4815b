"""The longest any write waits while the load is one the line can carry: random 64 KiB writes at half its rate."""

from harness.loads import GIB, fio
from harness.report import Row

OPEN_LINE_MB_PER_S = 200  # the load where the line has no limit


def run(bench):
    size = bench.size(GIB)
    rate_mb_per_s = (bench.options.line_mb_per_s or OPEN_LINE_MB_PER_S) / 2

    def load(server):
        job = dict(rw="randwrite", bs="64k", iodepth=16, size=size, rate=int(rate_mb_per_s * 1e6))
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(20)).mb_per_s()

    memory = bench.memory_ceiling("worst_stall", size, load)
    with bench.volume(size) as volume, volume.serve() as server:
        measured = load(server)
    return [
        Row(f"64K random writes at {rate_mb_per_s:g} MB/s, worst", measured.worst(), memory.worst()),
        Row("the rate kept", measured, memory),
    ]
