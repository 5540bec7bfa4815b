"""kill -9 under a stream of writes, whose checkpoints overlap: every block is checked against what was flushed."""

import random
import struct
import threading

import nbd
import pytest

from support.lossy import LossyProxy, Rule
from support.process import wait_for
from support.server import KI, MI

PIECES = 96
CELL = struct.Struct("<QQ")
FLUSH_LIMIT_S = 250
LOUD = {"RUST_LOG": "warn,hypernbd_volume::engine=debug"}


def content(number: int, piece: int) -> bytes:
    """A piece that tells which pass wrote it, and where."""
    return CELL.pack(number, piece) * (MI // CELL.size)


class Stream(threading.Thread):
    """Writes the volume from front to back, over and over, with a flush now and then."""

    def __init__(self, server, rng: random.Random, first_pass: int, promised: list[int], sent: list[int]):
        super().__init__(daemon=True)
        self.server, self.rng, self.number = server, rng, first_pass
        self.promised = promised  # by piece: the newest pass that a flush has covered, or that was seen in all of it
        self.sent = sent  # by piece: the newest pass that can be in any of it
        self.flushes = 0
        self.has_flushed = threading.Event()

    def run(self) -> None:
        try:
            client = self.server.handle()
            answered = list(self.promised)
            while True:
                for piece in range(PIECES):
                    self.sent[piece] = self.number
                    client.pwrite(content(self.number, piece), piece * MI)
                    answered[piece] = self.number
                    if self.rng.random() < 0.04:
                        covered = list(answered)
                        client.flush()
                        self.promised[:] = covered
                        self.flushes += 1
                        self.has_flushed.set()
                self.number += 1
        except nbd.Error:
            pass  # the server was killed
        finally:
            self.has_flushed.set()


def check(client, stream: Stream, block_bytes: int) -> None:
    for piece in range(PIECES):
        found = client.pread(MI, piece * MI)
        numbers = set()
        for at in range(0, MI, block_bytes):
            block = found[at : at + block_bytes]
            number, of_piece = CELL.unpack_from(block)
            assert block == CELL.pack(number, of_piece) * (block_bytes // CELL.size), f"torn block in piece {piece}"
            assert number == 0 or of_piece == piece, f"piece {of_piece} in place of piece {piece}"
            assert stream.promised[piece] <= number <= stream.sent[piece], (
                f"piece {piece} has pass {number}, {stream.promised[piece]} was flushed, {stream.sent[piece]} sent"
            )
            numbers.add(number)
        stream.promised[piece], stream.sent[piece] = min(numbers), max(numbers)


def kill_and_check(server, rng: random.Random, block_bytes: int, rounds: int, life_s: tuple[float, float]) -> None:
    """A stream to a started server that is killed at random moments and started again."""
    promised, sent, number, flushes = [0] * PIECES, [0] * PIECES, 1, 0
    for round_number in range(rounds):
        stream = Stream(server, rng, number, promised, sent)
        before = len(server.log_text())
        stream.start()
        if round_number == rounds // 2:
            # However slow the machine is: one round is killed after a flush, and after publishes that overlapped.
            assert stream.has_flushed.wait(FLUSH_LIMIT_S)
            wait_for(lambda: most_under_way(server.log_text()[before:]) >= 2, "two publishes to overlap", FLUSH_LIMIT_S)
        threading.Event().wait(rng.uniform(*life_s))
        server.kill()
        stream.join()
        server.start()
        with server.connect() as client:
            check(client, stream, block_bytes)
        number, flushes = stream.number + 1, flushes + stream.flushes
    assert flushes > 0, "no flush was ever answered: the test has tested nothing"


def most_under_way(log_of_life: str) -> int:
    """The most publishes that were under way at once."""
    under_way = most = 0
    for line in log_of_life.splitlines():
        if "laid out and located" in line:
            under_way += 1
        elif "published checkpoint" in line and under_way:
            under_way -= 1
        most = max(most, under_way)
    return most


def log_url(kind: str | None, store, tmp_path) -> dict[str, str]:
    if kind is None:
        return {}
    if kind == "s3" and store.kind == "file":
        pytest.skip("a log on S3 needs S3")
    return {"backend_wal_url": store.url("log") if kind == "s3" else f"file://{tmp_path}/journal/"}


@pytest.mark.parametrize("log", [None, "s3", "journal"])
@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_a_flushed_stream_survives_kill_9(make_volume, make_server, store, tmp_path, seed, block_bytes, log):
    volume = make_volume(PIECES * MI, block_bytes)
    server = make_server(volume, env=LOUD, write_buffer="64M", **log_url(log, store, tmp_path))
    kill_and_check(server.start(), random.Random(seed), block_bytes, rounds=5, life_s=(0.3, 1.5))


@pytest.mark.s3_only
@pytest.mark.parametrize("log", [None, "s3"])
@pytest.mark.parametrize("action", ["lose", "refuse"])
def test_on_a_store_that_loses_answers(make_volume, make_server, store, minio, tmp_path, seed, action, log):
    """One write in twenty to the store is carried out without an answer, or refused."""
    rng = random.Random(seed)
    proxy = LossyProxy(minio.endpoint)
    server = make_server(
        make_volume(PIECES * MI, 64 * KI),
        env=LOUD,
        write_buffer="64M",
        endpoint_url=proxy.endpoint,
        **log_url(log, store, tmp_path),
    )
    try:
        server.start()
        proxy.rule = Rule(action, r"^(PUT|POST|DELETE) ", probability=0.05, rng=random.Random(rng.random()))
        kill_and_check(server, rng, 64 * KI, rounds=3, life_s=(1.0, 4.0))
    finally:
        proxy.close()
