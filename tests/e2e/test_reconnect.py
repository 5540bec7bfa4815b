"""A mounted file system lives through the death of its server: QEMU reconnects, and sends again what was under way.

What a server has acknowledged and not yet made durable dies with it, and no client sends that again. So a server is
killed either while the file system is frozen, or with every write made durable before it is answered.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import random
import signal
import threading
from types import SimpleNamespace

import nbd
import pytest

from support.blockdev import BlockDevice, why_not
from support.lives import listens
from support.process import check, spawn, wait_for
from support.serve import served_with_buffer
from support.server import KI, MI, leave

reason = why_not()
pytestmark = [
    pytest.mark.skipif(reason is not None, reason=reason or ""),
    pytest.mark.file_only,
]

LIMIT_S = 900
libc = ctypes.CDLL(None)


@contextlib.contextmanager
def reconnecting(server, directory):
    """A block device on a client that waits for its server to come back, for longer than a start may take."""
    socket = server.directory / "qemu"
    image = f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={server.socket},file.reconnect-delay=120"
    command = ["qemu-nbd", "--persistent", "--discard=unmap", "--socket", str(socket), "--image-opts", image]
    client = spawn(command, directory / "qemu-nbd.log", env={}, limit_s=LIMIT_S)
    try:
        wait_for(lambda: listens(socket), "qemu-nbd to listen")
        device = BlockDevice(f"nbd+unix:///?socket={socket}", directory / "device")
        try:
            yield device
        finally:
            device.close()
    finally:
        client.kill()
        client.wait()


class Writer(threading.Thread):
    """Writes files, each synced; remembers the digests."""

    def __init__(self, directory, seed: int):
        super().__init__(daemon=True)
        self.directory = directory
        self.rng = random.Random(seed)
        self.done = threading.Event()
        self.written: dict[str, str] = {}
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self.done.is_set():
                content = self.rng.randbytes(self.rng.randint(1, 60 * KI))
                name = f"file-{self.rng.randrange(60)}"
                self.written.pop(name, None)
                with open(self.directory / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                self.written[name] = hashlib.sha256(content).hexdigest()
        except Exception as error:  # handed to the main thread
            self.failure = error

    def wait_for_more(self) -> None:
        """Until it has written some more files."""
        before = dict(self.written)

        def has_more() -> bool:
            return self.failure is not None or len(dict(self.written).items() - before.items()) >= 5

        # Each may take some flushes, and QEMU up to 16 s to try again.
        wait_for(has_more, "files to be written", limit_s=300)
        assert self.failure is None, self.failure

    def finish(self) -> dict[str, str]:
        self.done.set()
        self.join(LIMIT_S)
        assert self.failure is None, self.failure
        assert not self.is_alive()
        return self.written


def compare(directory, expected: dict[str, str]) -> None:
    for name, digest in expected.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest, name


def live_through(server, directory, kind, seed: int, restarts, *options: str) -> None:
    """A writer of this kind on a file system, through restarts of the server, which are told where that is mounted: it sees no error,
    and every file is as it wrote it."""
    with reconnecting(server, directory) as device:
        check("mkfs.ext4", "-q", device.path)
        mounted = device.mount(*options)
        writer = kind(mounted, seed)
        writer.start()
        for restart in restarts:
            writer.wait_for_more()
            restart(mounted)
        writer.wait_for_more()
        expected = writer.finish()
        device.unmount()
        check("e2fsck", "-fn", device.path)
        compare(device.mount(), expected)


def test_a_frozen_file_system_lives_through_a_restart(make_volume, make_server, tmp_path, seed):
    """The planned way: freeze, kill, start, thaw. The writer is held up meanwhile, and sees no error."""
    server = make_server(make_volume(64 * MI), checkpoint_interval="1h").start()

    def kill_and_start_frozen(mounted) -> None:
        check("fsfreeze", "--freeze", mounted)
        try:
            server.kill()
            server.start()
        finally:
            check("fsfreeze", "--unfreeze", mounted)

    live_through(server, tmp_path, Writer, seed, [kill_and_start_frozen] * 3)


def test_a_busy_file_system_lives_through_kill_9_when_every_write_is_durable(make_volume, make_server, tmp_path, seed):
    """The unplanned way needs a log on a local disk, and nbdkit's fua filter: no acknowledged write can be lost."""
    server = make_server(
        make_volume(64 * MI),
        nbdkit_options=["--filter=fua"],
        fuamode="force",
        backend_wal_url=f"file://{tmp_path}/journal/",
    ).start()

    def kill_and_start(_) -> None:
        server.kill()
        server.start()

    live_through(server, tmp_path, Writer, seed, [kill_and_start] * 3)


