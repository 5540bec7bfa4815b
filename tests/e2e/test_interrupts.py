"""The ends of `hypernbd serve`: clean whatever asks for them, and no success where writes were lost."""

import os
import pty
import re
import signal
import subprocess
from pathlib import Path

import nbd
import pytest

from support.model import pattern
from support.process import wait_for
from support.server import CLI, MI, PLUGIN
from support.stores import S3Store

NBDKIT_LIMIT_S = 120
WRITTEN = pattern(1 * MI, 7)
START = "import os,sys; os.setsid(); os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"


def hear_hangups() -> None:
    """In a child: as in a shell, even where the tests themselves were started with nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Served:
    """`hypernbd serve` with a temporary directory of its own, on a terminal of its own if asked for."""

    def __init__(self, volume, nbdkit, directory: Path, socket: Path, *options, terminal=False, prefix=()):
        self.socket, self.temporary = socket, directory / "tmp"
        self.temporary.mkdir()
        self.log = directory / "serve.log"
        command = [CLI, "serve", volume.url, "--socket", socket, *options, *volume.store.cli_options]
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
        self._connect().pwrite(WRITTEN, 5)

    def _connect(self) -> nbd.NBD:
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

    def wait(self) -> int:
        return self.process.wait(timeout=NBDKIT_LIMIT_S)


@pytest.fixture
def serve(nbdkit, tmp_path, make_server):
    """Starts `hypernbd serve` for a volume; it ends with the test."""
    running = []

    def start(volume, *options, **more) -> Served:
        socket = make_server(volume).directory / "served"
        running.append(Served(volume, nbdkit, tmp_path, socket, *options, **more))
        return running[-1]

    yield start
    for served in running:
        if served.process.poll() is None:
            served.process.kill()
            served.process.wait()


@pytest.mark.parametrize("end", ["SIGHUP", "SIGTERM", "SIGINT", "terminal"])
@pytest.mark.file_only
def test_every_end_is_clean(make_volume, make_server, serve, end):
    """What was written is there, the status is a success, and the temporary directory is empty."""
    volume = make_volume()
    served = serve(volume, terminal=end == "terminal")
    served.write_unflushed()
    if end == "terminal":
        served.vanish()
    else:
        served.is_announced()
        served.process.send_signal(getattr(signal, end))
    assert served.wait() == 0
    assert list(served.temporary.iterdir()) == []
    with make_server(volume).start().connect() as client:
        assert client.pread(len(WRITTEN), 5) == WRITTEN


@pytest.mark.file_only
def test_nohup_stays_in_force(make_volume, serve):
    """A hangup that the server was started to ignore is not caught."""
    served = serve(make_volume(), prefix=("nohup",))
    served.is_announced()
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    ignored, caught = (int(re.search(rf"{name}:\s*(\w+)", status)[1], 16) for name in ("SigIgn", "SigCgt"))
    hangup, term = 1 << (signal.SIGHUP - 1), 1 << (signal.SIGTERM - 1)
    assert ignored & hangup and not caught & hangup and caught & term
    served.process.terminate()
    assert served.wait() == 0


@pytest.mark.s3_only
def test_lost_writes_are_no_success(make_volume, serve, own_minio):
    """With the store gone at the end, what was not flushed is lost, and the exit status says so."""
    volume = make_volume(in_store=S3Store(own_minio))
    served = serve(volume, "-o", "io_timeout=2s", "-o", "checkpoint_interval=1h")
    client = served._connect()
    client.pwrite(WRITTEN, 5)
    served.is_announced()
    own_minio.kill()
    client.shutdown()
    served.process.terminate()
    assert served.wait() == 1
    said = served.log.read_text()
    assert "closing the volume" in said and "may be lost" in said and "panicked" not in said
    assert list(served.temporary.iterdir()) == []
