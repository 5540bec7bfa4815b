"""Lives of a server with a log and caches: what a test of another life begins with."""

import json
import socket
from pathlib import Path

import nbd
import pytest

from .model import pattern, read_all
from .process import spawn, wait_for
from .server import CLI, KI, MI, Server, Volume

SIZE = 8 * MI
IN_LOG = 4 * MI
"""Where the log alone has something."""
NOTE = 64 * KI
"""Length of what is flushed to a log."""
LOG_TRIES = 5


def listens(path: Path) -> bool:
    """Whether somebody listens on a Unix socket: it is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


def refused(server: Server) -> str:
    """A server that ends by itself before it serves, or to which no client can connect; returns its log."""
    server.spawn()
    wait_for(lambda: listens(server.socket) or not server.is_running(), "nbdkit to listen or to end")
    if server.is_running():
        with pytest.raises(nbd.Error):
            server.handle()
        server.assert_running()
        server.kill()
    return server.log_text()


def begin(volume, proxy, log, *words):
    """A verb of the command line through a proxy to the volume's store, on S3; its output goes to `log`."""
    options = ["--endpoint-url", proxy.endpoint, *volume.store.cli_options[2:]]
    return spawn([str(CLI), *words, *options], log, env=volume.store.env, limit_s=300)


def close(server: Server) -> None:
    """A clean end."""
    assert server.terminate() == 0, server.log_text()


def publish(server: Server, tag: int, offset: int = 0) -> None:
    """Writes 1 MiB, reads it back so that the caches have it, and ends cleanly, which publishes it."""
    server.start()
    with server.connect() as client:
        client.pwrite(pattern(MI, tag), offset)
        client.flush()
    close(server)
    server.start()
    with server.connect() as client:
        assert client.pread(MI, offset) == pattern(MI, tag)
    close(server)


def flush_to_log_and_kill(server: Server, tag: int, offset: int = IN_LOG) -> None:
    """Leaves a write in the log alone."""
    server.start()
    with server.connect() as client:
        client.pwrite(pattern(NOTE, tag), offset)
        client.flush()
        server.kill()


def last_checkpoint(volume: Volume) -> int:
    """The number of the newest checkpoint, 0 for none."""
    done = volume.cli("info", volume.url, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["last_checkpoint"]


def with_the_log_alone(leave_one):
    """Calls `leave_one`, which leaves a killed server's flushed write in a log, until it is in the log alone. It gives what the test
    wants, the volume, and the newest checkpoint before that write. A log that takes more than 5 s for a record leaves the flush to a
    checkpoint too, and then another volume is needed."""
    for _ in range(LOG_TRIES):
        wanted, volume, before = leave_one()
        if last_checkpoint(volume) == before:
            return wanted
        deleted = volume.cli("delete", volume.url, "--yes")
        assert deleted.returncode == 0, deleted.stderr
    raise AssertionError("the log was slower than a checkpoint each time")


def assert_reads(server: Server, expected: dict[int, bytes]) -> None:
    """What a client finds at these offsets; the server ends cleanly."""
    server.start()
    with server.connect() as client:
        for offset, data in expected.items():
            assert client.pread(len(data), offset) == data, f"at {offset}"
    close(server)


def assert_flushed_writes_survive(server: Server) -> None:
    """Two flushed writes are there after a kill each."""
    for tag in (65, 66):
        flush_to_log_and_kill(server, tag, SIZE - (tag - 60) * NOTE)
    assert_reads(server, {SIZE - (tag - 60) * NOTE: pattern(NOTE, tag) for tag in (65, 66)})


def assert_is_empty(server: Server) -> None:
    """Nothing of an earlier volume is read."""
    server.start()
    with server.connect() as client:
        assert read_all(client, SIZE) == bytes(SIZE), "an old volume's bytes"
    close(server)
