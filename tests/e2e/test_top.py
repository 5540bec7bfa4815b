"""`hypernbd top` on a terminal."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios

import pytest

from support.model import pattern
from support.process import wait_for
from support.server import CLI, KI, MI
from support.stores import free_port
from support.endpoints import page

LIMIT_S = 60
LEFT = "\x1b[?1049l"

pytestmark = pytest.mark.file_only


class Screen:
    """A program on a terminal of its own, and all that it has drawn."""

    def __init__(self, *words, columns=160, rows=40):
        self.master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before = termios.tcgetattr(terminal)
        streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
        self.process = subprocess.Popen(
            [str(word) for word in (CLI, "top", *words)], start_new_session=True, **streams
        )
        self.terminal = terminal
        self.drawn = ""

    def shows(self, text: str) -> bool:
        """Whether the text has been drawn by now."""
        while select.select([self.master], [], [], 0)[0]:
            self.drawn += os.read(self.master, 65536).decode(errors="replace")
        return text in self.drawn

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def ended(self) -> bool:
        self.shows("")
        return self.process.poll() is not None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.terminal)


@pytest.fixture
def served(make_volume, make_server):
    """A server that is watched by the address of its metrics."""
    address = f"127.0.0.1:{free_port()}"
    server = make_server(make_volume(64 * MI), metrics=address, checkpoint_interval="1h").start()
    return server, address


@pytest.mark.parametrize("key", [b"q", b"\x1b", b"\x03"], ids=["q", "escape", "control-c"])
def test_it_shows_what_is_done_and_gives_the_terminal_back(served, key):
    server, address = served
    screen = Screen(f"http://{address}")
    try:
        wait_for(lambda: screen.shows(server.volume.url), "the volume to be shown")
        assert not screen.shows("flush")
        with server.connect() as client:
            client.pwrite(pattern(256 * KI, 1), 0)
            client.flush()
            wait_for(lambda: screen.shows("flush"), "the flush to be shown")
        screen.press(key)
        wait_for(screen.ended, "the end")
        assert screen.process.returncode == 0
        assert screen.shows(LEFT)
        assert termios.tcgetattr(screen.terminal) == screen.before, "as it was found"
    finally:
        screen.close()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_it_gives_the_terminal_back(served, end):
    server, address = served
    screen = Screen(f"http://{address}")
    try:
        wait_for(lambda: screen.shows(server.volume.url), "the volume to be shown")
        assert termios.tcgetattr(screen.terminal) != screen.before
        screen.process.send_signal(end)
        wait_for(screen.ended, "the end")
        assert screen.process.returncode == 128 + end
        assert screen.shows(LEFT)
        assert termios.tcgetattr(screen.terminal) == screen.before, "as it was found"
    finally:
        screen.close()


def test_a_server_that_goes_is_said_so(served):
    server, address = served
    screen = Screen(f"http://{address}")
    try:
        wait_for(lambda: screen.shows(server.volume.url), "the volume to be shown")
        server.kill()
        wait_for(lambda: screen.shows("no server answers"), "the end of the server to be shown")
        assert screen.process.poll() is None, "it may come back"
        server.start()
        shown = len(screen.drawn)
        wait_for(lambda: screen.shows("") or page(address).value("connections") == 0, "the server to be back")
        with server.connect() as client:
            client.pread(4096, 0)
            wait_for(lambda: screen.shows("read") and "read" in screen.drawn[shown:], "what it does to be shown")
        screen.press(b"q")
        wait_for(screen.ended, "the end")
    finally:
        screen.close()


def test_without_a_terminal_it_names_stats(served):
    _, address = served
    done = subprocess.run([CLI, "top", f"http://{address}"], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1 and "hypernbd stats" in done.stderr
