"""The store goes away under a running server: honest errors, nothing lost, and all is well when it is back."""

import contextlib
import json
import os
import threading
from pathlib import Path

import nbd
import pytest

from support.lives import listens
from support.model import Model, pattern, read_all
from support.process import wait_for
from support.server import KI, MI, flush_until_it_succeeds, read_until_it_succeeds
from support.stores import S3Store

EIO = 5
pytestmark = pytest.mark.s3_only


@pytest.fixture
def store(own_minio):
    """A store that a test can take down without harming others."""
    return S3Store(own_minio)


@pytest.fixture
def impatient(make_volume, make_server):
    """A server that gives up on the store after few seconds."""
    return make_server(make_volume(), io_timeout="3s", checkpoint_interval="1h").start()


@pytest.mark.parametrize("failure", ["killed", "paused"])
def test_flush_fails_keeps_the_data_and_succeeds_later(impatient, own_minio, failure):
    server = impatient
    first, second = pattern(2 * MI, 1), pattern(1 * MI + 5, 2)
    with server.connect(extents=True) as client:
        client.pwrite(first, 0)
        flush_until_it_succeeds(client)
        client.pwrite(second, 10 * MI + 3)

        own_minio.kill() if failure == "killed" else own_minio.pause()
        for _ in range(2):
            with pytest.raises(nbd.Error) as caught:
                client.flush()
            assert caught.value.errnum == EIO
        # Unpublished data needs no store: it can be read, changed and added to.
        assert client.pread(len(second), 10 * MI + 3) == second
        client.pwrite(b"changed", 10 * MI + 3)
        client.pwrite(b"added", 20 * MI)
        assert client.pread(7, 10 * MI + 3) == b"changed"
        server.assert_running()

        own_minio.start() if failure == "killed" else own_minio.resume()
        flush_until_it_succeeds(client)
        server.kill()
    server.parameters["io_timeout"] = "60s"
    server.start()
    with server.connect() as client:
        assert client.pread(2 * MI, 0) == first
        assert client.pread(len(second), 10 * MI + 3) == b"changed" + second[7:]
        assert client.pread(5, 20 * MI) == b"added"


def test_a_failed_flush_is_never_forgotten(impatient, own_minio):
    """After a failed flush the next one covers the same writes: it fails too while the store is down."""
    with impatient.connect() as one, impatient.connect() as other:
        one.pwrite(b"not yet durable", 0)
        own_minio.kill()
        for client in (one, other, one):
            with pytest.raises(nbd.Error):
                client.flush()
        own_minio.start()
        flush_until_it_succeeds(other)
        impatient.kill()
    impatient.parameters["io_timeout"] = "60s"
    impatient.start()
    with impatient.connect() as client:
        assert client.pread(15, 0) == b"not yet durable"


def test_fua_fails_honestly(impatient, own_minio):
    with impatient.connect() as client:
        own_minio.kill()
        with pytest.raises(nbd.Error) as caught:
            client.pwrite(b"durable?", 0, nbd.CMD_FLAG_FUA)
        assert caught.value.errnum == EIO
        own_minio.start()
        flush_until_it_succeeds(client)


def test_reads_of_stored_data_fail_and_recover(impatient, own_minio):
    data = pattern(4 * MI, 3)
    server = impatient
    with server.connect() as client:
        client.pwrite(data, 0)
        flush_until_it_succeeds(client)
    server.terminate()
    server.start()
    with server.connect() as client:
        assert read_until_it_succeeds(client, 1 * KI, 0) == data[:KI]
        own_minio.kill()
        with pytest.raises(nbd.Error) as caught:
            client.pread(1 * MI, 3 * MI)
        assert caught.value.errnum == EIO
        own_minio.start()

        def reads() -> bool:
            try:
                return client.pread(4 * MI, 0) == data
            except nbd.Error:
                return False

        wait_for(reads, "reads to work with the store back", limit_s=90)
    server.assert_running()


def test_the_store_comes_and_goes(make_volume, make_server, own_minio, seed):
    """Three outages among writes and checkpoints by age; in the end everything is there."""
    server = make_server(make_volume(16 * MI), io_timeout="3s", checkpoint_interval="200ms").start()
    model = Model(16 * MI, 64 * KI)
    with server.connect() as client:
        for outage in range(3):
            for step in range(20):
                offset = (seed + outage * 7919 + step * 104_729) % (15 * MI)
                data = pattern(30_000, outage * 100 + step)
                client.pwrite(data, offset)
                model.write(offset, data)
                if step == 10:
                    own_minio.kill()
            with pytest.raises(nbd.Error):
                client.flush()
            own_minio.start()
            flush_until_it_succeeds(client)
        server.kill()
    server.parameters["io_timeout"] = "60s"
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, 16 * MI), what="after a restart")


