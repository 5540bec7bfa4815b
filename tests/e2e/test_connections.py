"""Many connections, one after another and at once, and clients that go without a word."""

import random
import threading

import pytest

from support import nbdwire
from support.model import Model, pattern, read_all
from support.nbdwire import WireClient
from support.server import KI, MI

DISCONNECTS = 200


@pytest.mark.old_nbdkit_too
@pytest.mark.parametrize("count", [1, 10])
def test_connections_one_after_another(server, count):
    for number in range(count):
        with server.connect() as client:
            client.pwrite(pattern(1000, number), number * 1000)
            assert client.pread(1000, number * 1000) == pattern(1000, number)
    with server.connect() as client:
        for number in range(count):
            assert client.pread(1000, number * 1000) == pattern(1000, number)


@pytest.mark.old_nbdkit_too
@pytest.mark.parametrize("count", [2, 10])
def test_connections_at_once(server, count):
    clients = [server.handle() for _ in range(count)]
    for number, client in enumerate(clients):
        client.pwrite(pattern(1000, number), number * 1000)
    for client in clients:
        for number in range(count):
            assert client.pread(1000, number * 1000) == pattern(1000, number)
    for client in clients:
        client.shutdown()


@pytest.mark.file_only
def test_a_thousand_connections_one_after_another(server):
    for number in range(1000):
        client = WireClient(server.socket)
        assert client.size_bytes == 64 * MI
        client.send(client.request(nbdwire.CMD_DISC))
        client.hang_up()
    with server.connect() as client:
        client.pwrite(b"x", 0)
        client.flush()


@pytest.mark.file_only
def test_a_thousand_connections_at_once(make_volume, make_server):
    """Each of a thousand open connections writes, and sees what the others wrote."""
    # Two threads a connection instead of sixteen: the point is the connections.
    server = make_server(make_volume(), nbdkit_options=["--threads=2"]).start()
    clients = [server.handle() for _ in range(1000)]
    for number, client in enumerate(clients):
        client.pwrite(number.to_bytes(4, "little"), number * 4)
    clients[500].flush()
    expected = b"".join(number.to_bytes(4, "little") for number in range(1000))
    for client in clients[::50]:
        assert client.pread(4000, 0) == expected
    for client in clients:
        client.shutdown()
    with server.connect() as client:
        assert client.pread(4000, 0) == expected


@pytest.mark.old_nbdkit_too
def test_a_write_is_visible_on_every_connection(server):
    with server.connect() as one, server.connect() as other:
        for number in range(50):
            one.pwrite(pattern(10_000, number), number * 777)
            assert other.pread(10_000, number * 777) == pattern(10_000, number)
            if number % 10 == 0:
                other.flush()
        one.zero(5_000, 100)
        assert other.pread(5_000, 100) == bytes(5_000)


def test_a_flush_covers_every_connection(server):
    clients = [server.handle() for _ in range(8)]
    for number, client in enumerate(clients):
        client.pwrite(pattern(100_000, number), number * 100_000)
    clients[0].flush()
    server.kill()
    server.start()
    with server.connect() as client:
        for number in range(8):
            assert client.pread(100_000, number * 100_000) == pattern(100_000, number)


def test_writers_in_parallel(server, seed):
    """Eight threads on eight connections, each in a lane of its own that shares blocks with its neighbours."""
    lane_bytes = 999_983
    model = Model(64 * MI, 64 * KI)
    failures = []

    def work(lane: int) -> None:
        rng = random.Random(seed + lane)
        try:
            with server.connect() as client:
                for step in range(60):
                    length = rng.randint(1, 100_000)
                    offset = lane * lane_bytes + rng.randint(0, lane_bytes - length)
                    if rng.random() < 0.2:
                        client.zero(length, offset)
                        model.zero(offset, length)
                    else:
                        data = pattern(length, lane * 1000 + step)
                        client.pwrite(data, offset)
                        model.write(offset, data)
                    model.assert_same(client.pread(length, offset), offset, f"lane {lane}, step {step}")
                    if rng.random() < 0.1:
                        client.flush()
        except BaseException as error:  # handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    with server.connect() as client:
        client.flush()
    server.kill()
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, 64 * MI), what="after a restart")


@pytest.mark.old_nbdkit_too
def test_abrupt_disconnects_harm_nobody(server, seed):
    """Clients hang up with requests in flight and half-sent, 200 times; another client notices nothing."""
    rng = random.Random(seed)
    kept = pattern(1 * MI, 1)
    with server.connect() as witness:
        witness.pwrite(kept, 32 * MI)
        for number in range(DISCONNECTS):
            client = WireClient(server.socket)
            requests = [
                rng.choice(
                    [
                        client.request(nbdwire.CMD_READ, rng.randrange(32) * MI, 1 * MI),
                        client.request(nbdwire.CMD_WRITE, rng.randrange(1000) * 512, data=pattern(70_000, number)),
                        client.request(nbdwire.CMD_FLUSH),
                        client.request(nbdwire.CMD_ZERO, rng.randrange(1000), 100_000),
                        client.request(nbdwire.CMD_TRIM, 0, 10 * MI),
                    ]
                )
                for _ in range(rng.randint(1, 16))
            ]
            if rng.random() < 0.3:  # hang up in the middle of a write's data
                requests.append(client.request(nbdwire.CMD_WRITE, 0, data=bytes(50_000))[:20_000])
            client.send_what_is_taken(*requests)
            client.hang_up()
            if number % 10 == 0:
                assert witness.pread(1 * MI, 32 * MI) == kept
        server.assert_running()
        assert witness.pread(1 * MI, 32 * MI) == kept
        witness.flush()
    server.assert_running()
