"""What it takes to look at a volume of 100 GiB: check, diff, clone, and an export of the past, in requests and round trips.

1 GiB of the volume is mapped, in pieces spread over all of it; a thousand blocks were changed after that. The export is opened beside
the live volume, which a client writes to meanwhile.
"""

import random
import threading
import time

from harness import verbs
from harness.loads import GIB, MIB, Sample, connect, nbd, of_latencies
from harness.report import Row, Target

SIZE = 100 * GIB
PIECES = 1024
CHANGED = 1000
BLOCK_BYTES = 4096
ROUNDS = 5


def run(bench):
    places = spread(bench.count(PIECES))
    with bench.volume(SIZE) as volume:
        with volume.serve() as server:
            write(server, [(place, MIB) for place in places])
        before = newest(bench, volume)
        with volume.serve() as server:
            inside = random.Random(1)
            blocks = [place + inside.randrange(MIB // BLOCK_BYTES) * BLOCK_BYTES for place in places]
            write(server, [(place, BLOCK_BYTES) for place in blocks[: bench.count(CHANGED)]])
        after = newest(bench, volume)
        check = verbs.run(bench, "check", volume.url)
        diff = verbs.run(bench, "diff", volume.url, before, after, "--stat")
        cloned_url = volume.url.removesuffix("/volume/") + "/clone/"
        clone = verbs.run(bench, "clone", volume.url, cloned_url)
        past = past_reads(bench, volume, before, places)
    rows = [
        row("check", check, 400),
        row("diff of two checkpoints", diff, 60),
        row("clone", clone, 12),
        Row("open and first read of an export", past, target=bench.round_trips_at_most(8)),
    ]
    return [one for one in rows if one]


def newest(bench, volume) -> str:
    """The newest checkpoint, as people name it."""
    listed = verbs.run(bench, "checkpoints", volume.url, "--json").json()
    return f"@{max(one['cno'] for one in listed)}"


def row(name: str, ran: verbs.Ran, most: int) -> Row | None:
    """The requests of a verb; None where nothing counts them."""
    if ran.cost.traffic is None:
        return None
    return Row(name, Sample(ran.cost.traffic.count(), "requests"), target=Target("value", at_most=most), cost=ran.cost)


def past_reads(bench, volume, at: str, places: list[int]) -> Sample:
    """From connecting to an export of the past to its first read, while a client writes to the live volume."""
    taken_ms = []
    with volume.serve() as server:
        live = connect(server.uri)
        over = threading.Event()
        writer = threading.Thread(target=write_until, args=(live, places, over))
        writer.start()
        try:
            for number in range(bench.count(ROUNDS)):
                began = time.perf_counter()
                client = nbd().NBD()
                client.connect_uri(server.uri.replace("nbd+unix:///?", f"nbd+unix:///{at}?"))
                client.pread(BLOCK_BYTES, places[number])
                taken_ms.append((time.perf_counter() - began) * 1e3)
                client.shutdown()
        finally:
            over.set()
            writer.join()
            live.shutdown()
    return bench.in_round_trips(of_latencies(taken_ms))


def write_until(client, places: list[int], over: threading.Event) -> None:
    """Writes to the volume, and flushes, until told that it is over."""
    data = random.Random(2).randbytes(64 * 1024)
    randomness = random.Random(3)
    while not over.is_set():
        client.pwrite(data, randomness.choice(places))
        client.flush()


def write(server, ranges: list[tuple[int, int]]) -> None:
    """Writes all ranges, offset and length in bytes, and flushes."""
    client = connect(server.uri)
    data = random.Random(0).randbytes(MIB)
    for place, length in ranges:
        client.pwrite(data[:length], place)
    client.flush()
    client.shutdown()


def spread(count: int) -> list[int]:
    """Offsets of pieces of a MiB, one at a random place of each of `count` equal parts."""
    randomness = random.Random(SIZE)
    part = SIZE // count // MIB
    return [(number * part + randomness.randrange(part)) * MIB for number in range(count)]
