"""What the proxies before an S3 server have in common: a listener, and a thread for each connection with the server's end."""

import contextlib
import errno
import socket
import threading
from urllib.parse import urlsplit

from .process import wait_for


class Proxy:
    """Takes connections at `endpoint` and hands each to `serve` with one to the server behind."""

    def __init__(self, endpoint: str):
        address = urlsplit(endpoint)
        self.upstream = (address.hostname, address.port)
        self.under_way: set[socket.socket] = set()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Takes no more connections."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def settle(self) -> None:
        """Waits until what clients that are gone had sent is carried out, which the store may be at still."""
        with socket.create_connection(self.listener.getsockname(), timeout=60) as last:
            # Connections are taken in their order: once this one is at its end, all before it are under way or over.
            last.shutdown(socket.SHUT_WR)
            last.recv(1)
        wait_for(
            lambda: not any(has_gone(client) for client in list(self.under_way)),
            "the requests of those who are gone to be carried out",
        )

    def serve(self, client: socket.socket, server: socket.socket) -> None:
        """Carries one connection to its end; both sockets are closed afterwards."""
        raise NotImplementedError

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.under_way.add(client)
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError), client, socket.create_connection(self.upstream) as server:
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.serve(client, server)
        finally:
            self.under_way.discard(client)


def has_gone(client: socket.socket) -> bool:
    """Whether the other end of a connection is gone, or has sent what is not read yet. One that is closed here is over."""
    try:
        client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        return error.errno != errno.EBADF
