"""What docs/recipes/restarts.md has clients do: with it they notice nothing of a server that is killed, or started anew, under them.

The server has `write_buffer_dir`, so it loses nothing that it answered; nobody flushes.
"""

import contextlib
import errno
import os
import re
import shlex
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import nbd
import pytest

from support.lives import listens
from support.model import pattern
from support.process import run, spawn, wait_for
from support.recipes import blocks
from support.serve import served_with_buffer
from support.server import KI, MI, leave

pytestmark = pytest.mark.file_only
LIMIT_S = 900
SIZE = 64 * MI
BLOCK = 4 * KI
BLOCKS = 200
PAGE = "restarts.md"
SOCKET = "/run/hypernbd/disk.sock"
RESTARTS = 4


class Busy(threading.Thread):
    """Writes one block after the other, each time with something else, until it is told to stop or an error comes."""

    def __init__(self, write: Callable[[bytes, int], object]):
        super().__init__(daemon=True)
        self.write = write
        self.enough = threading.Event()
        self.failure: Exception | None = None
        self.done = 0

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                number = self.done + 1
                self.write(pattern(BLOCK, number), number % BLOCKS * BLOCK)
                self.done = number
        except Exception as error:  # handed to the main thread
            self.failure = error

    def wait_for_more(self) -> None:
        before = self.done
        # QEMU waits up to 16 s before it tries again.
        wait_for(lambda: self.failure or self.done > before + 20, "the client to get on", limit_s=300)
        assert self.failure is None, self.failure

    def finish(self) -> None:
        self.enough.set()
        self.join(LIMIT_S)
        assert self.failure is None, self.failure
        assert not self.is_alive()

    def compare(self, read: Callable[[int, int], bytes]) -> None:
        """What was written last to each block is there."""
        assert self.done > RESTARTS * 20
        for number in range(max(1, self.done - BLOCKS + 1), self.done + 1):
            assert read(BLOCK, number % BLOCKS * BLOCK) == pattern(BLOCK, number), f"write {number} of {self.done}"


@dataclass
class Restarted:
    """A server, and a way to have another one in its place."""

    socket: Path
    restart: Callable[[], None]
    connect: Callable[[], nbd.NBD]


@pytest.fixture(params=["killed", "planned"])
def server(request, make_volume, make_server, nbdkit, tmp_path):
    volume = make_volume(SIZE)
    if request.param == "killed":
        parameters = {"write_buffer": "16M", "write_buffer_dir": str(tmp_path / "buffer"), "checkpoint_interval": "1h"}
        killed = make_server(volume, **parameters).start()

        def kill_and_start() -> None:
            killed.kill()
            killed.start()

        yield Restarted(killed.socket, kill_and_start, killed.handle)
        return
    with served_with_buffer(volume, nbdkit) as served:

        def restart() -> None:
            done = volume.cli("restart", str(served.socket))
            # The clients wait longer for a slow machine's next server than the command does.
            assert done.returncode == 0 or "the next one does not listen yet" in done.stderr, done.stderr

        yield Restarted(served.socket, restart, served.connect)


def live_through(server: Restarted, write, read) -> None:
    """A client that writes without end sees no error, and neither it nor another one misses anything."""
    busy = Busy(write)
    busy.start()
    try:
        for _ in range(RESTARTS):
            busy.wait_for_more()
            server.restart()
        busy.wait_for_more()
    finally:
        busy.enough.set()
    busy.finish()
    busy.compare(read)
    client = server.connect()
    try:
        busy.compare(client.pread)
    finally:
        leave(client)


def with_socket(words: str, server: Restarted) -> str:
    """The words of the page, for the test's server."""
    assert SOCKET in words
    return words.replace(SOCKET, str(server.socket))


@contextlib.contextmanager
def running(command: list[str], log: Path, is_ready: Callable[[], bool]):
    process = spawn([str(word) for word in command], log, env={}, limit_s=LIMIT_S)
    try:
        wait_for(lambda: is_ready() or process.poll() is not None, f"{command[0]} to be ready")
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        process.kill()
        process.wait()


