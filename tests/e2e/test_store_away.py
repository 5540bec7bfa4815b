"""A store that is away for a while, bucket or directory: what the server holds is bounded, and nothing is concluded."""

from pathlib import Path

import nbd
import pytest

from support.lives import SIZE
from support.model import pattern, read_all
from support.process import wait_for
from support.server import KI, MI, flush_until_it_succeeds, read_until_it_succeeds
from support.stores import FileStore, S3Store


@pytest.fixture
def store(request, tmp_path):
    """A store of the test's own."""
    if request.param == "s3":
        return S3Store(request.getfixturevalue("own_minio"))
    (tmp_path / "store").mkdir()
    return FileStore(tmp_path / "store")


@pytest.fixture
def away(store):
    """How to take the store away, and how to bring it back."""
    if store.kind == "s3":
        return store.minio.kill, store.minio.start
    here, there = store.directory, store.directory.with_name("elsewhere")
    return lambda: here.rename(there), lambda: there.rename(here)


def resident_bytes(server) -> int:
    """The memory a server takes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * KI


def test_scattered_zeroes_fill_the_buffer_and_no_more(away, make_volume, make_server):
    size, requests_max = 64 * 1024 * MI, 400_000
    take_away, bring_back = away
    parameters = {"write_buffer": "16M", "io_timeout": "3s", "checkpoint_interval": "1h", "cache_memory": "0"}
    server = make_server(make_volume(size, 4 * KI), **parameters).start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 0)
        flush_until_it_succeeds(client)
        before = resident_bytes(server)
        take_away()
        taken = 0
        with pytest.raises(nbd.Error):
            while taken < requests_max:
                client.zero(4 * KI, MI + taken * 8 * KI)
                taken += 1
        assert 1000 < taken < requests_max
        assert resident_bytes(server) < before + 64 * MI, "what is kept of them is not counted"
        bring_back()
        flush_until_it_succeeds(client)
        client.pwrite(pattern(MI, 2), 0)
        flush_until_it_succeeds(client)
        assert read_until_it_succeeds(client, MI, 0) == pattern(MI, 2)
    server.kill()


def test_a_lease_outlives_a_store_that_is_away_for_a_moment(away, make_volume, make_server):
    take_away, bring_back = away
    # Longer than a store takes to be back, however slow the machine is.
    server = make_server(make_volume(SIZE), lease_duration="2s", io_timeout="10m", checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 0)
        client.flush()
        take_away()
        client.pwrite(pattern(MI, 2), MI)
        cookie = client.aio_flush()
        client.poll(1000)
        said = len(server.log_text())
        wait_for(lambda: len(server.log_text()) > said, "the server to say that its store is away")
        bring_back()
        while not client.aio_command_completed(cookie):
            client.poll(-1)
        server.kill()
    server.start()
    with server.connect() as client:
        assert read_all(client, SIZE)[: 2 * MI] == pattern(MI, 1) + pattern(MI, 2)
