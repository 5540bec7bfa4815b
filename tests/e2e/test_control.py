"""The control socket: what a running server can be told, by whom, and what it makes of nonsense."""

import json
import os
import socket
import stat
import threading
from pathlib import Path

import nbd
import pytest

from support.model import pattern
from support.process import wait_for
from support.server import KI, MI
from support.stores import free_port
from support.endpoints import ask, page

SIZE = 64 * MI
# Nothing is published by itself.
BY_HAND = {"checkpoint_interval": "1h"}
NOBODY = 65534


@pytest.fixture
def runtime(tmp_path):
    """A runtime directory of the test's own, as XDG_RUNTIME_DIR names it. Short: a socket's path has 108 bytes."""
    directory = Path("/tmp") / f"h-{os.getpid()}-{free_port()}"
    directory.mkdir(mode=0o700)
    yield directory
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()


@pytest.fixture
def control(make_server, runtime):
    """Starts a server with a control socket in the runtime directory: `control(volume, …)`; gives both."""

    def start(volume, **parameters):
        volume.store.env = {**volume.store.env, "XDG_RUNTIME_DIR": str(runtime)}
        server = make_server(volume, **{**BY_HAND, **parameters}).start()
        return server, runtime / "hypernbd" / f"{server.process.pid}.sock"

    return start


def verb(volume, *words: str) -> str:
    """What a verb says that succeeds."""
    done = volume.cli(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_snapshot_of_now_has_what_was_only_in_memory(make_volume, make_server, control, tmp_path):
    volume = make_volume(SIZE)
    server, _ = control(volume)
    data = pattern(256 * KI, 1)
    with server.connect() as client:
        client.pwrite(data, 1 * MI)
        said = verb(volume, "snapshot", "create", volume.url, "before")
        assert "before is checkpoint 1" in said
        client.pwrite(pattern(256 * KI, 2), 1 * MI)
        copy = tmp_path / "copy"
        verb(volume, "export", volume.url, "@before", str(copy))
        assert copy.read_bytes()[1 * MI : 1 * MI + len(data)] == data
        refused = volume.cli("snapshot", "create", volume.url, "before")
        assert refused.returncode == 1 and "already" in refused.stderr
        named = volume.cli("snapshot", "create", volume.url, "first", "@1")
        assert named.returncode == 0, "a checkpoint that is named is asked for without the server"
    assert server.terminate() == 0


def test_flush_makes_durable(make_volume, control):
    volume = make_volume(SIZE)
    server, path = control(volume)
    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 1), 0)
        wait_for(lambda: page(path).value("undurable_age_seconds") > 0, "the write to be told of")
        assert "durable" in verb(volume, "control", "flush", volume.url)
        wait_for(lambda: page(path).value("undurable_age_seconds") == 0, "the write to be durable")
        client.pwrite(pattern(64 * KI, 2), 0)
        assert ask(path, "/v1/flush", "POST").json == {"is_durable": True}
    server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(64 * KI, 0) == pattern(64 * KI, 2)


def test_a_volume_grows_under_its_clients(make_volume, control):
    """Who is connected goes on as before; who connects then sees the new size. What is flushed past the old end survives a kill."""
    volume = make_volume(SIZE)
    server, path = control(volume)
    with server.connect() as client:
        client.pwrite(pattern(256 * KI, 1), SIZE - 256 * KI)
        said = verb(volume, "resize", volume.url, "--size", str(SIZE + 64 * MI))
        assert "resized" in said and "64 MiB to 128 MiB" in said, said
        assert client.get_size() == SIZE
        client.pwrite(pattern(256 * KI, 2), 0)
        client.flush()
        with server.connect() as later:
            assert later.get_size() == 2 * SIZE
            assert later.pread(64 * KI, 2 * SIZE - 64 * KI) == bytes(64 * KI)
            later.pwrite(pattern(64 * KI, 3), 2 * SIZE - 64 * KI)
            later.flush()
        assert ask(path, "/v1/status").json["volume"]["size_bytes"] == 2 * SIZE
        assert json.loads(verb(volume, "info", volume.url, "--json"))["size_bytes"] == 2 * SIZE
        answer = ask(path, "/v1/resize", "POST", {"size_bytes": 2 * SIZE})
        assert answer.json == {"size_bytes": 2 * SIZE}
        # It does not shrink under its clients, with the word for it neither.
        shrunk = volume.cli("resize", volume.url, "--size", str(SIZE), "--allow-shrink")
        assert shrunk.returncode == 1 and f"pid {server.process.pid}" in shrunk.stderr, shrunk.stderr
    server.kill()
    server.start()
    with server.connect() as client:
        assert client.get_size() == 2 * SIZE
        assert client.pread(256 * KI, 0) == pattern(256 * KI, 2)
        assert client.pread(256 * KI, SIZE - 256 * KI) == pattern(256 * KI, 1)
        assert client.pread(64 * KI, 2 * SIZE - 64 * KI) == pattern(64 * KI, 3)
    assert server.terminate() == 0


