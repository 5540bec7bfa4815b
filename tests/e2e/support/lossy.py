"""A proxy before an S3 server that loses answers and refuses requests when told to.

The hard case for any client of a store: the request was carried out and its answer never came.
"""

import contextlib
import random
import re
import socket
import threading
import time
from dataclasses import dataclass, field

from support.proxy import Proxy

REFUSAL = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: 88\r\nConnection: close\r\n\r\n"
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>try later</Message></Error>   "
)


@dataclass
class Rule:
    """Which requests go wrong, and how."""

    # "lose": carried out, the answer is lost; "refuse": 503, not carried out; "delay": carried out after `delay_s`, if
    # the client does not wait so long even after it has gone
    action: str
    pattern: str  # searched in the request line, as in "PUT /bucket/key?query HTTP/1.1"
    probability: float = 1.0
    times_max: int | None = None
    delay_s: float = 1.0
    hits: int = 0
    rng: random.Random = field(default_factory=random.Random)

    def applies(self, request_line: str) -> bool:
        if self.times_max is not None and self.hits >= self.times_max:
            return False
        if not re.search(self.pattern, request_line) or self.rng.random() >= self.probability:
            return False
        self.hits += 1
        return True


class LossyProxy(Proxy):
    """Forwards to `endpoint`; requests that `rule` matches go wrong. Set `rule` to None to heal."""

    def __init__(self, endpoint: str):
        self.rule: Rule | None = None
        self.lock = threading.Lock()
        super().__init__(endpoint)

    def _rule(self, piece: bytes) -> Rule | None:
        """The rule for the request that starts in `piece`, if one does and the rule matches."""
        line = piece.split(b"\r\n", 1)[0]
        if not line.endswith(b" HTTP/1.1"):
            return None
        with self.lock:
            rule = self.rule
            return rule if rule and rule.applies(line.decode(errors="replace")) else None

    def serve(self, client: socket.socket, server: socket.socket) -> None:
        # Clients of HTTP/1.1 wait for an answer before the next request: a request starts where a piece does.
        losing = threading.Event()
        threading.Thread(target=self._answers, args=(server, client, losing), daemon=True).start()
        while piece := client.recv(1 << 18):
            rule = self._rule(piece)
            action = rule and rule.action
            if action == "delay":
                time.sleep(rule.delay_s)
            if action == "refuse":
                client.sendall(REFUSAL)
                client.shutdown(socket.SHUT_RDWR)
                return
            if action == "lose":
                losing.set()
            server.sendall(piece)

    def _answers(self, server: socket.socket, client: socket.socket, losing: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while piece := server.recv(1 << 18):
                if losing.is_set() and not piece.startswith(b"HTTP/1.1 100"):
                    break  # the request has been carried out, and nobody will know
                client.sendall(piece)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
