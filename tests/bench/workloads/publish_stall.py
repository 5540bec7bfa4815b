"""The longest a write or a read of unpublished data waits while a checkpoint is being published.

One connection writes an area and flushes it; until the flush is answered, another writes and reads 4 KiB of that
area in turn, one request at a time. All of it stays below the write buffer.
"""

import gc
import random
import time

from harness.loads import MIB, Sample, connect
from harness.report import Row, Target

AREA_BYTES = 128 * MIB
REQUEST_BYTES = 4096
LEAST_REQUESTS = 200  # goes on after the flush for as long, so that a fast store is measured too
ROUNDS = 3


def run(bench):
    memory = bench.memory_ceiling("publish_stall", AREA_BYTES, load)
    with bench.volume(AREA_BYTES) as volume, volume.serve(checkpoint_interval="1h") as server:
        measured = load(server)
    target = Target("value", at_most=50)
    return [
        Row(f"4K {kind}s meanwhile, worst", measured[kind], memory[kind], target=target)
        for kind in ("write", "read")
    ]


def load(server) -> dict[str, Sample]:
    """Latencies of the second connection's writes and reads, over all rounds."""
    publisher, client = connect(server.uri), connect(server.uri)
    taken_ms = {"write": [], "read": []}
    gc.disable()  # a collection would count as a stall
    try:
        for seed in range(ROUNDS):
            one_round(publisher, client, random.Random(seed), taken_ms)
    finally:
        gc.enable()
        publisher.shutdown()
        client.shutdown()
    return {kind: summary(values) for kind, values in taken_ms.items()}


def one_round(publisher, client, randomness, taken_ms) -> None:
    """Fills the area, flushes it, and measures until the flush is answered."""
    data = randomness.randbytes(MIB)
    for offset in range(0, AREA_BYTES, MIB):
        publisher.pwrite(data, offset)
    flush = publisher.aio_flush()
    flushed, requests = False, 0
    while not flushed or requests < LEAST_REQUESTS:
        offset = randomness.randrange(AREA_BYTES // REQUEST_BYTES) * REQUEST_BYTES
        start = time.perf_counter()
        client.pwrite(data[:REQUEST_BYTES], offset)
        written = time.perf_counter()
        client.pread(REQUEST_BYTES, offset)
        taken_ms["write"].append((written - start) * 1e3)
        taken_ms["read"].append((time.perf_counter() - written) * 1e3)
        requests += 1
        if not flushed:
            publisher.poll(0)
            flushed = publisher.aio_command_completed(flush)


def summary(values_ms: list[float]) -> Sample:
    """The worst as the figure."""
    ordered = sorted(values_ms)
    p50, p99 = (ordered[int((len(ordered) - 1) * share)] for share in (0.5, 0.99))
    return Sample(ordered[-1], "ms", p50, p99, ordered[-1])