def test_a_server_ends_when_its_last_client_has_gone(make_volume, control):
    volume = make_volume(SIZE)
    server, path = control(volume)
    first, second = server.handle(), server.handle()
    first.pwrite(pattern(64 * KI, 1), 0)
    # The client that tried whether the server serves may not have left yet.
    wait_for(lambda: ask(path, "/v1/status").json["connections"] == 2, "both clients to be there, and no other")
    said = verb(volume, "control", "shutdown", "--when-idle", str(server.socket))
    assert "2 connections" in said
    first.shutdown()
    second.pwrite(pattern(64 * KI, 2), 1 * MI)
    assert server.is_running() and ask(path, "/v1/status").json["state"] == "open"
    second.shutdown()
    assert server.wait() == 0
    assert not path.exists()
    server.start()
    with server.connect() as client:
        assert client.pread(64 * KI, 1 * MI) == pattern(64 * KI, 2), "all of it was published"


def test_a_server_without_clients_ends_at_once(make_volume, control):
    volume = make_volume(SIZE)
    server, path = control(volume)
    wait_for(lambda: ask(path, "/v1/status").json["connections"] == 0, "the client to be gone")
    verb(volume, "control", "shutdown", "--when-idle", volume.url)
    assert server.wait() == 0


def test_what_may_change_is_set(make_volume, control):
    volume = make_volume(SIZE)
    server, path = control(volume)
    with server.connect() as client:
        assert "DEBUG" not in server.log_text()
        verb(volume, "control", "set", volume.url, "--log", "debug", "--checkpoint-interval", "100ms")
        client.pwrite(pattern(64 * KI, 1), 0)
        wait_for(lambda: page(path).value("publish_duration_seconds_count") == 1, "a checkpoint, unasked")
        assert "DEBUG" in server.log_text()
        verb(volume, "control", "set", volume.url, "--log", "warn")
        until = len(server.log_text())
        client.pwrite(pattern(64 * KI, 2), 0)
        wait_for(lambda: page(path).value("publish_duration_seconds_count") == 2, "another")
        assert "DEBUG" not in server.log_text()[until:]
        for wrong in (["--checkpoint-interval", "1ms"], ["--log", "no=such=thing"], []):
            done = volume.cli("control", "set", volume.url, *wrong)
            assert done.returncode != 0 and done.stderr, wrong
        # All or nothing.
        both = ["--log", "debug", "--checkpoint-interval", "soon"]
        assert volume.cli("control", "set", volume.url, *both).returncode == 1
        until = len(server.log_text())
        client.pwrite(pattern(64 * KI, 3), 0)
        wait_for(lambda: page(path).value("publish_duration_seconds_count") == 3, "another")
        assert "DEBUG" not in server.log_text()[until:]


def test_the_lease_names_the_socket(make_volume, control):
    volume = make_volume(SIZE)
    server, path = control(volume)
    with server.connect():
        lease = json.loads(verb(volume, "info", volume.url, "--json"))["lease"]
        assert lease["control"] == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        for named in (volume.url, str(path), str(server.socket)):
            status = json.loads(verb(volume, "stats", named, "--json"))
            assert status["url"] == volume.url and status["pid"] == server.process.pid
        text = verb(volume, "stats", volume.url)
        assert volume.url in text and "write buffer" in text
    assert server.terminate() == 0
    gone = volume.cli("stats", volume.url)
    assert gone.returncode == 1 and "no server holds" in gone.stderr


@pytest.mark.file_only
def test_stats_by_the_address_of_the_metrics(make_volume, control):
    volume = make_volume(SIZE)
    address = f"127.0.0.1:{free_port()}"
    server, _ = control(volume, metrics=address, control="off")
    with server.connect():
        status = json.loads(verb(volume, "stats", f"http://{address}", "--json"))
        assert status["pid"] == server.process.pid
        for named, why in ((volume.url, "names no control socket"), (str(server.socket), "is no Hypernbd server")):
            refused = volume.cli("stats", named)
            assert refused.returncode == 1 and why in refused.stderr, refused.stderr
        told = volume.cli("control", "flush", f"http://{address}")
        assert told.returncode == 1, "nothing can be told there"
    nobody = volume.cli("stats", f"http://127.0.0.1:{free_port()}")
    assert nobody.returncode == 1 and "no server answers" in nobody.stderr


@pytest.mark.file_only
def test_nothing_can_be_told_where_metrics_are(make_volume, control):
    volume = make_volume(SIZE)
    address = f"127.0.0.1:{free_port()}"
    server, _ = control(volume, metrics=address)
    for path in ("flush", "snapshot", "compact", "retention", "shutdown", "set"):
        assert ask(address, f"/v1/{path}", "POST", {}).status == 405
        assert ask(address, f"/v1/{path}").status == 404
    assert server.is_running()