def test_sigterm_with_the_store_down_ends(impatient, own_minio):
    """The final checkpoint cannot be made: the server says so and ends within a bounded time."""
    with impatient.connect() as client:
        client.pwrite(b"never published", 0)
        # Before the last client goes: a checkpoint starts then, and may be quicker.
        own_minio.kill()
    impatient.terminate()  # waits, with a limit
    assert "ERROR" in impatient.log_text()


def open_sockets(pid: int) -> int:
    """How many Unix sockets of its own a server has: the one it listens on, and one a client."""
    known = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:]}
    links = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the server lives, and closes what it needs no more
            links.append(os.readlink(fd))
    return sum(link.removeprefix("socket:[").removesuffix("]") in known for link in links if link.startswith("socket:["))


def test_sigterm_while_the_volume_is_opened_on_a_store_that_hangs(make_volume, make_server, own_minio):
    """The first client waits for a store that takes connections and never answers; the server is told to stop."""
    server = make_server(make_volume(), io_timeout="10m")
    server.spawn()
    wait_for(lambda: listens(server.socket), "nbdkit to listen")
    own_minio.pause()
    failed = []

    def connect() -> None:
        with pytest.raises(nbd.Error) as caught:
            server.handle()
        failed.append(caught.value)

    # Both wait for one opening.
    clients = [threading.Thread(target=connect) for _ in range(2)]
    for client in clients:
        client.start()
    wait_for(lambda: open_sockets(server.process.pid) >= 3, "the clients to be taken in")
    server.terminate()  # waits, with a limit
    for client in clients:
        client.join()
    assert len(failed) == 2
    own_minio.resume()


def test_a_full_buffer_with_the_store_down(make_volume, make_server, own_minio):
    """Writers are held back, then told; nothing that was acknowledged is lost, and nothing grows without bound."""
    parameters = {"write_buffer": "16M", "io_timeout": "3s", "checkpoint_interval": "1h"}
    server = make_server(make_volume(), **parameters).start()
    acknowledged = 0
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 99), 63 * MI)
        flush_until_it_succeeds(client)
        own_minio.kill()
        with pytest.raises(nbd.Error):
            for number in range(60):
                client.pwrite(pattern(1 * MI, number), number * MI)
                acknowledged += 1
        assert 0 < acknowledged <= 16, f"{acknowledged} MiB were taken into a buffer of 16"
        for number in range(acknowledged):
            assert client.pread(1 * MI, number * MI) == pattern(1 * MI, number)
        own_minio.start()
        flush_until_it_succeeds(client)
        client.pwrite(pattern(1 * MI, 98), 62 * MI)
        flush_until_it_succeeds(client)
        server.kill()
    server.parameters["io_timeout"] = "60s"
    server.start()
    with server.connect() as client:
        for number in range(acknowledged):
            assert client.pread(1 * MI, number * MI) == pattern(1 * MI, number)
        assert client.pread(2 * MI, 62 * MI) == pattern(1 * MI, 98) + pattern(1 * MI, 99)


def test_waiting_flushes_share_a_publish(make_volume, make_server, own_minio):
    """Flushes that arrive during a publish join the next one, all of them."""

    def last_checkpoint() -> int:
        return json.loads(volume.cli("info", volume.url, "--json").stdout)["last_checkpoint"]

    volume = make_volume()
    server = make_server(volume, checkpoint_interval="1h").start()
    clients = [server.handle() for _ in range(24)]
    for number, client in enumerate(clients):
        client.pwrite(pattern(5000, number), number * 5000)
    before = last_checkpoint()
    own_minio.pause()
    pending = [(client, client.aio_flush()) for client in clients]
    for client, _ in pending:
        client.pread(1, 0)  # answered from the buffer: the flush sent before it has been taken in
    own_minio.resume()
    for client, cookie in pending:
        while not client.aio_command_completed(cookie):
            client.poll(-1)
        client.shutdown()
    server.kill()
    assert last_checkpoint() - before <= 4
    server.start()
    with server.connect() as client:
        for number in range(24):
            assert client.pread(5000, number * 5000) == pattern(5000, number)
