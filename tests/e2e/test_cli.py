"""The command line: the life of a volume, and the lines of the first README as they are written there."""

import json
import os
import signal
import subprocess

import nbd
import pytest

from support.model import pattern
from support.process import check, run, spawn, wait_for
from support.terminal import on_a_terminal
from support.server import CLI, GI, KI, MI, PLUGIN, TI, Volume, create_volume
from support.stores import free_port


@pytest.fixture
def volume(store) -> Volume:
    """A volume that does not exist yet."""
    return Volume(store.url("by-hand"), store)


def info(volume: Volume) -> dict:
    done = volume.cli("info", volume.url, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def must(volume: Volume, *arguments: str) -> str:
    done = volume.cli(*arguments)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def must_fail(volume: Volume, *arguments: str) -> str:
    """A command that is refused: nothing changes on the store, and stderr says why."""
    before = volume.store.objects()
    done = volume.cli(*arguments)
    assert done.returncode != 0, f"{arguments} succeeded: {done.stdout}"
    assert "panicked" not in done.stderr
    assert volume.store.objects() == before
    return done.stderr


def test_create_and_info(volume):
    must(volume, "create", volume.url, "--size", "10T", "--block-size", "128K")
    facts = info(volume)
    assert facts["size_bytes"] == 10 * TI
    assert facts["block_size_bytes"] == 128 * KI
    assert facts["url"] == volume.url
    assert facts["durability"]
    table = must(volume, "info", volume.url)
    assert volume.url in table and "10T" in table.replace(" ", "")


def test_create_never_overwrites(volume):
    must(volume, "create", volume.url, "--size", "1G")
    error = must_fail(volume, "create", volume.url, "--size", "2G")
    assert volume.url in error
    assert info(volume)["size_bytes"] == 1 * GI


@pytest.mark.parametrize(
    "arguments",
    [
        ("--size", "10X"),
        ("--size", "-5"),
        ("--size", "1G", "--block-size", "1000"),
        ("--size", "1G", "--block-size", "1K"),
        (),
    ],
)
def test_create_refuses_nonsense(volume, arguments):
    assert must_fail(volume, "create", volume.url, *arguments)


def test_commands_on_a_missing_volume(volume):
    for arguments in (("info",), ("resize", "--size", "2G"), ("delete", "--yes"), ("serve",)):
        verb, *rest = arguments
        assert volume.url in must_fail(volume, verb, volume.url, *rest)


def test_resize_is_seen_on_reconnect(volume, make_server):
    must(volume, "create", volume.url, "--size", "64M")
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 63 * MI)
        client.flush()
    assert server.terminate() == 0
    must(volume, "resize", volume.url, "--size", "128M")
    assert info(volume)["size_bytes"] == 128 * MI
    server.start()
    with server.connect() as client:
        assert client.get_size() == 128 * MI
        assert client.pread(1 * MI, 63 * MI) == pattern(1 * MI, 1)
        assert client.pread(1 * MI, 100 * MI) == bytes(1 * MI)
        client.pwrite(b"end", 128 * MI - 3)
        client.flush()
        assert client.pread(3, 128 * MI - 3) == b"end"


def test_shrinking_needs_a_clear_word(volume):
    must(volume, "create", volume.url, "--size", "64M")
    error = must_fail(volume, "resize", volume.url, "--size", "32M")
    assert "--" in error, "the refusal names the option that allows it"
    assert info(volume)["size_bytes"] == 64 * MI


def test_delete_asks_and_names_what_it_destroys(volume, tmp_path):
    must(volume, "create", volume.url, "--size", "64M")
    refused = must_fail(volume, "delete", volume.url)  # no terminal, no --yes
    assert "--yes" in refused
    answer, shown = on_a_terminal(volume, ["delete", volume.url], "n\n")
    assert answer != 0 and volume.url in shown
    with open(tmp_path / "output", "w+") as output:
        answer, shown = on_a_terminal(volume, ["delete", volume.url], "n\n", output=output)
        assert answer != 0 and "Type yes" in shown, "the question is seen all the same"
        assert "Type yes" not in (tmp_path / "output").read_text()
    assert info(volume)["size_bytes"] == 64 * MI
    must(volume, "delete", volume.url, "--yes")
    assert volume.cli("info", volume.url).returncode != 0
    assert volume.store.objects_of_volumes() == set()