def test_qemu(server, tmp_path):
    """QEMU's block layer, with an NBD server of its own before it."""
    (disk,) = [re.search(r"-blockdev (\S+)", text)[1] for text in blocks(PAGE, "") if "-blockdev" in text]
    words = dict(word.split("=", 1) for word in with_socket(disk, server).split(","))
    del words["node-name"]
    image = ",".join(["driver=raw", *(f"file.{key}={value}" for key, value in words.items())])
    socket = server.socket.parent / "qemu"
    command = ["qemu-nbd", "--persistent", "--socket", socket, "--image-opts", image]
    with running(command, tmp_path / "qemu-nbd.log", lambda: listens(socket)):
        client = nbd.NBD()
        client.connect_unix(str(socket))
        try:
            live_through(server, client.pwrite, client.pread)
        finally:
            leave(client)


def test_libnbd_with_a_loop(server):
    (program,) = blocks(PAGE, "python")
    names: dict = {}
    exec(with_socket(program, server), names)
    disk = names["disk"]
    try:
        assert disk.do(lambda client: client.pread(5, 0)) == b"hello"
        # An answer is no reason to ask again.
        with pytest.raises(nbd.Error) as raised:
            disk.do(lambda client: client.pread(BLOCK, SIZE))
        assert raised.value.errnum == errno.EINVAL
        live_through(
            server,
            lambda data, offset: disk.do(lambda client: client.pwrite(data, offset)),
            lambda length, offset: disk.do(lambda client: client.pread(length, offset)),
        )
    finally:
        if disk.client:
            leave(disk.client)


def why_no_fuse() -> str | None:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        return "a mount of FUSE needs root and /dev/fuse"
    if not shutil.which("nbdkit") or run("nbdkit", "nbd", "--dump-plugin").returncode != 0:
        return "the system's nbdkit has no nbd plugin"
    return None


needs_fuse = pytest.mark.skipif(why_no_fuse() is not None, reason=why_no_fuse() or "")


@contextlib.contextmanager
def fuse(command: list[str], image: Path, log: Path):
    """nbdfuse, and its file opened; a file system that hangs is taken away, too."""
    image.parent.mkdir()
    with contextlib.ExitStack() as ends:
        ends.callback(run, "umount", "--lazy", image.parent)
        ends.enter_context(running(command, log, image.exists))
        descriptor = os.open(image, os.O_RDWR)
        ends.callback(close, descriptor)
        yield descriptor


def close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)


@needs_fuse
def test_nbdfuse_behind_the_retry_filter(server, tmp_path):
    (line,) = [text for text in blocks(PAGE, "") if text.startswith("nbdfuse")]
    image = tmp_path / "fuse" / "image"
    command = [str(image) if word == "/srv/disk/image" else word for word in shlex.split(with_socket(line, server))]
    assert str(image) in command
    with fuse(command, image, tmp_path / "nbdfuse.log") as descriptor:
        live_through(
            server,
            lambda data, offset: os.pwrite(descriptor, data, offset),
            lambda length, offset: os.pread(descriptor, length, offset),
        )
        os.fsync(descriptor)


def test_libnbd_as_it_is_fails_with_the_server(server):
    """The table in docs/attaching.md: without what the page has it do."""
    client = server.connect()
    client.pwrite(pattern(BLOCK, 1), 0)
    server.restart()
    for _ in range(2):
        with pytest.raises(nbd.Error):
            client.pwrite(pattern(BLOCK, 2), 0)
    leave(client)
    again = server.connect()
    assert again.pread(BLOCK, 0) == pattern(BLOCK, 1)
    leave(again)


@needs_fuse
def test_nbdfuse_as_it_is_ends_with_the_server(server, tmp_path):
    image = tmp_path / "fuse" / "image"
    command = ["nbdfuse", str(image), f"nbd+unix:///?socket={server.socket}"]
    with fuse(command, image, tmp_path / "nbdfuse.log") as descriptor:
        os.pwrite(descriptor, pattern(BLOCK, 1), 0)
        server.restart()
        for _ in range(3):
            with pytest.raises(OSError):
                os.pwrite(descriptor, pattern(BLOCK, 2), 0)
