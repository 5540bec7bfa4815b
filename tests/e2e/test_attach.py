"""The relay of `hypernbd attach`: a client behind it does not notice that its server dies.

The client stands where the kernel's driver would be. tests/kernel has the kernel itself, in a virtual machine.
"""

import contextlib
import errno
import json
import os
import random
import re
import shlex
import signal
import socket
import struct
import subprocess
import threading

import nbd
import pytest

from support.process import run, spawn, wait_for
from support.serve import served_with_buffer
from support.server import CLI, KI, MI, leave

pytestmark = pytest.mark.file_only
LIMIT_S = 900
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
        command = [CLI, "attach", self.uri(server), "--foreground", "--wait=60", f"--kernel-socket={self.socket}", *options]
        self.process = spawn(command, self.log, env={"RUST_LOG": "info"}, limit_s=LIMIT_S)
        wait_for(lambda: str(self.socket) in self.log.read_text(), "the relay to be ready")
        self.client = nbd.NBD()
        self.client.connect_unix(str(self.socket))

    @staticmethod
    def uri(server):
        return f"nbd+unix:///?socket={server.socket}"

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
    with contextlib.ExitStack() as ends:
        served = ends.enter_context(served_with_buffer(volume, nbdkit))
        relay = Relay(tmp_path, served, "--hold=0")
        ends.callback(relay.process.wait)
        ends.callback(relay.process.kill)
        for number in range(4):
            for block in range(100):
                relay.client.pwrite(content(number * 50 + block), (number * 50 + block) * BLOCK)
            done = volume.cli("restart", str(served.socket))
            assert done.returncode == 0, done.stderr
        for block in range(250):
            assert relay.client.pread(BLOCK, block * BLOCK) == content(block), f"block {block}"
        assert relay.log.read_text().count("the link is up again") == 4


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
    # The log leaves some of so many out.
    assert relay.log.read_text().count("the link is up again") >= 3
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


def test_an_export_that_grew_is_used_in_its_new_size_and_never_in_a_smaller_one(attached):
    """By the next server at the address. tests/kernel has the device that grows with it."""
    server, relay = attached("memory", str(SIZE))
    # libnbd would refuse itself what lies past the size that it was greeted with.
    relay.client.set_strict_mode(0)
    relay.client.pwrite(content(1), 0)
    with pytest.raises(nbd.Error) as raised:
        relay.client.pwrite(content(2), SIZE)
    assert raised.value.errnum == errno.EINVAL
    server.end()
    server.start("memory", str(2 * SIZE))
    relay.said(f"the export has {2 * SIZE} bytes now")
    relay.client.pwrite(content(2), SIZE)
    assert relay.client.pread(BLOCK, SIZE) == content(2) and relay.client.pread(BLOCK, 0) == content(1)
    server.end()
    server.start()
    relay.said(f"the export has {SIZE} bytes now, and had {2 * SIZE}")
    server.end()
    server.start("memory", str(2 * SIZE))
    assert relay.client.pread(BLOCK, SIZE) == content(2) and relay.client.pread(BLOCK, 0) == content(1)


def test_a_relay_that_is_told_to_looks_whether_its_export_has_grown(make_volume, make_server, tmp_path):
    """The server goes on; what it was asked for meanwhile gets its answers. This is what `attached --refresh` has a relay do."""
    volume = make_volume(SIZE, BLOCK)
    server = make_server(volume, checkpoint_interval="1h").start()
    with contextlib.ExitStack() as ends:
        relay = Relay(tmp_path, server)
        ends.callback(relay.process.wait)
        ends.callback(relay.process.kill)
        ends.callback(leave, relay.client)
        relay.client.set_strict_mode(0)
        failed, enough, written = [], threading.Event(), 0

        def write():
            nonlocal written
            try:
                while not enough.is_set():
                    relay.client.pwrite(content(written + 1), (written + 1) % 100 * BLOCK)
                    written += 1
            except Exception as error:
                failed.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for times in (2, 3):
                resized = volume.cli("resize", volume.url, "--size", str(times * SIZE))
                assert resized.returncode == 0, resized.stderr
                relay.process.send_signal(signal.SIGHUP)
                relay.said(f"the export has {times * SIZE} bytes now")
                before = written
                wait_for(lambda: failed or written > before + 200, "the writer to get on")
        finally:
            enough.set()
            writer.join()
        assert not failed, failed
        relay.client.pwrite(content(0), 2 * SIZE)
        for number in range(written - 99, written + 1):
            assert relay.client.pread(BLOCK, number % 100 * BLOCK) == content(number)
        relay.client.flush()
        with server.connect() as client:
            assert client.get_size() == 3 * SIZE and client.pread(BLOCK, 2 * SIZE) == content(0)
        server.assert_running()