class Hasty(Writer):
    """Writes files and syncs none of them: most of what it writes is answered by the server and flushed much later."""

    def run(self) -> None:
        try:
            while not self.done.is_set():
                content = self.rng.randbytes(self.rng.randint(1, 60 * KI))
                name = f"file-{self.rng.randrange(60)}"
                self.written.pop(name, None)
                descriptor = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.write(descriptor, content)
                # To the device, and no further: sync_file_range(2) asks for no flush.
                libc.sync_file_range(descriptor, ctypes.c_long(0), ctypes.c_long(0), 7)
                os.close(descriptor)
                self.written[name] = hashlib.sha256(content).hexdigest()
        except Exception as error:  # handed to the main thread
            self.failure = error


def test_a_busy_file_system_lives_through_kill_9_with_a_buffer_file(make_volume, make_server, tmp_path, seed):
    """Nothing is frozen and nothing is made durable: what was answered is there after each kill. The buffer is so small that
    publishes are under way."""
    server = make_server(
        make_volume(64 * MI),
        write_buffer="16M",
        write_buffer_dir=str(tmp_path / "buffer"),
        checkpoint_interval="1h",
    ).start()

    def kill_and_start(_) -> None:
        server.kill()
        server.start()

    live_through(server, tmp_path, Hasty, seed, [kill_and_start] * 6, "-o", "nobarrier")


def test_a_busy_file_system_lives_through_planned_restarts(make_volume, nbdkit, tmp_path, seed):
    """`hypernbd restart`, by socket and by URL: the clients come back, nothing is missing, and `serve` goes on."""
    volume = make_volume(64 * MI)
    with served_with_buffer(volume, nbdkit) as served:

        def restart(name: str) -> None:
            done = volume.cli("restart", name)
            assert done.returncode == 0, done.stderr

        restarts = [lambda _: restart(str(served.socket)), lambda _: restart(volume.url)] * 2
        server = SimpleNamespace(directory=served.socket.parent, socket=served.socket)
        live_through(server, tmp_path, Hasty, seed, restarts, "-o", "nobarrier")
        wait_for(lambda: served.log.read_text().count("hypernbd: restarted") == 4, "all restarts to be told of")
        served.process.send_signal(signal.SIGTERM)
        assert served.wait() == 0, served.log.read_text()


def test_no_restart_that_would_lose_writes(make_volume, make_server, nbdkit, tmp_path):
    """Without the directory, and where nothing would start the server again, the reason is told."""
    volume = make_volume(16 * MI)
    for parameters, reason in (({}, "no write_buffer_dir"), ({"dir": 1}, "not started by hypernbd serve")):
        chosen = {"write_buffer_dir": str(tmp_path / "buffer")} if parameters else {}
        server = make_server(volume, **chosen).start()
        refused = volume.cli("restart", str(server.socket))
        assert refused.returncode == 1 and reason in refused.stderr
        server.assert_running()
        assert server.terminate() == 0
    refused = volume.cli("restart", volume.url)
    assert refused.returncode == 1 and "no server holds" in refused.stderr


def test_sigterm_refuses_a_client_that_stays(make_volume, make_server):
    """Why the ways above kill: a client that stays is an I/O error away from its disk. What was flushed is kept."""
    server = make_server(make_volume(16 * MI)).start()
    client = server.handle()
    client.pwrite(bytes([1]), 0)
    client.flush()
    server.process.send_signal(signal.SIGTERM)
    written, flushed = 1, 1
    with pytest.raises(nbd.Error) as caught:
        while written < 250:
            client.pwrite(bytes([written + 1]), 0)
            written += 1
            client.flush()
            flushed = written
    # Each of nbdkit's threads that waits for a request answers one with the first; after those it hangs up.
    assert caught.value.errnum in (errno.ESHUTDOWN, errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN), caught.value
    leave(client)
    assert server.wait() == 0, server.log_text()
    with server.start().connect() as again:
        assert flushed <= again.pread(1, 0)[0] <= written + 1  # the last one may have been served, unanswered
