"""A large volume with scattered blocks is trimmed as a whole, as mkfs and blkdiscard do, and flushed; another client writes and
flushes meanwhile.

What a trim costs should go by what is there to remove, not by the size of the volume, and should keep nobody waiting.
"""

import threading
import time

import nbd
from harness.loads import GIB, Sample, fio, of_latencies
from harness.report import Row, Target

SIZE_BYTES = 10 * 1024 * GIB
BLOCKS = 1_000_000
BLOCK = 4096
TRIM_BYTES = 2 * GIB  # of one request; NBD allows 4 GiB less one
SEED = 1700


def run(bench):
    blocks = bench.count(BLOCKS)
    bench.check_room(0, more_bytes=3 * blocks * BLOCK)
    places = dict(bs=BLOCK, iodepth=16, size=SIZE_BYTES, randseed=SEED, norandommap=1)
    with bench.volume(SIZE_BYTES) as volume:
        with volume.serve() as server:
            fio(server.uri, rw="randwrite", **places, io_size=blocks * BLOCK, end_fsync=1)
        with volume.serve() as server:
            trimmed_s, flushed_s, meanwhile = discard(server.uri)
    round_trip_ms = bench.round_trip_ms()
    limit = Target("value", at_most=5 * round_trip_ms) if round_trip_ms else None
    return [
        Row("the trims", Sample(trimmed_s, "s")),
        Row("the flush after them", Sample(flushed_s, "s"), target=Target("value", at_most=2)),
        Row("slowest other write and flush meanwhile", of_latencies(meanwhile).worst(), target=limit),
    ]


def discard(uri: str) -> tuple[float, float, list[float]]:
    """Trims all of a volume and flushes: how long each took, and every flush of another client meanwhile, in ms."""
    done = threading.Event()
    meanwhile: list[float] = []

    def others():
        client = connected(uri)
        while not done.is_set():
            began = time.monotonic()
            client.pwrite(b"x" * BLOCK, SIZE_BYTES - BLOCK)
            client.flush()
            meanwhile.append((time.monotonic() - began) * 1000)
        client.shutdown()

    client = connected(uri)
    other = threading.Thread(target=others)
    other.start()
    try:
        began = time.monotonic()
        # The other client's block stays.
        for at in range(0, SIZE_BYTES - TRIM_BYTES, TRIM_BYTES):
            client.trim(TRIM_BYTES, at)
        trimmed = time.monotonic()
        client.flush()
        flushed = time.monotonic()
    finally:
        done.set()
        other.join()
    client.shutdown()
    return trimmed - began, flushed - trimmed, meanwhile


def connected(uri: str) -> nbd.NBD:
    """A client of the server at this address."""
    client = nbd.NBD()
    client.connect_uri(uri)
    return client
