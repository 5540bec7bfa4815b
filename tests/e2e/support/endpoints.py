"""What a server tells of itself over HTTP: asked as Prometheus does, and taken apart."""

import contextlib
import http.client
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path

SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
LIMIT_S = 120


@dataclass
class Answer:
    """An answer over HTTP."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self):
        return json.loads(self.body)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path):
        super().__init__("localhost", timeout=LIMIT_S)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT_S)
        self.sock.connect(str(self.path))


def ask(address: str | Path, path: str, method: str = "GET", body=None) -> Answer:
    """Asks at `host:port`, or at the Unix socket of this path."""
    if isinstance(address, Path):
        connection = UnixConnection(address)
    else:
        connection = http.client.HTTPConnection(address, timeout=LIMIT_S)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may be answered before all of it was sent
            connection.request(method, path, body=None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


class Page:
    """A page of metrics."""

    def __init__(self, text: str):
        self.types: dict[str, str] = {}
        self.helps: dict[str, str] = {}
        self.samples: dict[tuple[str, frozenset], float] = {}
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, name, kind = line.split(" ")
                assert name not in self.types, f"{name} is there twice"
                self.types[name] = kind
            elif line.startswith("# HELP "):
                _, _, name, words = line.split(" ", 3)
                self.helps[name] = words
            elif line and not line.startswith("#"):
                name, labels, value = SAMPLE.match(line).groups()
                key = name, frozenset(LABEL.findall(labels or ""))
                assert key not in self.samples, f"{line}: twice"
                self.samples[key] = float(value)

    def value(self, name: str, **labels: str) -> float:
        """The value of one series; `name` without the common prefix."""
        return self.samples["hypernbd_" + name, frozenset(labels.items())]

    def sum(self, name: str, **labels: str) -> float:
        """The sum of all series of a metric that have these labels."""
        return sum(
            value
            for (found, its), value in self.samples.items()
            if found == "hypernbd_" + name and its >= set(labels.items())
        )

    def names(self) -> set[str]:
        """The names of all samples."""
        return {name for name, _ in self.samples}


def page(address: str | Path) -> Page:
    """The metrics of a server."""
    answer = ask(address, "/metrics")
    assert answer.status == 200
    return Page(answer.text)
