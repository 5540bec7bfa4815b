"""Volumes of many terabytes: what is empty costs nothing, however long it is."""

import nbd
import pytest

from support.model import extent_map, pattern
from support.server import GI, KI, MI, TI

SIZE = 9 * TI
REQUEST = 4 * GI - 64 * KI


def over_the_whole_volume(client, request) -> None:
    """Calls `request(length, offset)` in as few, in-flight together, as the protocol allows."""
    cookies = []
    for offset in range(0, SIZE, REQUEST):
        cookies.append(request(min(REQUEST, SIZE - offset), offset))
        while len(cookies) >= 16:
            client.poll(-1)
            cookies = [cookie for cookie in cookies if not client.aio_command_completed(cookie)]
    while cookies:
        client.poll(-1)
        cookies = [cookie for cookie in cookies if not client.aio_command_completed(cookie)]


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_trim_and_zero_of_an_empty_volume_publish_nothing(make_volume, make_server, block_bytes):
    volume = make_volume(SIZE, block_bytes)
    # A lease that is renewed meanwhile would be a change, and so would be what a round of retention stores.
    server = make_server(volume, lease_duration="24h", retention_interval="off").start()
    before = volume.store.objects()
    with server.connect(extents=True) as client:
        assert client.get_size() == SIZE
        over_the_whole_volume(client, lambda length, offset: client.aio_trim(length, offset))
        over_the_whole_volume(client, lambda length, offset: client.aio_zero(length, offset))
        client.cache(REQUEST, 0)
        client.flush()
        assert volume.store.objects() == before
        assert client.pread(1 * MI, SIZE - 1 * MI) == bytes(1 * MI)
    assert server.terminate() == 0


def test_trim_costs_by_what_is_mapped(make_volume, make_server):
    """A trim of everything on a nearly empty volume drops the little there is, and few objects are written."""
    volume = make_volume(SIZE)
    # None by age among the trims, which take long on a slow machine.
    server = make_server(volume, checkpoint_interval="1h").start()
    places = [0, 1 * TI + 12345, 5 * TI, SIZE - 1 * MI]
    with server.connect(extents=True) as client:
        for number, place in enumerate(places):
            client.pwrite(pattern(1 * MI, number), place)
        client.flush()
        before = set(volume.store.objects())
        over_the_whole_volume(client, lambda length, offset: client.aio_trim(length, offset))
        client.flush()
        added = set(volume.store.objects()) - before
        assert len(added) <= 12, added
        server.kill()
    server.start()
    with server.connect(extents=True) as client:
        for place in places:
            first = -(-place // (64 * KI)) * 64 * KI
            assert client.pread(512 * KI, first) == bytes(512 * KI)
            assert all(flags & nbd.STATE_ZERO for _, _, flags in extent_map(client, first, 512 * KI))


def test_extents_of_a_huge_volume(make_volume, make_server):
    """The map of 9 TiB takes one request for each 4 GiB and no more for being empty."""
    server = make_server(make_volume(SIZE)).start()
    with server.connect(extents=True) as client:
        client.pwrite(pattern(64 * KI, 1), 3 * TI)
        data = [(at, length) for at, length, flags in extent_map_of(client, SIZE) if not flags & nbd.STATE_ZERO]
        assert data == [(3 * TI, 64 * KI)]


def extent_map_of(client, size_bytes: int):
    """`extent_map` in requests the protocol can hold."""
    for offset in range(0, size_bytes, REQUEST):
        yield from extent_map(client, offset, min(REQUEST, size_bytes - offset))


def test_creating_a_huge_volume_is_cheap(store, make_volume):
    before = set(store.objects())
    make_volume(SIZE)
    assert len(set(store.objects()) - before) <= 12
