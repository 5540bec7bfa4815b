"""Requests the store carried out though their answer was lost, and requests it refuses: nothing is guessed."""

import random

import pytest

from support.lossy import LossyProxy, Rule
from support.model import Model, pattern, random_range
from support.server import KI, MI, flush_until_it_succeeds, read_until_it_succeeds

pytestmark = pytest.mark.s3_only

SIZE = 8 * MI
INODE = r"^PUT \S+/inode[? ]"
SEGMENT = r"^PUT \S+/\d{10}\.\d+[? ]"
ANY_WRITE = r"^(PUT|POST) "


@pytest.fixture
def proxy(minio):
    """A proxy before the session's MinIO."""
    proxy = LossyProxy(minio.endpoint)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("action", ["lose", "refuse"])
@pytest.mark.parametrize("pattern_name", ["inode", "segment", "any"])
@pytest.mark.parametrize("times", [1, 2, 12])
def test_one_publish_goes_wrong(make_volume, make_server, proxy, action, pattern_name, times):
    server = make_server(
        make_volume(SIZE), endpoint_url=proxy.endpoint, io_timeout="5s", checkpoint_interval="1h"
    ).start()
    where = {"inode": INODE, "segment": SEGMENT, "any": ANY_WRITE}[pattern_name]
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        flush_until_it_succeeds(client)
        client.pwrite(pattern(1 * MI, 2), 512 * KI)
        rule = proxy.rule = Rule(action, where, times_max=times)
        flush_until_it_succeeds(client)
        assert rule.hits >= 1, "no request went wrong: the test has tested nothing"
        proxy.rule = None
        client.pwrite(pattern(1000, 3), 4 * MI + 1)
        flush_until_it_succeeds(client)
        server.kill()
    server.parameters["io_timeout"] = "60s"
    server.start()
    with server.connect() as client:
        assert client.pread(512 * KI, 0) == pattern(512 * KI, 1)
        assert client.pread(1 * MI, 512 * KI) == pattern(1 * MI, 2)
        assert client.pread(1000, 4 * MI + 1) == pattern(1000, 3)


def test_a_store_that_often_loses_answers(make_volume, make_server, proxy, seed):
    """One write in five is carried out without an answer, one in five refused; after each flush: kill, compare."""
    rng = random.Random(seed)
    server = make_server(
        make_volume(SIZE), endpoint_url=proxy.endpoint, io_timeout="5s", checkpoint_interval="200ms"
    ).start()
    model = Model(SIZE, 64 * KI)
    for round_number in range(6):
        action = "lose" if round_number % 2 else "refuse"
        with server.connect() as client:
            rule = proxy.rule = Rule(action, ANY_WRITE, probability=0.2, rng=random.Random(rng.random()))
            for step in range(40):
                offset, length = random_range(rng, SIZE, 64 * KI, 256 * KI)
                data = pattern(length, round_number * 1000 + step)
                client.pwrite(data, offset)
                model.write(offset, data)
                if step % 10 == 9:
                    flush_until_it_succeeds(client)
            server.kill()
        proxy.rule = None
        server.start()
        with server.connect() as client:
            for at in range(0, SIZE, MI):
                read = read_until_it_succeeds(client, MI, at)
                model.assert_same(read, at, what=f"round {round_number}, {rule.hits} went wrong")