def test_a_deleted_volume_can_be_made_again(volume, make_server):
    must(volume, "create", volume.url, "--size", "64M")
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(b"old data", 0)
        client.flush()
    assert server.terminate() == 0
    must(volume, "delete", volume.url, "--yes")
    must(volume, "create", volume.url, "--size", "64M")
    server.start()
    with server.connect() as client:
        assert client.pread(8, 0) == bytes(8)


def test_the_lines_of_the_first_readme(volume, make_server):
    """`file create-opt`, `file set-len`, serving with RUST_LOG=info, `file delete`."""
    must(volume, "file", "create-opt", "--data-block-size", "524288", volume.url)
    assert info(volume)["size_bytes"] == 0
    must(volume, "file", "set-len", "--size", "10000000000000", volume.url)
    facts = info(volume)
    assert facts["size_bytes"] == 10_000_000_000_000
    assert facts["block_size_bytes"] == 524288
    server = make_server(volume).start()
    with server.connect() as client:
        assert client.get_size() == 10_000_000_000_000
        client.pwrite(b"here", 9_999_999_999_996)
        client.flush()
        assert client.pread(4, 9_999_999_999_996) == b"here"
    assert server.terminate() == 0
    must(volume, "file", "delete", volume.url)  # asks only on a terminal
    assert volume.cli("info", volume.url).returncode != 0


@pytest.mark.file_only
def test_completions(volume):
    for shell in ("bash", "zsh", "fish"):
        script = check(CLI, "completions", shell)
        assert "hypernbd" in script and "resize" in script
    check("bash", "-n", "/dev/stdin", stdin=check(CLI, "completions", "bash"))


@pytest.mark.file_only
def test_help_and_version():
    text = check(CLI, "--help")
    for verb in ("create", "serve", "info", "resize", "delete", "import", "export", "completions", "file"):
        assert verb in text
    assert "0." in check(CLI, "--version")


class ServedByHand:
    """`hypernbd serve` in the background."""

    def __init__(self, volume: Volume, nbdkit: str, directory, *arguments: str):
        self.log = directory / "serve.log"
        self.process = spawn(
            [str(CLI), "serve", volume.url, *arguments, *volume.store.cli_options],
            self.log,
            env={**volume.store.env, "NBDKIT": nbdkit, "HYPERNBD_PLUGIN": str(PLUGIN), "RUST_LOG": "info"},
            limit_s=120,
        )

    def connect(self, uri: str) -> nbd.NBD:
        def try_to_connect():
            assert self.process.poll() is None, self.log.read_text()
            client = nbd.NBD()
            try:
                client.connect_uri(uri)
                return client
            except nbd.Error:
                return None

        return wait_for(try_to_connect, "`hypernbd serve` to serve")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


@pytest.fixture
def serve_by_hand(nbdkit, tmp_path):
    """Runs `hypernbd serve`, ended with the test."""
    running = []

    def start(volume: Volume, *arguments: str) -> ServedByHand:
        served = ServedByHand(volume, nbdkit, tmp_path, *arguments)
        running.append(served)
        return served

    yield start
    for served in running:
        served.end()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_serve_on_a_unix_socket(volume, serve_by_hand, make_server, end):
    """Prints how to connect, passes the signal on, and its end is the server's orderly end."""
    must(volume, "create", volume.url, "--size", "64M")
    socket = make_server(volume).directory / "by-hand"
    served = serve_by_hand(volume, "--socket", str(socket))
    client = served.connect(f"nbd+unix:///?socket={socket}")
    client.pwrite(pattern(1 * MI, 7), 5)
    client.shutdown()
    for word in ("nbd-client", "qemu", "nbdcopy", "nbdfuse", str(socket)):
        wait_for(lambda: word in served.log.read_text(), f"a line with {word}")
    served.process.send_signal(end)
    assert served.process.wait(timeout=60) == 0, served.log.read_text()
    server = make_server(volume).start()
    with server.connect() as again:
        assert again.pread(1 * MI, 5) == pattern(1 * MI, 7)


