"""What a load costs: S3 requests by kind, bytes on the line, and the server's memory."""

import json
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """What passed the proxy: requests by kind (the names are the proxy's) and bytes each way, heads included."""

    requests: dict[str, int]
    sent_bytes: int
    received_bytes: int

    def since(self, earlier: "Traffic") -> "Traffic":
        """What passed after `earlier`."""
        requests = {kind: count - earlier.requests.get(kind, 0) for kind, count in self.requests.items()}
        return Traffic(
            {kind: count for kind, count in requests.items() if count},
            self.sent_bytes - earlier.sent_bytes,
            self.received_bytes - earlier.received_bytes,
        )

    def count(self) -> int:
        """Requests of all kinds."""
        return sum(self.requests.values())

    def size_bytes(self) -> int:
        """Bytes of both directions."""
        return self.sent_bytes + self.received_bytes


@dataclass(frozen=True)
class Cost:
    """The price of a load that moved `user_bytes` between client and server. No traffic where nothing counts it."""

    user_bytes: int
    peak_rss_bytes: int
    traffic: Traffic | None = None

    def requests_per_mb(self) -> float | None:
        """S3 requests for each 1,000,000 bytes of the client's."""
        if self.traffic is None or not self.user_bytes:
            return None
        return self.traffic.count() / (self.user_bytes / 1e6)

    def bytes_per_user_byte(self) -> float | None:
        """Bytes on the line, both directions, for each byte of the client's."""
        if self.traffic is None or not self.user_bytes:
            return None
        return self.traffic.size_bytes() / self.user_bytes

    def published(self) -> bool:
        """Whether the load's bytes went to the store while it ran: more than a few requests without data would."""
        return self.traffic is not None and self.traffic.sent_bytes > 1_000_000


def read_traffic(address: str) -> Traffic:
    """Asks the proxy's control address, `host:port`, what has passed so far."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=10) as control:
        with control.makefile("rb") as answer:
            counts = json.load(answer)
    return Traffic(counts["requests"], counts["sent_bytes"], counts["received_bytes"])
