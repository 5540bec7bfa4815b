"""Random 4 KiB overwrites of a full volume, with and without compaction: space, the writer's throughput, and reads afterwards.

Only the newest checkpoints are kept, so all else is to come back. What is stored is looked at once a second. The writer with compaction
is held against the one without; the sequential read of the aged volume, once everything was compacted, against parallel GETs of 1 MiB;
and what was copied against what that gave back, as `hypernbd compact` tells it.
"""

import threading
import time

from harness import verbs
from harness.bench import figure
from harness.loads import GIB, MIB, Sample, Series, fio
from harness.report import Row, Target

SECONDS = 300
DEPTH = 16
LOOK_S = 1.0
ROUNDS = {"retention_interval": "5s", "retention_grace": "5s"}
BOUND_BYTES = 256 * MIB


def run(bench):
    size, seconds = bench.size(2 * GIB), bench.seconds(SECONDS)
    bench.check_room(seconds, more_bytes=size)
    raw = figure(bench.raw("get", size_bytes=MIB, concurrency=16), "mb_per_s")

    def overwrite(server):
        job = dict(rw="randwrite", bs="4k", iodepth=DEPTH, size=size, end_fsync=1)
        return fio(server.uri, **job, time_based=1, runtime=seconds)

    def in_order(server):
        return fio(server.uri, rw="read", bs="1M", iodepth=16, size=size)

    with bench.filled_volume(size) as volume:
        keep_newest(bench, volume)
        with volume.serve(**ROUNDS) as server:
            without, _ = bench.measure(server, overwrite)
    with bench.filled_volume(size) as volume:
        keep_newest(bench, volume)
        with volume.serve(**ROUNDS, compaction="auto") as server, Looks(bench, volume) as looks:
            written, cost = bench.measure(server, overwrite)
        done = verbs.run(bench, "compact", volume.url, "--json").json()
        space = verbs.run(bench, "space", volume.url, "--json").json()
        with volume.serve() as server:
            read, read_cost = bench.measure(server, in_order)
    most = max(stored for _, stored in looks.seen) / (1.3 * size + BOUND_BYTES + space["history_bytes"])
    freed = done["object_bytes"] - done["copied_bytes"]
    series = [Series("stored", "MiB", [(at, stored / MIB) for at, stored in looks.seen])]
    rows = [
        Row("random writes beside compaction", written.mb_per_s(), raw=without.mb_per_s(), target=Target("raw", at_least=0.7), cost=cost),
        Row("most stored, of the bound", Sample(most, "x"), target=Target("value", at_most=1), series=series),
        Row("1M reads in order once compacted", read.mb_per_s(), raw=raw, target=Target("raw", at_least=0.85), cost=read_cost),
    ]
    if freed > 0:
        copied = Sample(done["copied_bytes"] / freed, "x")
        rows.append(Row("bytes copied for each that comes back", copied, target=Target("value", at_most=2.5)))
    return rows


class Looks:
    """What is stored of a volume, once a second, from a thread of its own."""

    def __init__(self, bench, volume):
        self._look = volume.stored_bytes
        self._over = threading.Event()
        self.seen = [(0.0, self._look())]
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        began = time.monotonic()
        while not self._over.wait(LOOK_S):
            self.seen.append((time.monotonic() - began, self._look()))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()


def keep_newest(bench, volume):
    """Has all but the newest checkpoints go."""
    verbs.run(bench, "retention", "set", volume.url, "--keep-last", "1")