@pytest.mark.file_only
def test_serve_on_tcp(volume, serve_by_hand):
    must(volume, "create", volume.url, "--size", "64M")
    port = free_port()
    served = serve_by_hand(volume, "--port", str(port))
    client = served.connect(f"nbd://127.0.0.1:{port}")
    assert client.get_size() == 64 * MI
    client.shutdown()
    wait_for(lambda: f"127.0.0.1:{port}" in served.log.read_text(), "the lines to connect with")


@pytest.mark.file_only
def test_kill_9_of_serve_leaves_no_server_behind(volume, serve_by_hand, make_server):
    """The next `hypernbd serve` must not meet an orphan on its volume."""
    must(volume, "create", volume.url, "--size", "64M")
    socket = make_server(volume).directory / "by-hand"
    served = serve_by_hand(volume, "--socket", str(socket))
    client = served.connect(f"nbd+unix:///?socket={socket}")
    served.process.kill()
    served.process.wait()

    def closed() -> bool:
        try:
            client.pread(1, 0)
            return False
        except nbd.Error:
            return True

    wait_for(closed, "nbdkit to end with `hypernbd serve`")


def test_output_that_cannot_be_written(volume):
    """A reader that has gone is no failure; a full disk is, and neither is a crash."""
    must(volume, "create", volume.url, "--size", "1G")
    for arguments in (["info", volume.url], ["info", volume.url, "--json"], ["completions", "bash"]):
        read_end, write_end = os.pipe()
        os.close(read_end)
        with os.fdopen(write_end, "w") as gone, open("/dev/full", "w") as full:
            for out, may_succeed in ((gone, True), (full, False)):
                command = [CLI, *arguments, *volume.store.cli_options]
                env = {**os.environ, **volume.store.env}
                done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, env=env, timeout=60)
                assert "panicked" not in done.stderr, arguments
                assert (done.returncode == 0) == may_succeed, (arguments, done.stderr)


def test_no_volume_is_made_inside_another_one(store):
    """What removes or copies the outer one would take it along."""
    outer = create_volume(store, 64 * MI, 4 * KI, "outer")
    for inner in (store.url("outer/inner"), store.url("outer/a/b")):
        refused = Volume(inner, store, 64 * MI, 4 * KI).cli("create", inner, "--size", "64M")
        assert refused.returncode != 0
        assert f"inside the volume at {outer.url}" in refused.stderr, refused.stderr
    create_volume(store, 64 * MI, 4 * KI, "outer-beside")
    assert outer.cli("delete", outer.url, "--yes").returncode == 0


def test_sizes_that_clients_see_otherwise_are_told(store):
    volume = Volume(store.url("odd"), store, 1, 4 * KI)
    refused = volume.cli("create", volume.url, "--size", "0")
    assert refused.returncode != 0 and "0 bytes" in refused.stderr
    huge = volume.cli("create", volume.url, "--size", "9E")
    assert huge.returncode != 0 and "--size 7E" in huge.stderr, huge.stderr
    for size, words in ((1000001, ["create"]), (1000003, ["resize"]), (1000005, ["file", "set-len"])):
        odd = volume.cli(*words, volume.url, "--size", str(size))
        assert odd.returncode == 0 and "no multiple of 512" in odd.stderr, odd.stderr
    emptied = volume.cli("resize", volume.url, "--size", "0", "--allow-shrink")
    assert emptied.returncode != 0 and "0 bytes" in emptied.stderr, emptied.stderr
    words = ["import", "-", store.url("piped"), "--size", "1000001", *store.cli_options]
    odd = run(CLI, *words, env=store.env, stdin="x")
    assert odd.returncode == 0 and "no multiple of 512" in odd.stderr, odd.stderr
