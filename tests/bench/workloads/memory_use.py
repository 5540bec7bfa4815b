"""Largest resident size of nbdkit under random 4 KiB writes that keep the write buffer full."""

import threading
import time
from contextlib import contextmanager

from harness.loads import GIB, MIB, Sample, Series, fio
from harness.report import Row, Target

WRITE_BUFFER_BYTES = 512 * MIB
INDEX_MEMORY_BYTES = 64 * MIB
ALLOWED_MIB = (WRITE_BUFFER_BYTES + INDEX_MEMORY_BYTES + 128 * MIB) // MIB
LONG_S = 600
INTERVAL_S = 0.25


def run(bench):
    seconds = LONG_S if bench.options.long else bench.seconds(32)
    if bench.options.long:
        bench.check_room(seconds)
    size = 2 * GIB

    def load(server):
        job = dict(rw="randwrite", bs="4k", iodepth=16, size=size)
        return fio(server.uri, **job, time_based=1, runtime=seconds)

    with bench.volume(size) as volume, volume.serve(**parameters(bench)) as server:
        with watched(server) as sizes:
            _, cost = bench.measure(server, load)
    half = len(sizes) // 2
    growth = max(size for _, size in sizes[half:]) - max(size for _, size in sizes[:half])
    target = Target("value", at_most=ALLOWED_MIB)
    resident = Series("resident", "MiB", [(at_s, size_bytes / MIB) for at_s, size_bytes in sizes])
    peak = mib(cost.peak_rss_bytes)
    return [
        Row(f"peak resident size in {seconds:g} s", peak, target=target, cost=cost, series=[resident]),
        Row("peak of the second half above the first's", mib(growth)),
    ]


def parameters(bench) -> dict:
    """What the server may take, as far as the plugin knows of it."""
    limits = dict(write_buffer=WRITE_BUFFER_BYTES, cache_memory=0)
    return limits | bench.parameters_if_known(index_memory=INDEX_MEMORY_BYTES)


@contextmanager
def watched(server):
    """Notes the resident size of a server four times a second: (seconds since the start, bytes)."""
    sizes: list[tuple[float, int]] = []
    done = threading.Event()
    start = time.monotonic()

    def watch():
        while not done.wait(INTERVAL_S):
            sizes.append((time.monotonic() - start, server.rss_bytes()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sizes
    finally:
        done.set()
        watcher.join()


def mib(value_bytes: int) -> Sample:
    """A size as a figure."""
    return Sample(value_bytes / MIB, "MiB")
