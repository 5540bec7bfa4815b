"""One 4 KiB write and its flush, again and again, beside one PUT of 4 KiB."""

from harness.bench import figure
from harness.loads import MIB, fio
from harness.report import Row, Target

AREA_BYTES = 64 * MIB


def run(bench):
    def load(server):
        job = dict(rw="randwrite", bs="4k", iodepth=1, size=AREA_BYTES, fsync=1)
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(8))

    memory = bench.memory_ceiling("write_flush", AREA_BYTES, lambda server: load(server).write_and_flush())
    raw = bench.raw("put", size_bytes=4096, concurrency=1)
    with bench.volume(AREA_BYTES) as volume, volume.serve() as server:
        written, cost = bench.measure(server, load)
    target = Target("raw", at_most=2.4)
    measured = written.write_and_flush()
    return [Row("4K write + flush, median", measured, memory, figure(raw, "p50"), target, cost)]
