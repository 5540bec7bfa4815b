"""Processes of a run: each is started with its own log, awaited until it serves, and ended by its own pid."""

import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from .loads import connect

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 180
POLL_S = 0.02
LISTENS = "00010000"  # the flag of a listening socket in /proc/net/unix


class ProcessFailed(Exception):
    """A process ended, or did not come up; the message ends with its log."""


class Process:
    """A child process, stopped when the `with` block ends, however it ends."""

    def __init__(self, name: str, command: list, log: Path, env: dict | None = None, **popen):
        self.name = name
        self.log = log
        with open(log, "ab") as output:
            popen.setdefault("stdout", output)
            self.popen = subprocess.Popen([str(word) for word in command], stderr=output, env=env, **popen)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def wait_until(self, ready, poll_s: float = POLL_S) -> None:
        """Waits until `ready()` is true; fails when the process ends first or takes too long."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if self.popen.poll() is not None:
                raise ProcessFailed(f"{self.name} ended with status {self.popen.returncode}\n{self.tail()}")
            if time.monotonic() > deadline:
                self.stop()
                raise ProcessFailed(f"{self.name} does not answer after {START_TIMEOUT_S} s\n{self.tail()}")
            time.sleep(poll_s)

    def stop(self) -> None:
        """Asks the process to end and waits for it; kills it when it does not."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
            try:
                self.popen.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
                raise ProcessFailed(f"{self.name} did not end within {STOP_TIMEOUT_S} s\n{self.tail()}") from None
            except BaseException:
                self.popen.kill()
                self.popen.wait()
                raise

    def check_alive(self) -> None:
        """Fails when the process has ended on its own."""
        if self.popen.poll() is not None:
            raise ProcessFailed(f"{self.name} ended with status {self.popen.returncode}\n{self.tail()}")

    def tail(self, lines: int = 15) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def peak_rss_bytes(self) -> int:
        """Largest resident size the process has had so far (VmHWM, proc(5))."""
        return self._status_bytes("VmHWM")

    def rss_bytes(self) -> int:
        """Resident size of the process now (VmRSS, proc(5))."""
        return self._status_bytes("VmRSS")

    def _status_bytes(self, key: str) -> int:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise ProcessFailed(f"{self.name} has no {key}: it has ended\n{self.tail()}")


class Minio(Process):
    """A MinIO server on a free loopback port, with a data directory of its own."""

    def __init__(self, program: Path, directory: Path, env: dict):
        data = directory / "minio"
        data.mkdir()
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        command = [program, "server", "--quiet", "--address", f"127.0.0.1:{self.port}", data]
        super().__init__("MinIO", command, directory / "minio.log", env)
        self.wait_until(self._healthy)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint + "/minio/health/ready", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False


class Proxy(Process):
    """The delay proxy in front of a server."""

    def __init__(self, program: Path, directory: Path, port: int, delay_ms: float, line_mb_per_s: int):
        command = [program, "--to", f"127.0.0.1:{port}", "--delay-ms", delay_ms, "--line-mb-per-s", line_mb_per_s]
        command += ["--control", "127.0.0.1:0"]
        super().__init__("delay-proxy", command, directory / "proxy.log", stdout=subprocess.PIPE)
        address, self.control = (self.popen.stdout.readline().decode().strip() for _ in range(2))
        if not self.control:
            self.stop()
            raise ProcessFailed(f"delay-proxy did not start\n{self.tail()}")
        self.endpoint = "http://" + address


class Nbdkit(Process):
    """nbdkit serving one plugin on a Unix socket. It has served a connection, unless `wait` is false."""

    def __init__(
        self, program: Path, directory: Path, plugin, parameters: list, env: dict | None = None, wait: bool = True
    ):
        self.socket = directory / "nbd.sock"
        self.socket.unlink(missing_ok=True)
        self.uri = f"nbd+unix:///?socket={self.socket}"
        command = [program, "-f", "--exit-with-parent", "-U", self.socket, plugin, *parameters]
        super().__init__("nbdkit", command, directory / "nbdkit.log", env)
        if wait:
            self.wait_until(self._accepts)
            self._open()

    def listens(self) -> bool:
        """Whether a client can connect: its greeting then waits for the server. Asks the kernel, not the server."""
        sockets = Path("/proc/net/unix").read_text().splitlines()
        return any(line.endswith(f" {self.socket}") and line.split()[3] == LISTENS for line in sockets)

    def _open(self) -> None:
        """Connects once: the greeting comes before the plugin has opened its volume, which is not to be measured."""
        try:
            connect(self.uri).shutdown()
        except BaseException as error:
            self.stop()
            raise ProcessFailed(f"nbdkit refuses a client: {error}\n{self.tail()}") from error

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.socket))
                return bool(client.recv(1))
            except OSError:
                return False


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
