"""A proxy before an S3 server that fails as stores and networks do: by request, by answer, and by whole outages.

It takes requests and answers apart, so that a fault can hit the answer to one kind of request, in its body too.
"""

import contextlib
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

from support.http1 import Message, Stream, s3_error
from support.proxy import Proxy

ERRORS = {
    "500": (500, "InternalError"),
    "503": (503, "ServiceUnavailable"),
    "slow-down": (503, "SlowDown"),
    "429": (429, "TooManyRequests"),
    "denied": (403, "AccessDenied"),
    "expired": (403, "ExpiredToken"),
}
# What a reverse proxy, an ingress or a captive portal answers while the store behind it is away.
FOREIGN = {
    "html-404": (404, b"<html><head><title>404 Not Found</title></head><body>nginx</body></html>"),
    "bare-404": (404, b""),
    "html-412": (412, b"<html>412</html>"),
    "portal": (307, b""),
}
TRICKLE_PIECES = 16
TRICKLE_S = 0.8


@dataclass
class Fault:
    """What goes wrong (a key of `ERRORS` or `FOREIGN`, a method of `FaultyProxy`, or "late": carried out once all is healed), and with
    which requests."""

    kind: str
    where: str = ""  # searched in the request line, as in "PUT /bucket/key?query HTTP/1.1"
    times_max: int | None = None
    hits: list[str] = field(default_factory=list)

    def applies(self, line: str) -> bool:
        if (self.times_max is not None and len(self.hits) >= self.times_max) or not re.search(self.where, line):
            return False
        self.hits.append(line)
        return True


class FaultyProxy(Proxy):
    """Forwards to `endpoint`; requests that `fault` applies to go wrong. `heal` ends it."""

    def __init__(self, endpoint: str):
        self.fault: Fault | None = None
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.healed = threading.Event()
        super().__init__(endpoint)

    def fail(self, fault: Fault) -> Fault:
        """From now on `fault` is in force."""
        self.healed.clear()
        self.fault = fault
        return fault

    def heal(self) -> None:
        """Forwards everything; what hangs is let go."""
        self.fault = None
        self.healed.set()

    def close(self) -> None:
        """Takes no more connections."""
        self.heal()
        super().close()

    def serve(self, client: socket.socket, server: socket.socket) -> None:
        requests, answers = Stream(client), Stream(server)
        while True:
            request = requests.request()
            with self.lock:
                self.requests.append(request.line)
                fault = self.fault if self.fault and self.fault.applies(request.line) else None
            if fault and fault.kind in FOREIGN:
                client.sendall(foreign(*FOREIGN[fault.kind], has_body=request.has_answer_body))
                continue
            if fault and fault.kind in ERRORS:
                status, code = ERRORS[fault.kind]
                client.sendall(s3_error(status, code, "of a test", has_body=request.has_answer_body))
                continue
            if fault and fault.kind in ("reset_before", "hang", "outage"):
                return getattr(self, fault.kind)(client)
            if fault and fault.kind == "late":
                self.healed.wait()
                fault = None
            answer = answers.exchange(request)
            if fault:
                if getattr(self, fault.kind)(client, answer):
                    return
            else:
                client.sendall(answer.head + answer.body)

    # Before a request is carried out.

    def reset_before(self, client: socket.socket) -> None:
        reset(client)

    def outage(self, client: socket.socket) -> None:
        client.close()

    def hang(self, client: socket.socket) -> None:
        self.healed.wait()
        reset(client)

    # After it was.

    def reset_after(self, client: socket.socket, _: Message) -> bool:
        reset(client)
        return True

    def truncate(self, client: socket.socket, answer: Message) -> bool:
        client.sendall(answer.head + answer.body[: len(answer.body) // 2])
        return True

    def corrupt(self, client: socket.socket, answer: Message) -> bool:
        body = bytearray(answer.body)
        if body and re.match(r"HTTP/1.1 20[06] ", answer.line):
            body[len(body) // 2] ^= 0x10
        client.sendall(answer.head + bytes(body))
        return False

    def trickle(self, client: socket.socket, answer: Message) -> bool:
        data = answer.head + answer.body
        step = -(-len(data) // TRICKLE_PIECES)
        for at in range(0, len(data), step):
            client.sendall(data[at : at + step])
            time.sleep(TRICKLE_S / TRICKLE_PIECES)
        return False


def foreign(status: int, body: bytes, has_body: bool) -> bytes:
    """An answer that is not the store's."""
    place = "Location: http://127.0.0.1:1/login\r\n" if status == 307 else ""
    head = f"HTTP/1.1 {status} Foreign\r\nContent-Type: text/html\r\n{place}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + (body if has_body else b"")


def reset(client: socket.socket) -> None:
    """Ends a connection with RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
