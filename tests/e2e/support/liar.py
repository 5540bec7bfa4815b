"""A proxy that makes an honest S3 service lie: it takes headers out of requests, so that they mean something else.

A signature covers the headers, so it is taken out too; the bucket behind must be open to everybody.
"""

import contextlib
import re
import socket
import threading

from support.proxy import Proxy


class LyingProxy(Proxy):
    """Forwards to `endpoint` without the headers whose names match `dropped` (a regular expression, lower case)."""

    def __init__(self, endpoint: str, dropped: str):
        self.dropped = re.compile(f"(?:authorization|{dropped})$")
        super().__init__(endpoint)

    def serve(self, client: socket.socket, server: socket.socket) -> None:
        # Clients of HTTP/1.1 wait for an answer before the next request: a request starts where a piece does.
        threading.Thread(target=self._answers, args=(server, client), daemon=True).start()
        while piece := client.recv(1 << 18):
            if piece.split(b"\r\n", 1)[0].endswith(b" HTTP/1.1"):
                while b"\r\n\r\n" not in piece:
                    piece += client.recv(1 << 18)
                piece = self._changed(piece)
            server.sendall(piece)

    def _changed(self, request: bytes) -> bytes:
        head, body = request.split(b"\r\n\r\n", 1)
        first, *headers = head.split(b"\r\n")
        kept = [line for line in headers if not self.dropped.match(line.split(b":", 1)[0].decode().lower())]
        return b"\r\n".join([first, *kept]) + b"\r\n\r\n" + body

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := server.recv(1 << 18):
                client.sendall(piece)
        for end in (client, server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
