"""The longest any write waits while the load is one the line can carry: random 64 KiB writes at half its rate."""

from harness.loads import GIB, fio, fio_log, fio_series
from harness.report import Row, Target

OPEN_LINE_MB_PER_S = 200  # the load where the line has no limit
BOUND_MS = 50


def run(bench):
    size = bench.size(GIB)
    rate_mb_per_s = (bench.options.line_mb_per_s or OPEN_LINE_MB_PER_S) / 2
    directory = bench.scratch()

    def load(server, **log):
        job = dict(rw="randwrite", bs="64k", iodepth=16, size=size, rate=int(rate_mb_per_s * 1e6))
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(20), **log)

    memory = bench.memory_ceiling("paced_write", size, lambda server: load(server).mb_per_s())
    with bench.volume(size) as volume, volume.serve() as server:
        written, cost = bench.measure(server, lambda server: load(server, **fio_log(directory, "clat")))
    measured = written.mb_per_s()
    worst = Row(f"64K random writes at {rate_mb_per_s:g} MB/s, worst", measured.worst(), memory.worst())
    worst.target, worst.cost = Target("value", at_most=BOUND_MS), cost
    worst.series = [fio_series(directory, "clat", "slowest write")]
    return [worst, Row("the rate kept", measured, memory)]
