"""Random 4 KiB writes that stay in the write buffer: no checkpoint runs meanwhile."""

from harness.loads import MIB, LoadFailed, fio
from harness.report import Row, Target

AREA_BYTES = 128 * MIB
SERVER = dict(write_buffer="2G", checkpoint_interval="1h")  # far from where a checkpoint would start


def run(bench):
    def load(server):
        job = dict(rw="randwrite", bs="4k", iodepth=16, size=AREA_BYTES)
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(8))

    memory = bench.memory_ceiling("buffered_write", AREA_BYTES, lambda server: load(server).iops())
    with bench.volume(AREA_BYTES) as volume, volume.serve(**SERVER) as server:
        written, cost = bench.measure(server, load)
    if cost.published():
        raise LoadFailed("a checkpoint was published meanwhile: this is not what the workload measures")
    target = Target("memory", at_least=0.5)
    return [Row("4K random writes, depth 16", written.iops(), memory, target=target, cost=cost)]