@pytest.mark.file_only
def test_other_users_are_hung_up_on(make_volume, control, runtime):
    """Whatever the socket's mode is: the kernel says who connects."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    volume = make_volume(SIZE)
    server, path = control(volume)
    runtime.chmod(0o755)
    path.parent.chmod(0o755)
    path.chmod(0o666)

    def as_nobody() -> bytes:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(path))
            try:
                client.sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
                return client.recv(4096)
            except OSError:
                return b""

    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, b"<" + as_nobody() + b">")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 4096) == b"<>"
    # It is hung up on a moment before that is said.
    wait_for(lambda: "another user" in server.log_text(), "the refusal to be said")
    assert ask(path, "/v1/status").status == 200


@pytest.mark.file_only
def test_nonsense_is_refused(make_volume, control):
    volume = make_volume(SIZE)
    server, path = control(volume)
    for where, method, body, status in (
        ("/v1/flush", "GET", None, 405),
        ("/v1/flush", "POST", {"now": True}, 400),
        ("/v1/snapshot", "POST", {"name": "../../etc"}, 400),
        ("/v1/snapshot", "POST", {"name": "x" * 70_000}, 413),
        ("/v1/shutdown", "POST", {"when_idle": 1}, 400),
        ("/v1/set", "POST", {}, 400),
        ("/v1/set", "POST", {"cache_memory": "0"}, 400),
        ("/v1/resize", "POST", {"size": "1T"}, 400),
        ("/v1/resize", "POST", {"size_bytes": SIZE // 2}, 400),
        ("/v1/resize", "POST", {"size_bytes": 1 << 63}, 400),
        ("/v1/compact", "POST", {"rate": "1M"}, 400),
        ("/v1/flatten", "POST", {}, 400),
        ("/v1/flatten", "POST", {"rate": "1M"}, 400),
        ("/v1/retention", "POST", {"only_if_automatic": "no"}, 400),
        ("/v1/format", "POST", {}, 404),
        ("/v2/flush", "POST", {}, 405),
    ):
        answer = ask(path, where, method, body)
        assert answer.status == status, (where, body, answer.text)
        if status not in (404, 405):
            assert answer.json["error"], where
    for junk in (b"\0" * 4096, b"POST /v1/flush HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"A: b\r\n" * 100_000):
        with socket.socket(socket.AF_UNIX) as hostile:
            hostile.settimeout(20)
            hostile.connect(str(path))
            try:
                hostile.sendall(junk)
                hostile.recv(4096)
            except OSError:
                pass
    with server.connect() as client:
        client.pwrite(b"x" * 4096, 0)
    assert ask(path, "/v1/status").json["state"] == "open"


def test_a_killed_server_leaves_nothing_that_stays(make_volume, control):
    volume = make_volume(SIZE)
    server, path = control(volume)
    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 1), 0)
        client.flush()
    server.kill()
    assert path.exists()
    warned = volume.cli("snapshot", "create", volume.url, "after")
    assert warned.returncode == 0, "a server that is gone holds nobody up"
    assert "not in the snapshot" in warned.stderr
    server, other = control(volume)
    assert other != path and other.exists() and not path.exists()


@pytest.mark.file_only
def test_no_directory_is_no_failure(make_volume, make_server):
    volume = make_volume(SIZE)
    server = make_server(volume, env={"XDG_RUNTIME_DIR": "/nonexistent"}).start()
    assert "there is no control socket" in server.log_text()
    with server.connect() as client:
        client.pwrite(b"x" * 4096, 0)
    assert server.terminate() == 0


def test_clients_go_on_while_it_is_told(make_volume, control):
    """Snapshots, flushes and questions from several sides while clients write."""
    volume = make_volume(SIZE)
    server, path = control(volume)
    failures = []

    def tell(number: int) -> None:
        for turn in range(5):
            for answer in (
                ask(path, "/v1/flush", "POST"),
                ask(path, "/v1/snapshot", "POST", {"name": f"s{number}-{turn}"}),
                ask(path, "/metrics"),
            ):
                if answer.status != 200:
                    failures.append(answer.text)

    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 1), 0)
        client.flush()
    tellers = [threading.Thread(target=tell, args=(number,)) for number in range(3)]
    for teller in tellers:
        teller.start()
    with server.connect() as client:
        turn = 0
        while any(teller.is_alive() for teller in tellers):
            client.pwrite(pattern(4 * KI, turn), turn % 64 * 64 * KI)
            turn += 1
    assert not failures
    names = json.loads(verb(volume, "snapshot", "list", volume.url, "--json"))
    assert len(names) == 15
