"""A reverse proxy that answers 200 with a page of its own while the store behind it is away: nothing is written by that."""

import nbd
import pytest

from support.faulty import Fault, FaultyProxy
from support.model import Model, pattern, read_all
from support.server import KI, MI, flush_until_it_succeeds, read_until_it_succeeds

SIZE = 8 * MI
WRITES = r"^(PUT|POST|DELETE) "
PAGE = b"<html><head><title>maintenance</title></head><body>back soon</body></html>"

pytestmark = pytest.mark.s3_only


class PageProxy(FaultyProxy):
    """As nginx with `error_page 502 503 504 =200 /maintenance.html`: the kind "outage" is this page, with the ETag of its file."""

    def outage(self, client) -> None:
        head = f'HTTP/1.1 200 OK\r\nServer: nginx\r\nContent-Type: text/html\r\nETag: "65a1-4b"\r\nContent-Length: {len(PAGE)}\r\n'
        client.sendall(head.encode() + b"Connection: close\r\n\r\n" + PAGE)


@pytest.fixture
def proxy(minio):
    """A proxy before the session's MinIO, which says "back soon" when it is told to."""
    made = PageProxy(minio.endpoint)
    yield made
    made.close()


@pytest.mark.parametrize("log", ["none", "s3"])
def test_a_flush_is_not_answered_by_a_page(make_volume, make_server, proxy, store, log):
    parameters = {"io_timeout": "2s", "checkpoint_interval": "1h", "lease_duration": "1h"}
    if log == "s3":
        parameters["backend_wal_url"] = store.url("log")
    server = make_server(make_volume(SIZE), endpoint_url=proxy.endpoint, **parameters).start()
    model = Model(SIZE, 64 * KI)

    def write(client, offset: int, tag: int) -> None:
        client.pwrite(pattern(MI, tag), offset)
        model.write(offset, pattern(MI, tag))

    with server.connect() as client:
        write(client, 0, 1)
        flush_until_it_succeeds(client)
        storm = proxy.fail(Fault("outage", WRITES))
        write(client, 512 * KI, 2)
        with pytest.raises(nbd.Error):
            client.flush()
        assert storm.hits
        server.assert_running()
        model.assert_same(read_until_it_succeeds(client, SIZE, 0), what="what is unpublished is read meanwhile")
        proxy.heal()
        flush_until_it_succeeds(client)
        server.kill()
    # Impatient, it may say EIO where the machine is slow.
    server.parameters["io_timeout"] = "60s"
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE), what="after the page and a kill")
