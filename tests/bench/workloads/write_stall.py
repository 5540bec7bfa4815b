"""The longest a write or a read of unpublished data waits while a checkpoint is being published.

One connection writes an area and flushes it; until the flush is answered, another writes and reads 4 KiB of that
area in turn, one request at a time. All of it stays below the write buffer.
"""

import gc
import random
import time

from harness.loads import MIB, Sample, Series, connect, of_latencies
from harness.report import Row, Target

AREA_BYTES = 128 * MIB
REQUEST_BYTES = 4096
LEAST_REQUESTS = 200  # goes on after the flush for as long, so that a fast store is measured too
ROUNDS = 3
BOUND_MS = 50


def run(bench):
    rounds = bench.count(ROUNDS)

    def load(server):
        return probe(server, rounds)

    memory = bench.memory_ceiling("write_stall", AREA_BYTES, load)
    with bench.volume(AREA_BYTES) as volume, volume.serve(checkpoint_interval="1h") as server:
        measured, cost = bench.measure(server, load, user_bytes=rounds * AREA_BYTES)
    target = Target("value", at_most=BOUND_MS)
    rows = []
    for kind, pairs in measured.items():
        worst = summary(pairs)
        row = Row(f"4K {kind}s meanwhile, worst", worst, summary(memory[kind]), target=target, cost=cost)
        row.series = [Series(kind, "ms", pairs)]
        rows.append(row)
    return rows


def probe(server, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Latencies of the second connection's writes and reads over all rounds: (seconds since the start, ms)."""
    publisher, client = connect(server.uri), connect(server.uri)
    taken: dict[str, list] = {"write": [], "read": []}
    gc.disable()  # a collection would count as a stall
    try:
        start = time.perf_counter()
        for seed in range(rounds):
            one_round(publisher, client, random.Random(seed), taken, start)
    finally:
        gc.enable()
        publisher.shutdown()
        client.shutdown()
    return taken


def one_round(publisher, client, randomness, taken, begin) -> None:
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
        done = time.perf_counter()
        taken["write"].append((start - begin, (written - start) * 1e3))
        taken["read"].append((written - begin, (done - written) * 1e3))
        requests += 1
        if not flushed:
            publisher.poll(0)
            flushed = publisher.aio_command_completed(flush)


def summary(pairs: list[tuple[float, float]]) -> Sample:
    """The worst as the figure."""
    return of_latencies([taken_ms for _, taken_ms in pairs]).worst()
