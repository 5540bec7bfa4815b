"""Random 4 KiB reads by a fresh server of blocks that are spread over a large volume, beside range GETs of the same size.

The index of such a volume is large beside its data: 1.6 million blocks in 1 TiB. The reads begin some seconds after the
open, when the index can be in memory; each then costs what its data costs. fio draws the same places for the writes and the
reads, from one seed, so all that is read was written.
"""

import time

from harness.bench import figure
from harness.loads import GIB, fio
from harness.report import Row, Target

SPREAD_BYTES = 1024 * GIB
BLOCKS = 1_600_000
BLOCK = 4096
AFTER_OPEN_S = 3
SEED = 1600


def run(bench):
    blocks = bench.count(BLOCKS)
    bench.check_room(0, more_bytes=2 * blocks * BLOCK)
    places = dict(bs=BLOCK, iodepth=16, size=SPREAD_BYTES, randseed=SEED, norandommap=1)

    def load(server):
        return fio(server.uri, rw="randread", **places, time_based=1, runtime=bench.seconds(8))

    raw = bench.raw("get", size_bytes=BLOCK, concurrency=16)
    with bench.volume(SPREAD_BYTES) as volume:
        with volume.serve() as server:
            fio(server.uri, rw="randwrite", **places, io_size=blocks * BLOCK, end_fsync=1)
        with volume.serve() as server:
            fio(server.uri, rw="read", bs=BLOCK, size=BLOCK)
            time.sleep(bench.seconds(AFTER_OPEN_S))
            read, cost = bench.measure(server, load)
    target = Target("raw", at_least=0.9)
    return [Row("4K random reads, depth 16", read.iops(), raw=figure(raw, "iops"), target=target, cost=cost)]
