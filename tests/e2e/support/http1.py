"""HTTP/1.1 as the proxies of the tests read and write it: whole messages."""

import re
import socket
from dataclasses import dataclass


@dataclass
class Message:
    """A request or an answer."""

    head: bytes
    body: bytes

    @property
    def line(self) -> str:
        return self.head.split(b"\r\n", 1)[0].decode(errors="replace")

    def header(self, name: str) -> str | None:
        found = re.search(rb"(?im)^" + name.encode() + rb":[ \t]*(.*?)\r$", self.head)
        return found[1].decode() if found else None

    @property
    def has_answer_body(self) -> bool:
        """Of a request: whether its answer may have a body."""
        return not self.line.startswith("HEAD")


class Stream:
    """HTTP messages from a socket, whole ones only."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.buffer = b""

    def _more(self) -> None:
        piece = self.socket.recv(1 << 18)
        if not piece:
            raise ConnectionError("closed")
        self.buffer += piece

    def _take(self, length: int) -> bytes:
        while len(self.buffer) < length:
            self._more()
        taken, self.buffer = self.buffer[:length], self.buffer[length:]
        return taken

    def _take_until(self, end: bytes) -> bytes:
        while end not in self.buffer:
            self._more()
        return self._take(self.buffer.index(end) + len(end))

    def message(self, has_body: bool = True) -> Message:
        """The next message; `has_body` is false for the answer to a HEAD."""
        message = Message(self._take_until(b"\r\n\r\n"), b"")
        if not has_body or re.match(r"HTTP/1.1 (1\d\d|204|304) ", message.line):
            return message
        if message.header("transfer-encoding") == "chunked":
            while True:
                size = self._take_until(b"\r\n")
                message.body += size + self._take(int(size, 16) + 2)
                if int(size, 16) == 0:
                    return message
        message.body = self._take(int(message.header("content-length") or 0))
        return message

    def request(self) -> Message:
        """The next request, of a client; one that waits for leave to send its body gets it."""
        head = self.message(has_body=False)
        if head.header("expect"):
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return Message(head.head, self._take(int(head.header("content-length") or 0)))

    def exchange(self, request: Message) -> Message:
        """Sends a request, to a server, and gives its answer."""
        self.socket.sendall(request.head + request.body)
        while (answer := self.message(request.has_answer_body)).line.startswith("HTTP/1.1 1"):
            pass
        return answer


def s3_error(status: int, code: str, message: str, has_body: bool, headers: dict[str, str] | None = None) -> bytes:
    """An error as S3 answers it."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    headers = {"Content-Type": "application/xml", "Content-Length": str(len(body)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} Refused\r\n{lines}\r\n".encode() + (body if has_body else b"")