def test_a_look_that_finds_nothing_larger_leaves_the_link_alone(attached, tmp_path):
    """Nor one that finds something else at the address, or nobody: the link that there is may be the last one to this export."""
    seen = tmp_path / "requests"
    server, relay = attached("--filter=log", "memory", str(SIZE), f"logfile={seen}")
    relay.client.pwrite(content(1), 0)
    relay.process.send_signal(signal.SIGHUP)
    wait_for(lambda: seen.read_text().count(" Connect ") == 2, "the relay to connect a second time")
    # Nobody is there; then somebody else is.
    server.socket.rename(tmp_path / "away.sock")
    relay.process.send_signal(signal.SIGHUP)
    relay.said("whether the export has grown cannot be seen")
    assert relay.client.pread(BLOCK, 0) == content(1)
    other = Nbdkit(server.program, tmp_path, "memory", str(SIZE // 2))
    other.start()
    try:
        relay.said(f"the export has {SIZE // 2} bytes now, and had {SIZE}; the link stays")
        assert relay.client.pread(BLOCK, 0) == content(1)
        log = relay.log.read_text()
        assert "no link" not in log and "the link is up again" not in log, log
    finally:
        other.end()


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


class Flapping:
    """A server that greets each client and hangs up at once, until it is closed."""

    def __init__(self, path, flags):
        self.flags, self.links = flags, 0
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
                asked = client.recv(4 + 16, socket.MSG_WAITALL)
                client.recv(struct.unpack(">I", asked[-4:])[0], socket.MSG_WAITALL)
                export = struct.pack(">HQH", 0, SIZE, self.flags)
                for kind, data in [(3, export), (1, b"")]:
                    client.sendall(struct.pack(">QIII", 0x3E889045565A9, 7, kind, len(data)) + data)
                self.links += 1

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.listener.close()


def test_a_link_that_dies_at_once_is_no_end_of_an_outage(attached):
    """Requests fail although there is a link again and again, and the log does not tell of each."""
    server, relay = attached("memory", str(SIZE), options=["--dead-after=2"])
    relay.client.pwrite(content(1), 0)
    server.end()
    flapping = Flapping(server.socket, 0xFFFF & ~2)
    try:
        with pytest.raises(nbd.Error) as raised:
            relay.client.pwrite(content(2), 0)
        assert raised.value.errnum == errno.EIO
        wait_for(lambda: flapping.links >= 10, "the relay to be hung up on ten times")
    finally:
        flapping.close()
    server.start()
    relay.said("the link is up again")
    assert relay.client.pread(BLOCK, 0) == content(1)
    log = relay.log.read_text()
    assert log.count("the link is up again") == 1 and log.count("no answer for") == 1, log
    # How it began and how it went on: each reason once.
    reasons = re.findall(r"no link: (.*?)(?:; requests wait.*)?$", log, re.MULTILINE)
    assert reasons and len(reasons) == len(set(reasons)), log


def test_a_second_relay_at_an_export_is_refused(attached, tmp_path):
    server, relay = attached("memory", str(SIZE))
    other = tmp_path / "other-name.sock"
    other.symlink_to(server.socket)

    def command(kernel):
        return [CLI, "attach", f"nbd+unix:///?socket={other}", "--foreground", f"--kernel-socket={kernel}"]

    kernel, log = tmp_path / "second.sock", tmp_path / "second.log"
    done = run(*command(kernel))
    assert done.returncode == 1 and f"attached already, by process {relay.process.pid}" in done.stderr, done.stderr
    assert not kernel.exists()
    # Its locks end with it, however it ends.
    leave(relay.client)
    relay.process.kill()
    relay.process.wait()
    # It says that line alone once it is ready.
    second = spawn(command(kernel), log, env={}, limit_s=LIMIT_S)
    try:
        wait_for(lambda: str(kernel) in log.read_text().splitlines() or second.poll() is not None, "the second relay to be ready")
        assert second.poll() is None, log.read_text()
    finally:
        second.kill()
        second.wait()


def test_another_volume_at_the_address_is_not_written_to(make_volume, make_server, tmp_path):
    """Of the same size, with all that the first one offers."""
    one, other = (make_server(make_volume(SIZE, BLOCK)).start() for _ in range(2))

    class Address:
        socket = tmp_path / "address.sock"

    Address.socket.symlink_to(one.socket)
    relay = Relay(tmp_path, Address)
    try:
        relay.client.pwrite(content(1), 0)
        one.kill()
        Address.socket.unlink()
        Address.socket.symlink_to(other.socket)
        relay.said("and was Hypernbd volume")
        with other.connect() as client:
            assert client.pread(BLOCK, 0) == bytes(BLOCK)
        one.spawn()
        Address.socket.unlink()
        Address.socket.symlink_to(one.socket)
        relay.said("the link is up again")
        assert relay.client.pread(BLOCK, 0) == content(1)
        relay.client.flush()
        with other.connect() as client:
            assert client.pread(BLOCK, 0) == bytes(BLOCK)
    finally:
        relay.process.kill()
        relay.process.wait()


def test_servers_say_which_volume_and_which_checkpoint_they_have(make_volume, make_server):
    volume = make_volume(SIZE, BLOCK)
    volume_id = json.loads(volume.cli("info", volume.url, "--json").stdout)["volume_id"]

    def said(server, export=""):
        client = nbd.NBD()
        client.set_full_info(True)
        client.set_export_name(export)
        client.connect_unix(str(server.socket))
        try:
            return client.get_export_description()
        finally:
            leave(client)

    server = make_server(volume).start()
    assert said(server) == f"Hypernbd volume {volume_id}"
    with server.connect() as client:
        client.pwrite(content(1), 0)
        client.flush()
    first = said(server, "@-0s")
    assert re.fullmatch(rf"Hypernbd volume {volume_id}, checkpoint \d+ \([0-9a-f]{{16}}\)", first), first
    server.terminate()
    # A later server says the same of the same.
    server.start()
    assert said(server) == f"Hypernbd volume {volume_id}"
    server.terminate()
    reader = make_server(volume, ["-r"]).start()
    assert re.fullmatch(rf"Hypernbd volume {volume_id}, checkpoint \d+ \([0-9a-f]{{16}}\)", said(reader))


def test_what_cannot_be_attached_is_said(tmp_path):
    socket = tmp_path / "none.sock"
    done = run(CLI, "attach", f"nbd+unix:///?socket={socket}", "--foreground", f"--kernel-socket={tmp_path}/k")
    assert done.returncode == 1 and str(socket) in done.stderr and done.stderr.count("No such file") == 1, done.stderr
    done = run(CLI, "attach", "nbds://localhost")
    assert done.returncode == 2 and "tls-certificates=DIR" in done.stderr, done.stderr
    if os.geteuid() == 0:
        for words in (["detach", "/dev/nbd0"], ["attached", "--refresh", "/dev/nbd0"]):
            done = run(CLI, *words)
            assert done.returncode == 1 and "nothing is attached" in done.stderr, done.stderr


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
        # Less than its alarm, which would end it too.
        assert relay.wait(timeout=240) != 0
        connection.close()


def test_a_relay_that_waits_for_who_stands_for_the_kernel_ends_when_it_is_told(nbdkit, tmp_path):
    """Its socket goes with it."""
    server = Nbdkit(nbdkit, tmp_path, "memory", str(SIZE))
    server.start()
    try:
        kernel, log = tmp_path / "kernel.sock", tmp_path / "relay.log"
        command = [CLI, "attach", Relay.uri(server), "--foreground", "--wait=60", f"--kernel-socket={kernel}"]
        relay = spawn(command, log, env={}, limit_s=LIMIT_S)
        wait_for(lambda: str(kernel) in log.read_text().splitlines(), "the relay to be ready")
        relay.terminate()
        assert relay.wait(timeout=LIMIT_S / 2) == 0, log.read_text()
        assert not kernel.exists()
    finally:
        server.end()


class Begun:
    """`hypernbd attach` as it runs in the background, and a shell in the place of what began it and waits."""

    def __init__(self, directory, uri):
        self.socket = directory / "kernel.sock"
        relay = [CLI, "attach", uri, "--foreground", "--wait=600", f"--kernel-socket={self.socket}"]
        names = f"HYPERNBD_ATTACH_LOG={directory}/begun.log HYPERNBD_ATTACH_PARENT=$$"
        script = f"{names} {shlex.join(map(str, relay))} & wait"
        self.shell = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def kill_the_waiting(self):
        self.shell.kill()
        self.shell.wait()


def test_who_waits_for_a_device_takes_the_relay_along(tmp_path):
    """Ctrl-C at `hypernbd attach --wait`: nobody would know of a device that is attached later."""
    begun = Begun(tmp_path, f"nbd+unix:///?socket={tmp_path}/none.sock")
    begun.kill_the_waiting()
    # The relay has the other end of the pipe as long as it lives.
    assert "ready" not in begun.shell.communicate(timeout=LIMIT_S)[0].decode()


def test_a_relay_that_is_ready_outlives_who_waited_for_it(nbdkit, tmp_path):
    server = Nbdkit(nbdkit, tmp_path, "memory", str(SIZE))
    server.start()
    client = nbd.NBD()
    try:
        begun = Begun(tmp_path, Relay.uri(server))
        assert any(line.startswith(b"ready ") for line in begun.shell.stdout), "it ended before"
        begun.kill_the_waiting()
        client.connect_unix(str(begun.socket))
        client.pwrite(content(1), 0)
        client.flush()
        assert client.pread(BLOCK, 0) == content(1)
    finally:
        # The relay ends with its kernel.
        leave(client)
        server.end()


@pytest.mark.parametrize("option", ["--hold=17592186044416", "--hold=-1", "--wait=18446744073709551615", "--dead-after=-1"])
def test_numbers_that_make_no_sense(option):
    done = run(CLI, "attach", "nbd+unix:///?socket=/nowhere", option)
    assert done.returncode == 2 and option.split("=")[0] in done.stderr, done.stderr
