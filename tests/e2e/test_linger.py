"""A server has the volume while clients do, and a moment longer: then it costs the store nothing, and another server may have it."""

import threading
import time

import nbd
import pytest

from support.endpoints import ask, page
from support.faulty import Fault
from support.lease import lease_of
from support.model import pattern
from support.process import wait_for
from support.server import MI, flush_until_it_succeeds, leave
from support.stores import free_port

SIZE = 64 * MI
# Nothing is published by itself while a client is there.
SHORT = {"lease_linger": "1s", "checkpoint_interval": "1h"}
# Longer than the shortest interval of all that a server with an open volume does by itself.
QUIET_S = 3
# A lease that is renewed within that, and whose return outlasts a store that stands still for a while.
RENEWED = "8s"
LEASE_WRITE = r"^PUT \S+\.meta/lease[? ]"


@pytest.fixture
def tell(make_server):
    """Makes a server that tells of itself, not yet started: `tell(volume, parameter=value…)`; gives it and its address."""

    def make(volume, **parameters):
        address = f"127.0.0.1:{free_port()}"
        return make_server(volume, metrics=address, **{**SHORT, **parameters}), address

    return make


def state(address) -> str:
    return ask(address, "/status").json["state"]


def given_back(address) -> None:
    """Waits until the volume is."""
    wait_for(lambda: state(address) == "waiting", "the volume to be given back")


@pytest.mark.s3_only
def test_a_server_without_clients_asks_nothing_of_the_store(make_volume, tell, proxy):
    volume = make_volume(SIZE)
    # All that an open volume does by itself, as often as may be.
    often = {"lease_duration": RENEWED, "retention_interval": "1s", "scrub_interval": "1s", "compaction": "auto"}
    server, address = tell(volume, endpoint_url=proxy.endpoint, **often)
    server.start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
    given_back(address)
    assert lease_of(volume)["state"] == "released"
    numbers = page(address)
    assert numbers.value("volume_open") == 0 and numbers.value("lease_held") == 0
    assert ask(address, "/readyz").status == 200, "the next client is waited for"

    def is_quiet() -> bool:
        before = len(proxy.requests)
        time.sleep(QUIET_S)
        return len(proxy.requests) == before

    # What an opening has begun by the side may have been under way, and held up for as long.
    wait_for(lambda: is_quiet() and is_quiet(), "the last request")
    with server.connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
        assert state(address) == "open" and page(address).value("lease_held") == 1


@pytest.mark.parametrize("way", ["plain", "wal", "buffer", "caches"])
def test_the_next_client_finds_what_was_written(make_volume, tell, tmp_path, way):
    """Each opening is as the first one in this process: none of them finds what the one before has left locked."""
    volume = make_volume(SIZE)
    more = {
        "plain": {},
        "wal": {"backend_wal_url": f"file://{tmp_path}/wal/"},
        "buffer": {"write_buffer": "16M", "write_buffer_dir": str(tmp_path / "buffer")},
        "caches": {"cache_dir": str(tmp_path / "pages"), "node_cache_config": f"LocalDisk,{tmp_path}/nodes,64M,ReuseCache"},
    }
    server, address = tell(volume, **more[way])
    server.start()
    epochs = []
    for life in range(3):
        with server.connect() as client:
            for before in range(life):
                assert client.pread(1 * MI, before * MI) == pattern(1 * MI, before)
            client.pwrite(pattern(1 * MI, life), life * MI)
            epochs.append(lease_of(volume)["epoch"])
        given_back(address)
        assert lease_of(volume)["state"] == "released"
    assert epochs == sorted(set(epochs)), "each time it was given back, and taken anew"
    said = server.log_text()
    assert "kept in memory" not in said and "ERROR" not in said, said
    # Nothing is left for another server to make good.
    server.kill()
    fresh, _ = tell(volume)
    with fresh.start().connect() as client:
        for life in range(3):
            assert client.pread(1 * MI, life * MI) == pattern(1 * MI, life)
    assert fresh.terminate() == 0


def test_of_two_servers_that_stand_by_the_one_with_the_client_has_the_volume(make_volume, tell):
    volume = make_volume(SIZE)
    first, _ = tell(volume)
    second, _ = tell(volume)
    for server in (first, second):
        server.stand_by()
    for number, (this, other) in enumerate([(first, second), (second, first), (first, second)]):
        # The other's client has gone, and a moment later the volume is free.
        client = wait_for(lambda: this.try_connect(), "the volume to be free")
        if number:
            assert client.pread(1 * MI, 0) == pattern(1 * MI, number - 1)
        assert other.try_connect() is None, "one of them has it"
        wait_for(lambda: f"pid {this.process.pid}" in other.log_text(), "the log to name the holder")
        client.pwrite(pattern(1 * MI, number), 0)
        leave(client)
    assert first.terminate() == 0 and second.terminate() == 0


