"""`hypernbd attach` of servers that want TLS."""

import itertools
import random
import signal
import threading

import nbd
import pytest

from support.process import check, run
from support.server import CLI, KI, MI
from test_attach import BLOCK, SIZE, Relay, attached, content  # noqa: F401 (a fixture)

pytestmark = pytest.mark.file_only


def certificates(directory):
    """What nbdkit-tls(1) asks for: of a server that is called localhost, and of a client."""
    directory.mkdir()

    def path(name):
        return str(directory / f"{name}.pem")

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    check("openssl", "req", "-x509", *key, "-days", "2", "-subj", "/CN=a test", "-keyout", path("ca-key"), "-out", path("ca-cert"),
          "-addext", "basicConstraints=critical,CA:TRUE")  # fmt: skip
    for name, usage in [("server", "serverAuth"), ("client", "clientAuth")]:
        check("openssl", "req", *key, "-subj", f"/CN={name}", "-keyout", path(f"{name}-key"), "-out", path(f"{name}-request"))
        extensions = directory / "extensions"
        extensions.write_text(f"subjectAltName=DNS:localhost\nextendedKeyUsage={usage}\n")
        check("openssl", "x509", "-req", "-in", path(f"{name}-request"), "-CA", path("ca-cert"), "-CAkey", path("ca-key"),
              "-CAcreateserial", "-days", "2", "-extfile", str(extensions), "-out", path(f"{name}-cert"))  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return certificates(tmp_path_factory.mktemp("tls") / "pki")


@pytest.fixture
def secured(attached, pki, monkeypatch):  # noqa: F811
    """As `attached`, with a server that speaks to clients of the same authority only."""

    def command_of(server):
        return f"nbds+unix:///?socket={server.socket}&tls-certificates={pki}"

    monkeypatch.setattr(Relay, "uri", staticmethod(command_of))
    return lambda *plugin, options=(): attached(
        "--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer", *plugin, options=options
    )


def test_servers_come_and_go_below_tls(secured):
    server, relay = secured("memory", str(SIZE))
    data = random.Random(3).randbytes(4 * MI)
    relay.client.pwrite(data, 0)
    assert relay.client.pread(len(data), 0) == data
    relay.client.pwrite(content(0), 0)
    server.end()
    server.start()
    assert relay.client.pread(BLOCK, 0) == content(0)
    # A server that is told to stop ends once its clients have gone, and the relay goes when a request is refused. The first ones may
    # be answered yet: the signal and they come by different ways.
    ended = threading.Event()

    def write():
        while not ended.is_set():
            relay.client.pwrite(content(1), BLOCK)

    server.process.send_signal(signal.SIGTERM)
    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    try:
        server.process.wait()
        server.start()
    finally:
        ended.set()
        writing.join()
    assert relay.client.pread(BLOCK, BLOCK) == content(1)
    assert relay.client.pread(4 * MI - 8 * KI, 8 * KI) == data[8 * KI :]


def test_more_is_under_way_than_fits_into_sockets(secured):
    """Both ways at once: neither side may wait for the other to read first."""
    server, relay = secured("memory", "128M")
    pieces = range(40)
    data = [random.Random(number).randbytes(MI) for number in pieces]
    for number in pieces:
        relay.client.pwrite(data[number], number * MI)
    # The server has 16 threads for a connection: when all of them answer reads, nobody takes the writes.
    buffers = [nbd.Buffer(MI) for _ in pieces]
    cookies = [relay.client.aio_pread(buffers[number], number * MI) for number in pieces]
    for number in pieces:
        copy = nbd.Buffer.from_bytearray(bytearray(data[number]))
        cookies.append(relay.client.aio_pwrite(copy, (64 + number) * MI))
    while relay.client.aio_in_flight():
        relay.client.poll(-1)
    assert all(relay.client.aio_command_completed(cookie) for cookie in cookies)
    for number in pieces:
        assert bytes(buffers[number].to_bytearray()) == data[number]
        assert relay.client.pread(MI, (64 + number) * MI) == data[number]


def test_a_server_that_is_not_the_right_one_is_refused(secured, tmp_path, pki):
    server, _ = secured("memory", str(SIZE))
    foreign = certificates(tmp_path / "foreign")

    numbers = itertools.count()

    def said(uri):
        done = run(CLI, "attach", uri, "--foreground", f"--kernel-socket={tmp_path / 'apart' / str(next(numbers))}")
        assert done.returncode == 1, done.stderr
        return done.stderr

    (tmp_path / "apart").mkdir()
    socket = f"socket={server.socket}"
    assert "it wants TLS" in said(f"nbd+unix:///?{socket}")
    assert "invalid peer certificate" in said(f"nbds+unix:///?{socket}&tls-certificates={foreign}")
    assert "not valid for name" in said(f"nbds+unix:///?{socket}&tls-certificates={pki}&tls-hostname=other")
    assert "ca-cert.pem" in said(f"nbds+unix:///?{socket}&tls-certificates={tmp_path}")
