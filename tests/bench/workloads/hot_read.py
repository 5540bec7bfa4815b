"""Random 4 KiB reads of what the server has read before: the second pass over a set that fits the read cache."""

from harness.loads import MIB, fill, fio
from harness.report import Row, Target

CACHE = "256M"
SET_BYTES = 128 * MIB


def run(bench):
    size = bench.size(SET_BYTES)

    def warm(server):
        fio(server.uri, rw="randread", bs="64k", iodepth=16, size=size)  # each place once

    def load(server):
        job = dict(rw="randread", bs="4k", iodepth=16, size=size)
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(8))

    def filled(server):
        fill(server.uri, size)
        return load(server).iops()

    memory = bench.memory_ceiling("hot_read", size, filled)
    with bench.filled_volume(size) as volume:
        with volume.serve(**bench.parameters_if_known(cache_memory=CACHE)) as server:
            warm(server)
            read, cost = bench.measure(server, load)
    target = Target("memory", at_least=0.7)
    return [Row("4K random reads, depth 16, second pass", read.iops(), memory, target=target, cost=cost)]
