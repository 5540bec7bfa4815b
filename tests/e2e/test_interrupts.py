"""The ends of `hypernbd serve`: clean whatever asks for them, and no success where writes were lost."""

import re
import signal
from pathlib import Path

import pytest

from support.serve import WRITTEN, Served
from support.stores import S3Store


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
@pytest.mark.parametrize("has_temporary", [True, False])
def test_lost_writes_are_no_success(make_volume, serve, own_minio, has_temporary):
    """With the store gone at the end, what was not flushed is lost, and the exit status says so, whatever became of the temporary
    directory."""
    volume = make_volume(in_store=S3Store(own_minio))
    served = serve(volume, "-o", "io_timeout=2s", "-o", "checkpoint_interval=1h", has_temporary=has_temporary)
    client = served.connect()
    client.pwrite(WRITTEN, 5)
    served.is_announced()
    own_minio.kill()
    client.shutdown()
    served.process.terminate()
    assert served.wait() == 1
    said = served.log.read_text()
    assert "closing the volume" in said and "may be lost" in said and "panicked" not in said
    assert served.temporary.exists() == has_temporary
    assert list(served.temporary.glob("*")) == []
