"""`hypernbd resize` of a volume whose server can be asked through the store alone, as from another machine: it grows, or nothing comes of it."""

import signal
import time

import pytest

from support.lease import lease_of
from support.model import pattern
from support.process import spawn, wait_for
from support.server import CLI, KI, MI

SIZE = 64 * MI
# Without a control socket the command line has to go by the store, on the same machine, too.
ELSEWHERE = {"control": "off", "lease_duration": "3s"}


def growth(volume) -> dict | None:
    """What the lease says of a request to grow."""
    return lease_of(volume).get("growth")


def stage(volume):
    """How far that is: a word, or an object with one key."""
    return (growth(volume) or {}).get("stage")


def asking(volume, log, wait: str):
    """A `hypernbd resize` to twice the size that has asked, and waits."""
    options = volume.store.cli_options
    command = [str(CLI), "resize", volume.url, "--size", str(2 * SIZE), "--wait", wait, *options]
    process = spawn(command, log, env=volume.store.env, limit_s=600)
    wait_for(lambda: stage(volume) == "asked", "the request to be stored")
    assert process.poll() is None, log.read_text()
    return process


@pytest.fixture
def stopped(make_volume, make_server):
    """A volume, and its server, which was stopped while a client was connected."""
    volume = make_volume(SIZE)
    server = make_server(volume, **ELSEWHERE).start()
    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 1), 0)
        client.flush()
        server.process.send_signal(signal.SIGSTOP)
        yield volume, server
        server.process.send_signal(signal.SIGCONT)


def goes_on(volume, server) -> None:
    """Lets a server that was stopped go on, and waits until it has renewed its lease a few times. It must have lost nothing."""
    before = lease_of(volume)
    server.process.send_signal(signal.SIGCONT)
    wait_for(lambda: lease_of(volume)["renewals"] >= before["renewals"] + 3, "the server to renew its lease")
    after = lease_of(volume)
    assert (after["token"], after["epoch"], after["state"]) == (before["token"], before["epoch"], "held")
    assert "fenced" not in server.log_text(), server.log_text()


def size_of_new_client(server) -> int:
    with server.connect() as client:
        return client.get_size()


@pytest.mark.parametrize("wal", [{}, {"backend_wal_url": "auto"}], ids=["no log", "log"])
def test_a_volume_grows_under_a_server_elsewhere(make_volume, make_server, wal):
    volume = make_volume(SIZE)
    server = make_server(volume, **ELSEWHERE, **wal).start()
    with server.connect() as client:
        client.pwrite(pattern(256 * KI, 1), SIZE - 256 * KI)
        before = lease_of(volume)
        resized = volume.cli("resize", volume.url, "--size", str(2 * SIZE))
        assert resized.returncode == 0, resized.stderr
        assert "64 MiB to 128 MiB" in resized.stdout, resized.stdout
        assert client.get_size() == SIZE, "who is connected goes on as before"
        client.pwrite(pattern(256 * KI, 2), 0)
        client.flush()
        with server.connect() as later:
            assert later.get_size() == 2 * SIZE
            later.pwrite(pattern(64 * KI, 3), 2 * SIZE - 64 * KI)
            later.flush()
        after = lease_of(volume)
        assert (after["token"], after["epoch"]) == (before["token"], before["epoch"]), "the lease is still the server's own"
        # A smaller size is refused as ever, and a larger one goes again.
        shrunk = volume.cli("resize", volume.url, "--size", str(SIZE), "--allow-shrink")
        # By its lease, or by the log, which is looked at first.
        refused = [f"pid {server.process.pid}", "may hold flushed writes"]
        assert shrunk.returncode != 0 and any(words in shrunk.stderr for words in refused), shrunk.stderr
        again = volume.cli("resize", volume.url, "--size", str(3 * SIZE))
        assert again.returncode == 0, again.stderr
        assert "asked to grow" not in volume.cli("info", volume.url).stdout
    assert "fenced" not in server.log_text(), server.log_text()
    server.kill()
    server.start()
    with server.connect() as client:
        assert client.get_size() == 3 * SIZE
        assert client.pread(256 * KI, 0) == pattern(256 * KI, 2)
        assert client.pread(64 * KI, 2 * SIZE - 64 * KI) == pattern(64 * KI, 3)
    assert server.terminate() == 0


def test_who_stops_the_command_takes_the_request_back(stopped, tmp_path):
    volume, server = stopped
    command = asking(volume, tmp_path / "log", "1h")
    info = volume.cli("info", volume.url).stdout
    assert "asked to grow" in info and "128 MiB" in info, info
    second = volume.cli("resize", volume.url, "--size", str(4 * SIZE))
    assert second.returncode != 0 and "has asked for 128 MiB already" in second.stderr, second.stderr
    command.send_signal(signal.SIGINT)
    assert command.wait(timeout=300) != 0
    assert "not asked any more" in (tmp_path / "log").read_text()
    assert stage(volume) == "withdrawn"
    goes_on(volume, server)
    assert size_of_new_client(server) == SIZE


def test_a_server_that_does_not_answer_is_said_so_and_not_asked_any_more(stopped):
    volume, server = stopped
    resized = volume.cli("resize", volume.url, "--size", str(2 * SIZE), "--wait", "1s")
    assert resized.returncode != 0, resized.stdout
    assert "did not answer within" in resized.stderr and f"pid {server.process.pid}" in resized.stderr, resized.stderr
    assert stage(volume) == "withdrawn"
    goes_on(volume, server)
    assert size_of_new_client(server) == SIZE


def test_what_a_killed_command_asked_for_does_not_come_true_later(stopped, tmp_path):
    volume, server = stopped
    # Long enough to be killed meanwhile.
    command = asking(volume, tmp_path / "log", "45s")
    command.kill()
    command.wait(timeout=300)
    asked = growth(volume)
    assert asked["stage"] == "asked", "it was killed too late; this test shows nothing"
    # By the store's clock, which counts in seconds.
    until = (asked["asked_ms"] + asked["valid_ms"]) / 1000 + 3
    time.sleep(max(0, until - time.time()))
    goes_on(volume, server)
    # It renews its lease while it looks how old the request is.
    wait_for(lambda: stage(volume) not in ("asked", "taken"), "the server to answer the request")
    assert "too old" in stage(volume)["failed"]["why"]
    assert size_of_new_client(server) == SIZE
