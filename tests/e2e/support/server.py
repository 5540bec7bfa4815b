"""A volume and an nbdkit that serves it."""

import contextlib
import errno
import os
import re
import signal
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import nbd

from .process import check, run, spawn, wait_for

PROJECT = Path(__file__).resolve().parents[3]
# As `make e2e` says it: "debug" or "release".
BUILD = os.environ.get("HYPERNBD_BUILD", "debug")
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", PROJECT / "target")) / BUILD
PLUGIN = Path(os.environ.get("HYPERNBD_PLUGIN", TARGET / "libhypernbd.so"))
CLI = Path(os.environ.get("HYPERNBD_CLI", TARGET / "hypernbd"))

SERVER_LIMIT_S = 1800
EXIT_LIMIT_S = 180

KI = 1024
MI = 1024 * KI
GI = 1024 * MI
TI = 1024 * GI


def nbdkit_version(program: str) -> tuple[int, int]:
    """(major, minor) of an nbdkit."""
    text = check(program, "--version")
    major, minor = re.search(r"(\d+)\.(\d+)", text).groups()
    return int(major), int(minor)


@dataclass
class Volume:
    """A volume that exists (or, for the error tests, does not)."""

    url: str
    store: object
    size_bytes: int = 0
    block_bytes: int = 0

    def cli(self, *arguments: str, env: dict[str, str] | None = None):
        """Runs `hypernbd` with this volume's store options, but for those given, whatever its status."""
        given = zip(self.store.cli_options[::2], self.store.cli_options[1::2])
        options = [word for option in given if option[0] not in arguments for word in option]
        return run(CLI, *arguments, *options, env={**self.store.env, **(env or {})})


def flush_until_it_succeeds(client) -> None:
    """The store is back; a flush may fail once more while the plugin's back-off runs, but not for ever."""

    def flushed() -> bool:
        try:
            client.flush()
            return True
        except nbd.Error as error:
            assert error.errnum == errno.EIO, error
            return False

    wait_for(flushed, "a flush to succeed with the store back", limit_s=90)


def read_until_it_succeeds(client, length: int, offset: int) -> bytes:
    """As `flush_until_it_succeeds`: a store that is well may still take longer than an impatient server lets a read wait."""

    def read() -> bytes | None:
        try:
            return client.pread(length, offset)
        except nbd.Error as error:
            assert error.errnum == errno.EIO, error
            return None

    return wait_for(read, "a read to succeed with the store back", limit_s=90)


def leave(client) -> None:
    """Disconnects, also from a server that was killed or has hung up: nbdkit told to stop may do so at any request."""
    with contextlib.suppress(nbd.Error):
        client.shutdown()


def create_volume(store, size_bytes: int, block_bytes: int, name: str) -> Volume:
    """Makes a volume through the command line."""
    volume = Volume(store.url(name), store, size_bytes, block_bytes)
    arguments = ["create", volume.url, "--size", str(size_bytes), "--block-size", str(block_bytes)]
    check(CLI, *arguments, *store.cli_options, env=store.env)
    return volume


@dataclass
class Server:
    """An nbdkit process on a unix socket, started and stopped as often as a test wants."""

    nbdkit: str
    volume: Volume
    directory: Path
    parameters: dict[str, str] = field(default_factory=dict)
    nbdkit_options: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.socket = self.directory / "socket"
        self.log = self.directory / "nbdkit.log"

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def command(self) -> list[str]:
        """The command line that serves the volume."""
        # Kept open, however long a busy machine leaves a test without a client; test_linger.py is about the rest.
        given = {"lease_linger": "off", **self.volume.store.parameters, **self.parameters}
        # A server of many volumes is given what they are below.
        place = {} if "volumes" in given else {"backend_url": self.volume.url}
        parameters = {**place, **given}
        return [
            self.nbdkit,
            "-f",
            "--log=stderr",
            "-U",
            str(self.socket),
            *self.nbdkit_options,
            str(PLUGIN),
            *(f"{key}={value}" for key, value in parameters.items()),
        ]

    def environment(self) -> dict[str, str]:
        """What the server finds in its environment beside our own."""
        return {"RUST_LOG": "info", **self.volume.store.env, **self.env}

    def spawn(self) -> subprocess.Popen:
        """Starts nbdkit without waiting for it."""
        self.socket.unlink(missing_ok=True)
        self.process = spawn(self.command(), self.log, env=self.environment(), limit_s=SERVER_LIMIT_S)
        return self.process

    def start(self) -> "Server":
        """Starts nbdkit and waits until a client is served."""
        self.spawn()
        wait_for(self._is_ready, "nbdkit to serve a client")
        return self

    def stand_by(self) -> "Server":
        """Starts nbdkit and waits until it takes connections, without making one."""
        file = self.directory / "pid"
        self.nbdkit_options += ["-P", str(file)]
        self.spawn()
        wait_for(lambda: file.exists() and file.read_text().endswith("\n"), "a server without a client to start")
        return self

    def try_connect(self, export: str = "") -> nbd.NBD | None:
        """A client of an export, if the server lets it have that."""
        client = nbd.NBD()
        client.set_export_name(export)
        try:
            client.connect_unix(str(self.socket))
            return client
        except nbd.Error:
            return None

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"nbdkit ended with {self.process.returncode}:\n{self.log_text()}"
        try:
            with self.connect():
                return True
        except nbd.Error:
            return False

    def handle(self, *, extents: bool = False, lenient: bool = False) -> nbd.NBD:
        """A connected libnbd handle; the caller closes it, or `connect` does.

        `extents` asks for block status; `lenient` lets requests out that libnbd would refuse itself.
        """
        client = nbd.NBD()
        if extents:
            client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        if lenient:
            client.set_strict_mode(0)
        client.connect_unix(str(self.socket))
        return client

    @contextlib.contextmanager
    def connect(self, **options):
        """A connected libnbd handle for the length of a `with`."""
        client = self.handle(**options)
        try:
            yield client
        finally:
            leave(client)

    def terminate(self) -> int:
        """SIGTERM, then waits for the end; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Waits for nbdkit to end by itself; returns the exit status."""
        return self.process.wait(timeout=EXIT_LIMIT_S)

    def kill(self) -> None:
        """SIGKILL: the server gets no chance to do anything more."""
        self.process.kill()
        self.process.wait()

    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def assert_running(self) -> None:
        """Fails with the log's end when nbdkit is gone."""
        assert self.is_running(), f"nbdkit ended with {self.process.returncode}:\n{self.log_text()[-4000:]}"

    def log_text(self) -> str:
        """What nbdkit has written so far, over all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def dispose(self) -> None:
        """Ends the process, however it is, and removes its directory."""
        if self.is_running():
            self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)
