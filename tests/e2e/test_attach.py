"""The relay of `hypernbd attach`: a client behind it does not notice that its server dies.

The client stands where the kernel's driver would be. tests/kernel has the kernel itself, in a virtual machine.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
from pathlib import Path

import nbd
import pytest

from support.process import run, spawn, wait_for
from support.serve import Served
from support.server import CLI, KI, MI, leave

pytestmark = pytest.mark.file_only
LIMIT_S = 240
SIZE = 8 * MI
BLOCK = 4 * KI


class Nbdkit:
    """A server by one of nbdkit's own plugins."""

    def __init__(self, program, directory, *plugin):
        self.program, self.directory, self.plugin = program, directory, plugin
        self.socket = directory / "server.sock"
        self.process = None

    def start(self, *plugin):
        self.socket.unlink(missing_ok=True)
        command = [self.program, "--foreground", "--unix", str(self.socket), *(plugin or self.plugin)]
        self.process = spawn(command, self.directory / "server.log", env={}, limit_s=LIMIT_S)

    def end(self, how=signal.SIGKILL):
        self.process.send_signal(how)
        self.process.wait()


class Relay:
    """`hypernbd attach` with a socket in the kernel's place."""

    def __init__(self, directory, server, *options):
        self.socket, self.log = directory / "kernel.sock", directory / "relay.log"
        uri = f"nbd+unix:///?socket={server.socket}"
        command = [CLI, "attach", uri, "--foreground", "--wait=60", f"--kernel-socket={self.socket}", *options]
        self.process = spawn(command, self.log, env={"RUST_LOG": "info"}, limit_s=LIMIT_S)
        wait_for(lambda: str(self.socket) in self.log.read_text(), "the relay to be ready")
        self.client = nbd.NBD()
        self.client.connect_unix(str(self.socket))

    def said(self, words):
        return wait_for(lambda: words in self.log.read_text(), f"the relay to say {words!r}")


@pytest.fixture
def attached(nbdkit, tmp_path):
    """Starts a server and a relay before it."""
    with contextlib.ExitStack() as ends:

        def start(*plugin, options=()):
            server = Nbdkit(nbdkit, tmp_path, *plugin)
            server.start()
            ends.callback(server.end)
            relay = Relay(tmp_path, server, *options)
            ends.callback(relay.process.wait)
            ends.callback(relay.process.kill)
            ends.callback(leave, relay.client)
            return server, relay

        yield start


def content(seed):
    return random.Random(seed).randbytes(BLOCK)


