"""Random 4 KiB reads of what the server has read before: the second pass over a set that fits the read cache.

Where the plugin has a cache on disk, the second row is the first pass of a fresh server that finds it filled.
"""

from harness.loads import MIB, fill, fio
from harness.report import Row, Target

MEMORY = "256M"
DISK = "1G"
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
    rows = []
    with bench.filled_volume(size) as volume:
        with volume.serve(**bench.parameters_if_known(cache_memory=MEMORY)) as server:
            warm(server)
            read, cost = bench.measure(server, load)
        target = Target("memory", at_least=0.7)
        rows.append(Row("4K random reads, depth 16, second pass", read.iops(), memory, target=target, cost=cost))
        disk = bench.parameters_if_known(cache_dir=bench.scratch(), cache_disk=DISK)
        if len(disk) == 2:
            with volume.serve(**disk) as server:
                warm(server)
            with volume.serve(**disk) as server:
                read, cost = bench.measure(server, load)
            rows.append(Row("4K random reads, depth 16, first pass after a restart", read.iops(), memory, cost=cost))
    return rows
