"""Random 4 KiB reads of data that is written but not yet published."""

from harness.loads import MIB, LoadFailed, connect, fio
from harness.report import Row, Target

AREA_BYTES = 128 * MIB
SERVER = dict(write_buffer="2G", checkpoint_interval="1h")  # far from where a checkpoint would start


def run(bench):
    def load(server):
        # A server without clients publishes what it holds: one stays connected from the writing to the reading.
        client = connect(server.uri)
        fio(server.uri, rw="write", bs="64k", iodepth=16, size=AREA_BYTES)
        job = dict(rw="randread", bs="4k", iodepth=16, size=AREA_BYTES)
        measured = fio(server.uri, **job, time_based=1, runtime=bench.seconds(8))
        client.shutdown()
        return measured

    memory = bench.memory_ceiling("unpublished_read", AREA_BYTES, lambda server: load(server).iops())
    with bench.volume(AREA_BYTES) as volume, volume.serve(**SERVER) as server:
        read, cost = bench.measure(server, load)
    if cost.published():
        raise LoadFailed("a checkpoint was published meanwhile: this is not what the workload measures")
    target = Target("memory", at_least=0.5)
    return [Row("4K random reads, depth 16", read.iops(), memory, target=target, cost=cost)]