@pytest.mark.parametrize("hold", [True, False])
def test_what_a_server_answered_and_lost_is_there_again(attached, hold):
    """nbdkit's memory plugin loses everything when it is killed."""
    server, relay = attached("memory", str(SIZE), options=[] if hold else ["--hold=0"])
    for block in range(64):
        relay.client.pwrite(content(block), block * BLOCK)
        relay.client.pwrite(content(block + 1000), block // 2 * BLOCK)
    relay.client.zero(BLOCK, 40 * BLOCK)
    server.end()
    server.start()
    for block in range(64):
        expected = bytes(BLOCK) if block == 40 else content(2 * block + 1001 if block < 32 else block)
        there = relay.client.pread(BLOCK, block * BLOCK) == expected
        assert there or not hold, f"block {block}"
        assert hold or not there or block == 40, f"block {block} was not lost: this test shows nothing"


@pytest.mark.parametrize("hold", [True, False])
def test_a_killed_volume_gets_again_what_no_flush_covered(make_volume, make_server, tmp_path, hold):
    """As above with a volume that has no buffer directory, killed again while that is under way."""
    server = make_server(make_volume(SIZE, BLOCK), checkpoint_interval="1h").start()
    relay = Relay(tmp_path, server, *([] if hold else ["--hold=0"]))
    try:
        for block in range(256):
            relay.client.pwrite(content(block), block * BLOCK)
        relay.client.flush()
        for block in range(128, 384):
            relay.client.pwrite(content(block + 1000), block * BLOCK)
        for _ in range(3):
            server.kill()
            server.spawn()
        right = [relay.client.pread(BLOCK, block * BLOCK) == content(block + (1000 if block >= 128 else 0)) for block in range(384)]
        assert all(right) == hold, f"{right.count(False)} blocks are wrong"
    finally:
        relay.process.kill()
        relay.process.wait()


def test_planned_restarts_with_a_buffer_directory(make_volume, nbdkit, tmp_path):
    """`hypernbd restart` under the relay, which holds nothing, because the server loses nothing."""
    volume = make_volume(64 * MI)
    directory = Path(tempfile.mkdtemp(prefix="hypernbd-"))
    options = ["--write-buffer", "16M", "--write-buffer-dir", str(directory / "buffer"), "--checkpoint-interval", "1h"]
    (directory / "serve").mkdir()
    served = Served(volume, nbdkit, directory / "serve", directory / "socket", *options)
    relay = None
    try:
        served.is_announced()
        relay = Relay(tmp_path, served, "--hold=0")
        for number in range(4):
            for block in range(100):
                relay.client.pwrite(content(number * 50 + block), (number * 50 + block) * BLOCK)
            done = volume.cli("restart", str(served.socket))
            assert done.returncode == 0, done.stderr
        for block in range(250):
            assert relay.client.pread(BLOCK, block * BLOCK) == content(block), f"block {block}"
        assert relay.log.read_text().count("the link is up again") == 4
    finally:
        if relay:
            relay.process.kill()
            relay.process.wait()
        served.process.kill()
        served.process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def test_more_than_may_be_held_is_flushed(attached, tmp_path):
    image, seen = tmp_path / "image", tmp_path / "requests"
    image.write_bytes(bytes(SIZE))
    server, relay = attached("--filter=log", "file", str(image), f"logfile={seen}", options=["--hold=1"])
    for block in range(1024):
        relay.client.pwrite(content(block), block * BLOCK)
    flushes = seen.read_text().count(" Flush ")
    assert 4 <= flushes < 64, flushes
    server.end()
    server.start()
    for block in range(1024):
        assert relay.client.pread(BLOCK, block * BLOCK) == content(block)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_busy_client_sees_no_error_while_servers_come_and_go(attached, tmp_path, how):
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    server, relay = attached("--filter=delay", "file", str(image), "rdelay=1ms", "wdelay=1ms")
    blocks, end, failed = {}, threading.Event(), []

    def work():
        chance, number = random.Random(5), 0
        try:
            while not end.is_set():
                number += 1
                block = chance.randrange(SIZE // BLOCK)
                if block in blocks:
                    assert relay.client.pread(BLOCK, block * BLOCK) == content(blocks[block]), f"block {block}"
                relay.client.pwrite(content(number), block * BLOCK, nbd.CMD_FLAG_FUA if number % 10 == 0 else 0)
                blocks[block] = number
                if number % 100 == 0:
                    relay.client.flush()
        except Exception as error:
            failed.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(8):
            before = len(blocks)
            wait_for(lambda: failed or len(blocks) > before + 20, "the client to get on")
            server.end(how)
            server.start()
    finally:
        end.set()
        worker.join()
    assert not failed, failed
    assert relay.log.read_text().count("the link is up again") >= 8
    for block, number in blocks.items():
        assert relay.client.pread(BLOCK, block * BLOCK) == content(number)


def test_another_export_is_not_gone_on_with(attached):
    server, relay = attached("memory", str(SIZE))
    relay.client.pwrite(content(1), 0)
    server.end()
    server.start("memory", str(SIZE // 2))
    relay.said(f"the export has {SIZE // 2} bytes now, and had {SIZE}")
    server.end()
    server.start("memory", str(SIZE), "-r")
    relay.said("read-only now")
    server.end()
    server.start()
    assert relay.client.pread(BLOCK, 0) == content(1)


def test_requests_fail_once_the_server_is_dead_for_long_enough(attached):
    server, relay = attached("memory", str(SIZE), options=["--dead-after=1"])
    relay.client.pwrite(content(1), 0)
    server.end()
    with pytest.raises(nbd.Error) as raised:
        relay.client.pwrite(content(2), 0)
    assert raised.value.errnum == errno.EIO
    server.start()
    relay.said("the link is up again")
    assert relay.client.pread(BLOCK, 0) == content(1)


def test_what_cannot_be_attached_is_said(tmp_path):
    socket = tmp_path / "none.sock"
    done = run(CLI, "attach", f"nbd+unix:///?socket={socket}", "--foreground", f"--kernel-socket={tmp_path}/k")
    assert done.returncode == 1 and str(socket) in done.stderr and done.stderr.count("No such file") == 1, done.stderr
    done = run(CLI, "attach", "nbds://localhost")
    assert done.returncode == 2 and "TLS is not supported yet" in done.stderr, done.stderr
    if os.geteuid() == 0:
        done = run(CLI, "detach", "/dev/nbd0")
        assert done.returncode == 1 and "attached" in done.stderr, done.stderr


def test_a_relay_that_waits_for_its_server_ends_when_it_is_told(tmp_path):
    """The server takes the connection and says nothing."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(str(tmp_path / "server.sock"))
        server.listen()
        log, uri = tmp_path / "relay.log", f"nbd+unix:///?socket={tmp_path}/server.sock"
        command = [CLI, "attach", uri, "--foreground", "--wait=600", f"--kernel-socket={tmp_path}/kernel.sock"]
        relay = spawn(command, log, env={}, limit_s=LIMIT_S)
        connection, _ = server.accept()
        relay.terminate()
        assert relay.wait(timeout=LIMIT_S) != 0
        connection.close()


@pytest.mark.parametrize("option", ["--hold=17592186044416", "--hold=-1", "--wait=18446744073709551615", "--dead-after=-1"])
def test_numbers_that_make_no_sense(option):
    done = run(CLI, "attach", "nbd+unix:///?socket=/nowhere", option)
    assert done.returncode == 2 and option.split("=")[0] in done.stderr, done.stderr
