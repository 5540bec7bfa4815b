"""What the system lets a server have: the soft limits of descriptors are no limits of ours."""

import os
import re
import subprocess

import nbd
import pytest

from support.process import wait_for
from support.server import CLI, PLUGIN, Server

SOFT = 64
CLIENTS = 512
pytestmark = pytest.mark.file_only


def limits(pid: int) -> tuple[int, int]:
    """The soft and the hard limit of a process's descriptors."""
    with open(f"/proc/{pid}/limits", encoding="ascii") as lines:
        line = next(line for line in lines if line.startswith("Max open files"))
    return tuple(int(word) for word in line.split()[3:5])


class LimitedServer(Server):
    """A server that is started after this `ulimit`."""

    ulimit: str

    def command(self) -> list[str]:
        return ["sh", "-c", f'ulimit {self.ulimit}; exec "$@"', "sh", *super().command()]


@pytest.fixture
def limited(make_volume, make_server):
    """Makes a server that is started after a `ulimit`."""
    made = []

    def make(ulimit: str) -> LimitedServer:
        plain = make_server(make_volume())
        made.append(LimitedServer(plain.nbdkit, plain.volume, plain.directory))
        made[-1].ulimit = ulimit
        return made[-1]

    yield make
    for server in made:
        server.dispose()


def assert_all_are_served(server, clients) -> None:
    """Each sees what another one wrote; then all leave, and the server ends."""
    clients[0].pwrite(b"seen by all", 0)
    clients[0].flush()
    assert {bytes(client.pread(11, 0)) for client in clients} == {b"seen by all"}
    for client in clients:
        client.shutdown()
    assert server.terminate() == 0


def test_more_connections_than_the_soft_limit_of_descriptors(limited):
    """Each of them is served at once with the others."""
    server = limited(f"-S -n {SOFT}").start()
    soft, hard = limits(server.process.pid)
    assert soft == hard > SOFT
    assert_all_are_served(server, [server.handle() for _ in range(CLIENTS)])


def test_a_hard_limit_is_told_with_what_it_leaves_room_for(limited):
    server = limited("-n 1024").start()
    told = re.search(r"1024 open descriptors are allowed, .* about (\d+) connections; raise", server.log_text())
    assert told, server.log_text()
    assert_all_are_served(server, [server.handle() for _ in range(int(told[1]))])


def test_the_command_line_raises_its_limit(make_volume, make_server, nbdkit):
    """For `serve`, which passes it on, as for all other commands."""
    volume = make_volume()
    socket = make_server(volume).directory / "served"
    command = [str(CLI), "serve", volume.url, "--socket", str(socket)]
    low = ["sh", "-c", f'ulimit -S -n {SOFT}; exec "$@"', "sh"]
    env = {**os.environ, "NBDKIT": nbdkit, "HYPERNBD_PLUGIN": str(PLUGIN)}
    process = subprocess.Popen(low + command, env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for(socket.exists, "the server to listen")
        soft, hard = limits(process.pid)
        assert soft == hard > SOFT
        client = nbd.NBD()
        client.connect_unix(str(socket))
        client.shutdown()
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
