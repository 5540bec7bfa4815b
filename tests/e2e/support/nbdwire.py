"""A bare NBD client on a socket, for what a well-behaved library does not do: send and hang up."""

import socket
import struct
from pathlib import Path

INIT_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
REQUEST_MAGIC = 0x25609513
FLAG_C_FIXED_NEWSTYLE = 1
FLAG_C_NO_ZEROES = 2
OPT_EXPORT_NAME = 1

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_ZERO = 0, 1, 2, 3, 4, 5, 6
FLAG_FUA = 1

LIMIT_S = 60


class WireClient:
    """Connects, negotiates the default export, and then sends raw requests (simple replies)."""

    def __init__(self, path: Path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(LIMIT_S)
        self.socket.connect(str(path))
        magic, option_magic, _flags = struct.unpack(">QQH", self.receive(18))
        assert magic == INIT_MAGIC and option_magic == OPTION_MAGIC
        self.socket.sendall(struct.pack(">I", FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES))
        self.socket.sendall(struct.pack(">QII", OPTION_MAGIC, OPT_EXPORT_NAME, 0))
        self.size_bytes, self.flags = struct.unpack(">QH", self.receive(10))
        self.cookie = 0

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes."""
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            assert piece, "the server closed the connection"
            data += piece
        return data

    def request(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> bytes:
        """The bytes of a request."""
        self.cookie += 1
        return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, self.cookie, offset, length or len(data)) + data

    def send(self, *requests: bytes) -> None:
        """Sends requests and waits for no reply."""
        self.socket.sendall(b"".join(requests))

    def send_what_is_taken(self, *requests: bytes) -> None:
        """Sends until the server takes no more, as it may while it waits for us to read its replies."""
        self.socket.settimeout(0.05)
        try:
            self.socket.sendall(b"".join(requests))
        except TimeoutError:
            pass

    def hang_up(self) -> None:
        """Closes the socket at once, with whatever is still to come."""
        self.socket.close()
