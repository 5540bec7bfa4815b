"""Sequential write with one flush a second: with a log, beside the same without.

Without a log each flush waits for a checkpoint; with one it does, too, for data in bulk, which is not logged.
"""

import threading

from harness.loads import GIB, connect, fio
from harness.report import Row, Target

FLUSH_EVERY_S = 1


def run(bench):
    size = bench.size(GIB)

    def load(server):
        with flushing(server.uri):
            return fio(server.uri, rw="write", bs="1M", iodepth=16, size=size, end_fsync=1)

    def measured(**parameters):
        with bench.volume(size) as volume, volume.serve(**parameters) as server:
            return bench.measure(server, load)

    memory = bench.memory_ceiling("wal_seq_write", size, lambda server: load(server).mb_per_s())
    without, _ = measured()
    rows = []
    for kind, url in bench.wal_urls().items():
        written, cost = measured(backend_wal_url=url)
        target = Target("raw", at_least=0.85)
        measure = "1M writes, depth 16, beside no log"
        rows.append(Row(measure, written.mb_per_s(), memory, without.mb_per_s(), target, cost, variant=kind))
    return rows


class flushing:
    """A client that flushes once a second while the `with` block runs."""

    def __init__(self, uri: str):
        self._client = connect(uri)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._flush)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()
        self._client.shutdown()

    def _flush(self) -> None:
        while not self._ended.wait(FLUSH_EVERY_S):
            self._client.flush()
