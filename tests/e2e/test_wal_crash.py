"""kill -9 under four writers with a log: on S3, beside the volume, in a journal, and on a store that refuses and loses requests."""

import itertools
import random

import pytest

from support.lossy import LossyProxy, Rule
from support.server import KI
from support.stamps import CLIENTS, ENOUGH_FLUSHES, SIZE, kill_and_check

pytestmark = pytest.mark.s3_only
ANY_WRITE = r"^(PUT|POST|DELETE) "


def wal_url(kind: str, store, tmp_path) -> str:
    return {"s3": store.url("log"), "auto": "auto", "journal": f"file://{tmp_path}/journal/"}[kind]


@pytest.mark.parametrize("kind", ["s3", "auto", "journal"])
@pytest.mark.parametrize("interval", ["150ms", "1h"])
def test_flushed_writes_survive_kill_9(make_volume, make_server, store, tmp_path, seed, kind, interval):
    """With checkpoints in between, and with the log alone."""
    url = wal_url(kind, store, tmp_path)
    server = make_server(make_volume(SIZE, 64 * KI), backend_wal_url=url, checkpoint_interval=interval)
    flushes = kill_and_check(server.start(), seed, rounds=8)
    assert flushes >= CLIENTS * ENOUGH_FLUSHES, f"only {flushes} flushes: the test has tested next to nothing"


def test_flushed_writes_survive_kill_9_with_and_without_a_log_beside(make_volume, make_server, seed):
    """Every other server is given no log: it finds that of the one before, replays it, and goes on without."""
    server = make_server(make_volume(SIZE, 64 * KI), checkpoint_interval="1h")
    command, logs = server.command, itertools.cycle(("auto", "off"))

    def of_the_next() -> list[str]:
        server.parameters["backend_wal_url"] = next(logs)
        return command()

    server.command = of_the_next
    flushes = kill_and_check(server.start(), seed, rounds=8)
    assert flushes >= CLIENTS * ENOUGH_FLUSHES, f"only {flushes} flushes: the test has tested next to nothing"
    assert "is ended" in server.log_text()


@pytest.mark.parametrize("kind", ["s3", "auto", "journal"])
def test_on_a_store_that_loses_answers(make_volume, make_server, store, minio, tmp_path, seed, kind):
    """One write in ten is carried out without an answer, refused, or carried out late, which may be after the server was
    killed and the next one has begun: log and volume alike."""
    proxy = LossyProxy(minio.endpoint)
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(
        volume,
        backend_wal_url=wal_url(kind, store, tmp_path),
        endpoint_url=proxy.endpoint,
        checkpoint_interval="300ms",
    )
    rng = random.Random(seed)
    try:
        for action in ("lose", "refuse", "delay"):
            server.start()
            proxy.rule = Rule(action, ANY_WRITE, probability=0.1, rng=random.Random(rng.random()))
            kill_and_check(server, rng.randrange(1 << 30), rounds=3, life_s=2.0, enough=1)
            server.kill()
            proxy.rule = None
            with_all_well = server.start().terminate()
            assert with_all_well == 0
            volume = make_volume(SIZE, 64 * KI)
            server.volume = volume
    finally:
        proxy.close()