@pytest.mark.s3_only
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_store_that_is_away_costs_nothing_that_was_written(make_volume, tell, proxy, comes_back):
    """A volume that cannot publish stays open, with what no flush has covered, until it can."""
    volume = make_volume(SIZE)
    server, address = tell(volume, endpoint_url=proxy.endpoint, io_timeout="2s", lease_duration="1h")
    server.start()
    data = pattern(1 * MI, 1)
    # It may have to open the volume anew, for which a busy store may take longer than io_timeout.
    client = wait_for(lambda: server.try_connect(), "a client to be served")
    client.pwrite(data, 0)
    proxy.fail(Fault("outage"))
    leave(client)
    wait_for(lambda: "is not given back" in server.log_text(), "the volume to be kept")
    assert state(address) == "open"
    if comes_back:
        with server.connect() as client:
            assert client.pread(1 * MI, 0) == data
            client.pwrite(data, 1 * MI)
            proxy.heal()
            flush_until_it_succeeds(client)
    proxy.heal()
    given_back(address)
    assert "are lost" not in server.log_text()
    server.kill()
    fresh, _ = tell(volume)
    with fresh.start().connect() as client:
        assert client.pread(1 * MI, 0) == data
        assert client.pread(1 * MI, 1 * MI) == (data if comes_back else bytes(1 * MI))


@pytest.mark.s3_only
def test_a_client_that_comes_while_the_volume_is_closed_waits_for_that(make_volume, tell, proxy):
    server, address = tell(make_volume(SIZE), endpoint_url=proxy.endpoint, lease_duration="1h", io_timeout="10m")
    server.start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        # From now on only the lease's return writes it.
        fault = proxy.fail(Fault("hang", LEASE_WRITE))
    wait_for(lambda: state(address) == "closing" and fault.hits, "the close to hang")
    assert ask(address, "/readyz").status == 200
    found = []

    def come() -> None:
        with server.connect() as late:
            found.append(late.pread(1 * MI, 0))

    coming = threading.Thread(target=come, daemon=True)
    coming.start()
    time.sleep(1)
    assert not found, "it was given a volume that is being closed"
    proxy.heal()
    wait_for(lambda: found, "the client to be served")
    coming.join()
    assert found == [pattern(1 * MI, 1)]
    assert server.terminate() == 0


@pytest.mark.s3_only
def test_what_a_server_is_asked_for_keeps_the_volume(make_volume, tell, proxy):
    server, address = tell(make_volume(SIZE), endpoint_url=proxy.endpoint, lease_duration="1h")
    control = server.directory / "control"
    server.parameters["control"] = f"unix:{control}"
    server.start()
    fault = proxy.fail(Fault("hang", r"^PUT \S+\.meta/snapshots/"))
    answers = []
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        asking = threading.Thread(
            target=lambda: answers.append(ask(control, "/v1/snapshot", "POST", {"name": "before"})), daemon=True
        )
        asking.start()
        wait_for(lambda: fault.hits, "the snapshot to be made")
    time.sleep(QUIET_S)
    assert not answers and state(address) == "open", "it was closed under what was asked for"
    proxy.heal()
    asking.join()
    assert answers[0].status == 200, answers[0].text
    given_back(address)
    # As before the first client.
    assert ask(control, "/v1/flush", "POST", {}).status == 200
    refused = ask(control, "/v1/compact", "POST", {})
    assert refused.status == 409 and "connect a client first" in refused.text
    assert server.terminate() == 0


def test_a_takeover_is_done_once(make_volume, tell):
    """What was said of the start is not done again to whoever has had the volume since."""
    volume = make_volume(SIZE)
    before, _ = tell(volume, lease_linger="off")
    with before.start().connect():
        taker, address = tell(volume, takeover="yes")
        taker.start()
    given_back(address)
    other, _ = tell(volume)
    with other.start().connect() as client:
        assert taker.try_connect() is None
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
    assert other.terminate() == 0
    client = wait_for(lambda: taker.try_connect(), "the volume to be free")
    assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
    leave(client)


def test_a_server_that_was_taken_over_serves_again(make_volume, tell):
    volume = make_volume(SIZE)
    first, address = tell(volume)
    with first.start().connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
        second, _ = tell(volume, takeover="yes")
        with second.start().connect() as other:
            other.pwrite(pattern(1 * MI, 2), 0)
    assert second.terminate() == 0
    given_back(address)
    assert not ask(address, "/status").json["problems"]
    with first.connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 2)


def test_what_was_lost_to_another_server_is_not_forgotten(make_volume, tell):
    """Who comes back to writes that were answered, and can never be published, hears of that by each flush."""
    volume = make_volume(SIZE)
    # A renewal of its lease would tell it before it has answered a write.
    first, address = tell(volume, lease_duration="1h")
    with first.start().connect() as client:
        second, _ = tell(volume, takeover="yes")
        with second.start().connect() as other:
            other.pwrite(pattern(1 * MI, 2), 0)
            # It finds that out by its write at the latest.
            with pytest.raises(nbd.Error):
                client.pwrite(pattern(1 * MI, 3), 0)
                client.flush()
    assert second.terminate() == 0
    time.sleep(QUIET_S)
    assert state(address) == "open"
    with first.connect() as client, pytest.raises(nbd.Error):
        client.flush()
