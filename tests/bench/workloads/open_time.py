"""Opening volumes of 1 GiB, 100 GiB and 10 TiB with a little data spread over them, and the first cold requests.

The time runs from the start of nbdkit to the answer of the first read, in round trips to the store; the same start of
nbdkit's memory plugin stands beside it. Then one client reads places it has not read before, one at a time, and asks
for the block status of stretches of 4 GiB. Each round is a fresh server process.
"""

import random
import statistics
import time
from dataclasses import dataclass, field

from harness.bench import figure
from harness.cost import Cost
from harness.loads import GIB, MIB, Sample, connect, nbd, of_latencies
from harness.report import Row

SIZES = {"1 GiB": GIB, "100 GiB": 100 * GIB, "10 TiB": 10240 * GIB}
BOUND = {"10 TiB": 10}  # round trips
PIECES = 1024
PIECE_BYTES = 64 * 1024
ROUNDS = 5
READ_BYTES = 4096
READS = 128
STATUS_BYTES = 4 * GIB - PIECE_BYTES  # NBD's lengths have 32 bits
STATUSES = 64
POLL_S = 0.001


@dataclass
class Opened:
    """What the rounds of one size measured."""

    open_ms: list[float] = field(default_factory=list)
    read_ms: list[float] = field(default_factory=list)
    status_ms: list[float] = field(default_factory=list)
    open_costs: list[Cost] = field(default_factory=list)
    read_costs: list[Cost] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)


def run(bench):
    rows = []
    for name, size in SIZES.items():
        memory = bench.once(f"open {name}", lambda: memory_opens(bench, size))
        rows += rows_of(bench, name, opens(bench, size), memory)
    return rows


def opens(bench, size: int) -> Opened:
    """Fills a volume here and there, and opens it again and again."""
    places = spread(size, bench.count(PIECES))
    opened = Opened()
    with bench.volume(size) as volume:
        with volume.serve() as server:
            write(server, places)
        for number in range(bench.count(ROUNDS)):
            one_open(bench, volume, size, random.Random(number).sample(places, len(places)), opened)
    return opened


def one_open(bench, volume, size: int, places: list[int], opened: Opened) -> None:
    """One fresh server: the time to its first answer, then cold reads and block status."""
    before = bench.traffic()
    start = time.perf_counter()
    with volume.serve(wait=False) as server:
        client = first_read(server, places[0])
        opened.open_ms.append((time.perf_counter() - start) * 1e3)
        opened.open_costs.append(bench.cost_since(before, server, READ_BYTES))
        before = bench.traffic()
        reads = places[1 : 1 + bench.count(READS)]
        opened.read_ms += timed_ms(lambda place: client.pread(READ_BYTES, place), reads)
        opened.read_costs.append(bench.cost_since(before, server, len(reads) * READ_BYTES))
        stretches = range(0, size, max(STATUS_BYTES, size // STATUSES // PIECE_BYTES * PIECE_BYTES))
        opened.status_ms += timed_ms(lambda place: extents(client, place, size), stretches)
        opened.peak_bytes.append(server.peak_rss_bytes())
        client.shutdown()


def first_read(server, place: int):
    """Connects as soon as the server listens and reads; returns the connection."""
    server.wait_until(server.listens, POLL_S)
    client = nbd().NBD()
    client.add_meta_context("base:allocation")
    client.connect_uri(server.uri)
    client.pread(READ_BYTES, place)
    return client


def extents(client, place: int, size: int) -> None:
    """Asks for one stretch, as a client does: again from where the answer ended."""
    end = min(place + STATUS_BYTES, size)
    while place < end:
        answered = []
        client.block_status(end - place, place, lambda _context, _offset, entries, _error: answered.append(entries))
        place += sum(answered[0][::2])


def memory_opens(bench, size: int) -> Sample:
    """The same start of nbdkit's memory plugin."""
    taken_ms = []
    for _ in range(bench.count(ROUNDS)):
        start = time.perf_counter()
        with bench.memory(size, wait=False) as server:
            client = first_read(server, 0)
            taken_ms.append((time.perf_counter() - start) * 1e3)
            client.shutdown()
    return of_latencies(taken_ms)


def rows_of(bench, name: str, opened: Opened, memory: Sample) -> list[Row]:
    """The figures of one size."""
    start, read = of_latencies(opened.open_ms), of_latencies(opened.read_ms)
    target = bench.round_trips_at_most(BOUND[name]) if name in BOUND else None
    get = figure(bench.raw("get", size_bytes=READ_BYTES, concurrency=1), "p50")
    times = [bench.in_round_trips(sample) for sample in (start, memory)]
    rows = [
        Row("start to first read", *times, None, target, opened.open_costs[0]),
        Row("cold 4K read, one at a time", read, raw=get, cost=opened.read_costs[0]),
        Row("block status of 4 GiB", of_latencies(opened.status_ms)),
        Row("peak memory after these", Sample(max(opened.peak_bytes) / MIB, "MiB")),
    ]
    counts = [cost.traffic.count() for cost in opened.open_costs if cost.traffic]
    if counts:
        rows.append(Row("S3 requests to first read", Sample(statistics.median(counts), "requests")))
    for row in rows:
        row.variant = name
    return rows


def timed_ms(request, places) -> list[float]:
    """How long each request took."""
    taken_ms = []
    for place in places:
        start = time.perf_counter()
        request(place)
        taken_ms.append((time.perf_counter() - start) * 1e3)
    return taken_ms


def spread(size: int, count: int) -> list[int]:
    """Offsets of pieces, one at a random place of each of `count` equal parts."""
    randomness = random.Random(size)
    part = size // count // PIECE_BYTES
    return [(number * part + randomness.randrange(part)) * PIECE_BYTES for number in range(count)]


def write(server, places: list[int]) -> None:
    """Writes all pieces and flushes."""
    client = connect(server.uri)
    data = random.Random(0).randbytes(PIECE_BYTES)
    for place in places:
        client.pwrite(data, place)
    client.flush()
    client.shutdown()
