"""`hypernbd serve` as a process, on a terminal or without."""

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import nbd

from .model import pattern
from .process import check, wait_for
from .server import CLI, MI, PLUGIN

NBDKIT_LIMIT_S = 180
WRITTEN = pattern(1 * MI, 7)
START = "import os,sys; os.setsid(); os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"


def hear_hangups() -> None:
    """In a child: as in a shell, even where the tests themselves were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Served:
    """`hypernbd serve` with a temporary directory of its own, or none that is there, on a terminal of its own if asked for."""

    def __init__(
        self, volume, nbdkit, directory: Path, socket: Path, *options, terminal=False, prefix=(), has_temporary=True
    ):
        self.socket, self.temporary = socket, directory / "tmp"
        if has_temporary:
            self.temporary.mkdir()
        self.log = directory / "serve.log"
        # As `Server` has it.
        kept = ["--lease-linger", "off"]
        command = [CLI, "serve", volume.url, "--socket", socket, *kept, *options, *volume.store.cli_options]
        env = {"NBDKIT": nbdkit, "HYPERNBD_PLUGIN": PLUGIN, "TMPDIR": self.temporary}
        self.master = None
        streams = {"stdin": subprocess.DEVNULL, "stdout": open(self.log, "ab"), "stderr": subprocess.STDOUT}
        if terminal:
            self.master, slave = pty.openpty()
            streams = {"stdin": slave, "stdout": slave, "stderr": slave}
            # A session of its own, of which the terminal is opened first and so controls it.
            prefix = ("/usr/bin/python3", "-c", START)
        self.process = subprocess.Popen(
            [str(part) for part in (*prefix, *command)],
            env={**os.environ, **volume.store.env, **{key: str(value) for key, value in env.items()}},
            preexec_fn=hear_hangups,
            **streams,
        )
        if terminal:
            os.close(slave)

    def write_unflushed(self) -> None:
        """As a client that leaves without a flush."""
        self.connect().pwrite(WRITTEN, 5)

    def connect(self) -> nbd.NBD:
        """A client, once it can connect."""

        def connected():
            assert self.process.poll() is None, self.log.read_text()
            client = nbd.NBD()
            try:
                client.connect_unix(str(self.socket))
                return client
            except nbd.Error:
                return None

        return wait_for(connected, "`hypernbd serve` to serve")

    def is_announced(self) -> None:
        """Waits until signals are passed on: the announcement comes after that was set up."""
        wait_for(lambda: "Serving" in self.log.read_text(), "the announcement")

    def vanish(self) -> None:
        """Closes the terminal."""
        os.close(self.master)

    def end(self) -> int:
        """SIGTERM, then waits for the end, which is a regular one once the clients have gone."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """SIGKILL for nbdkit, which the command line then follows."""
        for pid in check("pgrep", "-P", str(self.process.pid)).split():
            os.kill(int(pid), signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        return self.process.wait(timeout=NBDKIT_LIMIT_S)


@contextlib.contextmanager
def served_with_buffer(volume, nbdkit, *options):
    """`hypernbd serve` that may be restarted, announced, and what it leaves gone afterwards: `write_buffer_dir` and its socket are in a
    directory of its own, whose path is short."""
    directory = Path(tempfile.mkdtemp(prefix="hypernbd-"))
    (directory / "serve").mkdir()
    buffer = ["--write-buffer", "16M", "--write-buffer-dir", str(directory / "buffer"), "--checkpoint-interval", "1h"]
    served = Served(volume, nbdkit, directory / "serve", directory / "socket", *buffer, *options)
    try:
        served.is_announced()
        yield served
    finally:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()
        shutil.rmtree(directory, ignore_errors=True)
