"""What `write_buffer_dir` costs, and how long a killed server's successor takes to serve: each beside the same without."""

import contextlib
import tempfile
import time
from pathlib import Path

from harness.loads import GIB, MIB, Sample, connect, fill, fio
from harness.report import Row, Target

TMPFS = Path("/dev/shm")
AREA_BYTES = 128 * MIB
LEFT_BYTES = 400 * MIB
# Far from where a checkpoint would start, also by what the file holds.
BUFFERED = dict(write_buffer="4G", checkpoint_interval="1h")


def run(bench):
    size = bench.size(GIB)

    def buffered(server):
        job = dict(rw="randwrite", bs="4k", iodepth=16, size=AREA_BYTES)
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(4)).iops()

    def sequential(server):
        return fill(server.uri, size).mb_per_s()

    def flushed(server):
        job = dict(rw="randwrite", bs="4k", iodepth=1, size=AREA_BYTES, fsync=1)
        return fio(server.uri, **job, time_based=1, runtime=bench.seconds(8)).write_and_flush()

    loads = [
        ("4K random writes, depth 16, beside no file", buffered, BUFFERED),
        ("1M writes, depth 16, last flush, beside no file", sequential, {}),
        ("4K write + flush, median, beside no file", flushed, {}),
    ]
    rows = []
    for measure, load, parameters in loads:
        with bench.volume(max(size, AREA_BYTES)) as volume, volume.serve(**parameters) as server:
            without = load(server)
        for kind, directory, bound in places(bench):
            with directory as path, bench.volume(max(size, AREA_BYTES)) as volume:
                with volume.serve(write_buffer_dir=path, **parameters) as server:
                    sample, cost = bench.measure(server, load, user_bytes=0)
            slower = without.unit == "ms"
            target = Target("raw", at_most=1 / bound) if slower else Target("raw", at_least=bound)
            rows.append(Row(measure, sample, raw=without, target=target, cost=cost, variant=kind))
    return [*rows, recovery(bench)]


def places(bench):
    """Where the file can be: name, directory, and what of the speed must be left there."""
    places = [("disk", contextlib.nullcontext(bench.scratch() / "buffer"), 0.9)]
    if TMPFS.is_dir():
        places.insert(0, ("tmpfs", tempfile.TemporaryDirectory(dir=TMPFS), 0.97))
    return places


def recovery(bench):
    """A server is killed with unpublished data; its successor serves its first read after this time."""
    left = bench.size(LEFT_BYTES)
    # A stream is published from an eighth of the buffer on.
    parameters = dict(write_buffer="4G", checkpoint_interval="1h")
    with tempfile.TemporaryDirectory(dir=TMPFS if TMPFS.is_dir() else None) as path:
        with bench.volume(GIB) as volume:
            with volume.serve(write_buffer_dir=path, **parameters) as server:
                client = connect(server.uri)
                for at in range(0, left, MIB):
                    client.pwrite(bytes([1]) * MIB, at)
                server.popen.kill()
                server.popen.wait()
            started = time.monotonic()
            with volume.serve(write_buffer_dir=path, **parameters) as server:
                client = connect(server.uri)
                assert client.pread(1, 0) == bytes([1])
                took = time.monotonic() - started
                client.shutdown()
    measure = f"{left // MIB} MiB unpublished at the kill: the start to the first read"
    return Row(measure, Sample(took, "s"), target=Target("value", at_most=3))
