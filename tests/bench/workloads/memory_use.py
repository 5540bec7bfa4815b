"""Largest resident size of nbdkit under random 4 KiB writes that keep the write buffer full."""

import shutil
import threading

from harness.loads import GIB, MIB, LoadFailed, Sample, fio
from harness.report import Row, Target

WRITE_BUFFER_BYTES = 512 * MIB
ALLOWED_MIB = (WRITE_BUFFER_BYTES + 128 * MIB) // MIB
LONG_S = 600


def run(bench):
    seconds = LONG_S if bench.options.long else bench.seconds(32)
    check_room(bench, seconds)
    size = 2 * GIB
    sizes: list[int] = []
    done = threading.Event()
    with bench.volume(size) as volume, volume.serve(write_buffer=WRITE_BUFFER_BYTES) as server:

        def watch():
            while not done.wait(0.25):
                sizes.append(server.rss_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            fio(server.uri, rw="randwrite", bs="4k", iodepth=16, size=size, time_based=1, runtime=seconds)
        finally:
            done.set()
            watcher.join()
        peak = server.peak_rss_bytes()
    half = len(sizes) // 2
    growth = max(sizes[half:]) - max(sizes[:half])
    return [
        Row(f"peak resident size in {seconds:g} s", mib(peak), target=Target("value", at_most=ALLOWED_MIB)),
        Row("peak of the second half above the first's", mib(growth)),
    ]


def mib(value_bytes: int) -> Sample:
    """A size as a figure."""
    return Sample(value_bytes / MIB, "MiB")


def check_room(bench, seconds: float) -> None:
    """The store keeps every checkpoint: refuses a run that could fill the disk."""
    rate = bench.options.line_mb_per_s * 1_000_000
    free = shutil.disk_usage(bench.directory).free
    if bench.options.long and (not rate or rate * seconds > free * 0.9):
        affordable = int(free * 0.9 / seconds / 1e6)
        raise LoadFailed(
            f"{seconds:g} s at the rate of the line could fill the disk of {bench.directory}: "
            f"use --line {affordable} or less, or set TMPDIR to a larger one"
        )
