"""Reads of a volume that has aged: written in sequence, then at random places for ten seconds; by a fresh server process.

What lies side by side in such a volume lies in many objects of the store. The ceilings are those of a fresh one: parallel
GETs of 1 MiB, which nobody who needs small stretches of many objects can reach.
"""

from harness.bench import figure
from harness.loads import GIB, MIB, fio
from harness.report import Row, Target

AGING_S = 10
SMALLEST, LARGEST = "4k", "512k"


def run(bench):
    size = bench.size(2 * GIB)
    seconds = bench.seconds(10)
    bench.check_room(bench.seconds(AGING_S), more_bytes=size)

    def age(server):
        job = dict(rw="randwrite", bs="4k", iodepth=16, size=size, end_fsync=1)
        fio(server.uri, **job, time_based=1, runtime=bench.seconds(AGING_S))

    def in_order(server):
        return fio(server.uri, rw="read", bs="1M", iodepth=16, size=size, time_based=1, runtime=seconds)

    def mixed(server):
        job = dict(rw="randrw", rwmixread=50, bsrange=f"{SMALLEST}-{LARGEST}", iodepth=16, size=size)
        return fio(server.uri, **job, time_based=1, runtime=seconds)

    raw = figure(bench.raw("get", size_bytes=MIB, concurrency=16), "mb_per_s")
    with bench.filled_volume(size) as volume:
        with volume.serve() as server:
            age(server)
        with volume.serve() as server:
            read, read_cost = bench.measure(server, in_order)
        with volume.serve() as server:
            both, both_cost = bench.measure(server, mixed)
    return [
        Row("1M reads in order, depth 16", read.mb_per_s(), raw=raw, target=Target("raw", at_least=0.5), cost=read_cost),
        Row("slowest of them", read.mb_per_s().worst()),
        Row(f"{SMALLEST} to {LARGEST} at random, half reads, depth 16", both.mb_per_s(), raw=raw, cost=both_cost),
        Row("slowest of them", both.mb_per_s().worst(), variant="mixed"),
    ]
