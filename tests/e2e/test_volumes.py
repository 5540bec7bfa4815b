"""One server for all volumes below a URL, each an export by its name."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbd
import pytest

from support.endpoints import ask, page
from support.faulty import Fault
from support.lease import lease_of
from support.model import pattern
from support.others import S3Objects
from support.past import verb
from support.process import wait_for
from support.server import KI, MI, Volume, create_volume, leave
from support.stores import free_port

SIZE = 8 * MI
HUNDRED = 100
AT_ONCE = 8
QUIET_S = 3
# A lease that is renewed within that, and whose return outlasts a store that stands still for a while.
RENEWED = "8s"


@pytest.fixture
def below(store):
    """Makes volumes below one URL: `below("name"…)`."""

    def make(*names: str) -> list[Volume]:
        return [create_volume(store, SIZE, 64 * KI, f"all/{name}") for name in names]

    return make


@pytest.fixture
def serve_all(store, make_server):
    """Starts a server of all volumes below that URL: `serve_all(parameter=value…)`."""

    def start(**parameters):
        above = Volume(store.url("all"), store)
        return make_server(above, volumes=above.url, **{"lease_linger": "1s", **parameters}).stand_by()

    return start


@contextlib.contextmanager
def client_of(server, export: str):
    """A client of an export, once it is served."""
    client = wait_for(lambda: server.try_connect(export), f"{export} to be served")
    try:
        yield client
    finally:
        leave(client)


def exports(server) -> set[str]:
    """The names that the server lists."""
    client, found = nbd.NBD(), set()
    client.set_opt_mode(True)
    client.connect_unix(str(server.socket))
    client.opt_list(lambda name, description: found.add(name))
    client.opt_abort()
    return found


def states(address) -> dict[str, str]:
    """What the server says of each volume that is open."""
    return {volume["name"]: volume["state"] for volume in ask(address, "/status").json.get("volumes", [])}


def problems(address) -> str:
    """What the server says is wrong."""
    return "\n".join(ask(address, "/status").json["problems"])


def test_each_volume_is_an_export_by_its_name(below, serve_all):
    one, _ = below("one", "two")
    server = serve_all()
    assert exports(server) == {"one", "two"}
    with client_of(server, "one") as first, client_of(server, "two") as second:
        first.pwrite(pattern(1 * MI, 1), 0)
        second.pwrite(pattern(1 * MI, 2), 0)
        for client in (first, second):
            client.flush()
        # Once more of the same, as a client with several connections has it.
        with client_of(server, "one") as again:
            assert again.pread(1 * MI, 0) == pattern(1 * MI, 1)
        assert second.pread(1 * MI, 0) == pattern(1 * MI, 2)
    wait_for(lambda: lease_of(one)["state"] == "released", "the volume to be given back")
    verb(one, "snapshot", "create", one.url, "before")
    with client_of(server, "one") as first:
        first.pwrite(pattern(1 * MI, 3), 0)
        first.flush()
        for name in ("one@before", "one/@before"):
            with client_of(server, name) as past:
                assert past.pread(1 * MI, 0) == pattern(1 * MI, 1)
                assert past.is_read_only()
    for name, why in [
        ("", "many volumes"),
        ("@before", "many volumes"),
        ("three", "all/three"),
        ("one@never", "no checkpoint"),
        ("one/two", "no name of a volume"),
        ("..", "no name of a volume"),
        ("one.meta", "no name of a volume"),
    ]:
        assert server.try_connect(name) is None, name
        wait_for(lambda: why in server.log_text(), f"the log to say why {name!r} is refused")
    # One that is made later is there, too.
    below("three")
    assert exports(server) == {"one", "two", "three"}
    with client_of(server, "three") as client:
        assert client.pread(1 * KI, 0) == bytes(1 * KI)
    assert server.terminate() == 0


@pytest.mark.s3_only
def test_what_is_wrong_with_one_volume_harms_no_other(below, serve_all, make_server):
    damaged, held, _ = below("damaged", "held", "whole")
    S3Objects(damaged).put("inode", b"nothing of the kind")
    holder = make_server(held).start()
    server = serve_all()
    assert exports(server) == {"damaged", "held", "whole"}
    with holder.connect() as elsewhere, client_of(server, "whole") as client:
        elsewhere.pwrite(pattern(1 * MI, 1), 0)
        client.pwrite(pattern(1 * MI, 2), 0)
        assert server.try_connect("damaged") is None
        assert server.try_connect("held") is None
        wait_for(lambda: f"pid {holder.process.pid}" in server.log_text(), "the log to name the holder")
        client.flush()
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 2)
    assert holder.terminate() == 0
    with client_of(server, "held") as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
    assert server.terminate() == 0


@pytest.mark.file_only
def test_a_hundred_volumes(below, serve_all):
    names = [f"disk-{number}" for number in range(HUNDRED)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(below, names))
    server = serve_all(volumes_open=str(AT_ONCE), write_buffer="128M", cache_memory="128M", lease_linger="1h")
    assert exports(server) == set(names)

    def write(number: int) -> None:
        with client_of(server, names[number]) as client:
            client.pwrite(pattern(256 * KI, number), 1 * MI)

    def read(number: int) -> bool:
        with client_of(server, names[number]) as client:
            return client.pread(256 * KI, 1 * MI) == pattern(256 * KI, number)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(write, range(HUNDRED)))
        assert all(pool.map(read, range(HUNDRED)))
    assert server.terminate() == 0


@pytest.mark.file_only
def test_a_volume_that_nobody_uses_makes_room_for_another(below, serve_all):
    below("one", "two", "three")
    address = f"127.0.0.1:{free_port()}"
    server = serve_all(volumes_open="2", lease_linger="1h", metrics=address)
    with client_of(server, "one") as first:
        with client_of(server, "two") as second:
            second.pwrite(pattern(1 * MI, 2), 0)
            limits = [volume["volume"]["buffer"]["limit_bytes"] for volume in ask(address, "/status").json["volumes"]]
            assert limits == [256 * MI, 256 * MI], "half of what the server has"
            assert server.try_connect("three") is None
            wait_for(lambda: "(volumes_open)" in server.log_text(), "the log to say why")
        # Long before lease_linger.
        with client_of(server, "three") as third:
            wait_for(lambda: states(address) == {"one": "open", "three": "open"}, "the other one to be closed")
            assert third.pread(1 * KI, 0) == bytes(1 * KI)
            first.pwrite(pattern(1 * MI, 1), 0)
    with client_of(server, "two") as second:
        assert second.pread(1 * MI, 0) == pattern(1 * MI, 2)
    assert server.terminate() == 0


@pytest.mark.file_only
def test_one_volume_that_was_taken_over_leaves_the_server_ready(below, serve_all, make_server):
    one, _ = below("one", "two")
    address = f"127.0.0.1:{free_port()}"
    server = serve_all(lease_duration=RENEWED, metrics=address)
    with client_of(server, "one"):
        other = make_server(one, takeover="yes").start()
        with other.connect():
            wait_for(lambda: page(address).value("fenced") == 1, "the server to know that it was taken over")
            assert page(address).value("ready") == 1 and ask(address, "/readyz").status == 200
            assert "of one" in ask(address, "/status").json["problems"][0]
    other.terminate()


@pytest.mark.s3_only
def test_a_volume_that_cannot_be_given_back_keeps_no_other_from_making_room(below, serve_all, proxy):
    below("one", "two", "three")
    address = f"127.0.0.1:{free_port()}"
    server = serve_all(
        endpoint_url=proxy.endpoint, volumes_open="2", lease_linger="1h", io_timeout="2s", metrics=address
    )
    with client_of(server, "two") as second:
        second.pwrite(pattern(1 * MI, 2), 0)
        with client_of(server, "one") as first:
            first.pwrite(pattern(1 * MI, 1), 0)
            proxy.fail(Fault("outage", r"^(PUT|POST) \S+/one/"))
        wait_for(lambda: ask(address, "/status").json["connections"] == 1, "the first volume to be left before the second")
    # The first one was left longest ago, and cannot publish what was written.
    with client_of(server, "three") as third:
        assert third.pread(1 * KI, 0) == bytes(1 * KI)
        wait_for(lambda: "one is not given back" in server.log_text(), "the log to say what stays open")
        # That the other one is opened, and can publish, says nothing of it.
        wait_for(lambda: "of one cannot be published" in problems(address), "the server to say which")
        proxy.heal()
        with client_of(server, "one") as first:
            assert first.pread(1 * MI, 0) == pattern(1 * MI, 1)
    with client_of(server, "two") as second:
        assert second.pread(1 * MI, 0) == pattern(1 * MI, 2)
    assert server.terminate() == 0


@pytest.mark.s3_only
def test_a_server_of_many_without_clients_asks_nothing_of_the_store(below, serve_all, proxy):
    one, _ = below("one", "two")
    address = f"127.0.0.1:{free_port()}"
    server = serve_all(endpoint_url=proxy.endpoint, lease_duration=RENEWED, retention_interval="1s", metrics=address)
    for name in ("one", "two"):
        with client_of(server, name) as client:
            client.pwrite(pattern(1 * MI, 1), 0)
            assert states(address)[name] == "open"
            numbers = page(address)
            assert numbers.value("volume_open") == 1 and numbers.value("lease_held") == 1
    wait_for(lambda: not states(address), "the volumes to be given back")
    assert ask(address, "/status").json["state"] == "waiting" and ask(address, "/readyz").status == 200
    assert lease_of(one)["state"] == "released"

    def is_quiet() -> bool:
        before = len(proxy.requests)
        time.sleep(QUIET_S)
        return len(proxy.requests) == before

    # What an opening has begun by the side may have been under way, and held up for as long.
    wait_for(lambda: is_quiet() and is_quiet(), "the last request")


@pytest.mark.file_only
def test_the_control_socket_asks_which_volume(below, serve_all):
    one, _ = below("one", "two")
    path = Path(f"/tmp/hypernbd-volumes-{free_port()}")
    server = serve_all(control=f"unix:{path}", checkpoint_interval="1h")
    with client_of(server, "one") as client:
        assert lease_of(one).get("control") is None, "who finds it there does not say which volume"
        client.pwrite(pattern(1 * MI, 1), 0)
        for query, why in [("", "many volumes"), ("?volume=a/b", "no name of a volume"), ("?name=one", "?volume=NAME")]:
            refused = ask(path, f"/v1/flush{query}", "POST", {})
            assert refused.status == 400 and why in refused.text, refused.text
        named = ask(path, "/v1/snapshot?volume=one", "POST", {"name": "now"})
        assert named.status == 200, named.text
        with client_of(server, "one@now") as past:
            assert past.pread(1 * MI, 0) == pattern(1 * MI, 1)
        # As of a server of one before its first client.
        assert ask(path, "/v1/compact?volume=two", "POST", {}).status == 409
        assert ask(path, "/v1/set", "POST", {"log": "info"}).status == 200
    assert ask(path, "/v1/shutdown", "POST", {"when_idle": True}).status == 200
    assert server.wait() == 0


@pytest.mark.file_only
def test_what_is_wrong_with_the_prefix_is_said_at_the_start(store, make_server):
    above = Volume(store.url("none"), store)
    server = make_server(above, volumes=above.url)
    server.spawn()
    assert server.wait() != 0 and above.url in server.log_text()
    server = make_server(above, volumes=above.url, volumes_open="1000")
    server.spawn()
    assert server.wait() != 0 and "volumes_open" in server.log_text()
