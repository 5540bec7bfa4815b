"""Writes of 4 KiB, each with its flush, of 16 clients at once beside those of one, with a log.

How much a group saves in a journal hangs on the disk: where a sync takes 0.2 ms, as on many virtual ones, one client is
served so fast that two cores cannot carry ten times as many. So it is measured with slower syncs, too.
"""

from harness.loads import MIB, fio
from harness.report import Row, Target

AREA_BYTES = 64 * MIB
CLIENTS = 16


def run(bench):
    def load(server, clients):
        job = dict(rw="randwrite", bs="4k", iodepth=1, size=AREA_BYTES, fsync=1, numjobs=clients)
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(8))

    def ceiling(server):
        return load(server, CLIENTS).iops()

    memory = bench.memory_ceiling("wal_group", AREA_BYTES, ceiling)
    rows = []
    for kind, url, env in bench.flush_cases():
        with bench.volume(AREA_BYTES) as volume, volume.serve(more_env=env, backend_wal_url=url) as server:
            one = load(server, 1)
            many, cost = bench.measure(server, lambda server: load(server, CLIENTS))
        target = Target("raw", at_least=10)
        measure = f"flushes a second, {CLIENTS} clients beside one"
        rows.append(Row(measure, many.iops(), memory, one.iops(), target, cost, variant=kind))
    return rows
