"""What reads of a fresh server ask of the store: counted, not timed."""

import random
import re

import pytest

from support.faulty import FaultyProxy
from support.model import pattern
from support.process import wait_for
from support.server import KI, MI

pytestmark = pytest.mark.s3_only

BLOCK = 4 * KI
REGIONS = 12
REGION = 8 * MI
LOUD = {"RUST_LOG": "info,hypernbd_volume::read::read_path=debug"}


@pytest.fixture
def counted(make_server, minio):
    """Makes servers behind a proxy that counts: `counted(volume)`."""
    made = []

    def make(volume, **parameters):
        proxy = FaultyProxy(minio.endpoint)
        made.append(proxy)
        server = make_server(volume, endpoint_url=proxy.endpoint, env=LOUD, lease_duration="1h", **parameters)
        server.proxy = proxy
        return server

    yield make
    for proxy in made:
        proxy.close()


def objects_read(server) -> list[str]:
    """The range GETs of a container's objects so far."""
    with server.proxy.lock:
        gets = [line for line in server.proxy.requests if line.startswith("GET ")]
    return [line for line in gets if not re.search(r"list-type|[?&]uploads|\.meta", line)]


def test_a_read_of_any_block_is_one_request_once_the_index_is_in_memory(make_volume, make_server, counted, seed):
    """Each region's part of the index was published by a checkpoint of its own, so it lies in an object of its own."""
    volume = make_volume(REGIONS * REGION, BLOCK)
    writer = make_server(volume, checkpoint_interval="1h").start()
    blocks = [region * REGION + at for region in range(REGIONS) for at in range(0, REGION, 32 * KI)]
    with writer.connect() as client:
        for region in range(REGIONS):
            for at in blocks[region * 256 : (region + 1) * 256]:
                client.pwrite(pattern(BLOCK, at), at)
            client.flush()
    assert writer.terminate() == 0
    server = counted(volume).start()
    wait_for(lambda: "leaves of the index are in memory" in server.log_text(), "the index to be in memory")
    before = len(objects_read(server))
    chosen = random.Random(seed).sample(blocks, 60)
    with server.connect() as client:
        for at in chosen:
            assert client.pread(BLOCK, at) == pattern(BLOCK, at), at
    read = objects_read(server)[before:]
    # A slow answer is asked for again; without the index in memory each region would cost a request more.
    assert len(read) < len(chosen) + REGIONS // 2, read


def test_reading_an_aged_volume_in_order_takes_a_request_an_object_and_not_a_block(
    make_volume, make_server, counted, seed
):
    size, ages = 16 * MI, 10
    volume = make_volume(size, BLOCK)
    expected = bytearray(pattern(size, 0))
    rng = random.Random(seed)
    writer = make_server(volume, checkpoint_interval="1h", write_buffer="64M").start()
    with writer.connect() as client:
        for at in range(0, size, MI):
            client.pwrite(bytes(expected[at : at + MI]), at)
        client.flush()
        for age in range(1, ages + 1):
            for at in rng.sample(range(0, size, BLOCK), 300):
                expected[at : at + BLOCK] = pattern(BLOCK, age * 1000 + at)
                client.pwrite(bytes(expected[at : at + BLOCK]), at)
            client.flush()
    assert writer.terminate() == 0
    server = counted(volume).start()
    with server.connect() as client:
        for at in range(0, size, MI):
            assert client.pread(MI, at) == expected[at : at + MI], at
    # 2000 blocks and more are not where their neighbours are. Ten objects and the first one, by windows of up to 4 MiB.
    read = objects_read(server)
    assert len(read) < 400, f"{len(read)} requests"
