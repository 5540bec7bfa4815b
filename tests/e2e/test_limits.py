"""What the system lets a server have: soft limits are no limits of ours, and hard ones are told, with what raises them."""

import contextlib
import os
import re
import subprocess
from pathlib import Path

import nbd
import pytest

from support.cgroup import make_group  # noqa: F401, a fixture
from support.lives import listens
from support.model import pattern
from support.process import wait_for
from support.server import CLI, GI, KI, MI, PLUGIN, Server

SOFT = 64
CLIENTS = 512
pytestmark = pytest.mark.file_only


def limits(pid: int) -> tuple[int, int]:
    """The soft and the hard limit of a process's descriptors."""
    with open(f"/proc/{pid}/limits", encoding="ascii") as lines:
        line = next(line for line in lines if line.startswith("Max open files"))
    return tuple(int(word) for word in line.split()[3:5])


class LimitedServer(Server):
    """A server that is started after this `ulimit`, in these control groups."""

    ulimit = "-S -c 0"
    groups = ()

    def command(self) -> list[str]:
        command = ["sh", "-c", f'ulimit {self.ulimit}; exec "$@"', "sh", *super().command()]
        for group in self.groups:
            command = group.entering(command)
        return command


@pytest.fixture
def limited(make_volume, make_server):
    """Makes a server that is started after a `ulimit`, or in control groups."""
    made = []

    def make(ulimit: str | None = None, groups=(), volume=None, **parameters) -> LimitedServer:
        plain = make_server(volume or make_volume(), **parameters)
        made.append(LimitedServer(plain.nbdkit, plain.volume, plain.directory, plain.parameters))
        made[-1].ulimit = ulimit or LimitedServer.ulimit
        made[-1].groups = groups
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


def threads_of_nbdkit(pid: int) -> int:
    """Threads that have nbdkit's name: its own, and not those of the plugin."""
    names = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            names.append((thread / "comm").read_text())
    return names.count("nbdkit\n")


def connect_as_many(server, count: int, threads_each: int = 0) -> tuple[list[nbd.NBD], int]:
    """Clients, each once its threads are there, and how many were hung up on."""
    clients, refused = [], 0
    for _ in range(count):
        try:
            clients.append(server.handle())
        except nbd.Error:
            refused += 1
            continue
        if threads_each:
            wait_for(lambda: threads_of_nbdkit(server.process.pid) > threads_each * len(clients), "the threads of a connection")
    return clients, refused


def all_at_work(clients, length: int) -> None:
    """Each client writes its own place and reads it back, all at once; then all flush."""

    def done(begun) -> None:
        for client, (cookie, _) in zip(clients, begun):
            while not client.aio_command_completed(cookie):
                client.poll(-1)

    for round_ in range(4):
        data = [pattern(length, 1000 * round_ + number) for number in range(len(clients))]
        writes = [(client.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[number])), number * length), None)
                  for number, client in enumerate(clients)]  # fmt: skip
        done(writes)
        done([(client.aio_flush(), None) for client in clients])
        buffers = [nbd.Buffer(length) for _ in clients]
        done([(client.aio_pread(buffers[number], number * length), None) for number, client in enumerate(clients)])
        assert [bytes(buffer.to_bytearray()) for buffer in buffers] == data


def leave_all(clients) -> None:
    """All disconnect at once: one after another takes long with so many threads."""
    for client in clients:
        client.aio_disconnect(0)
    for client in clients:
        while not client.aio_is_closed():
            client.poll(-1)


def everything(tmp_path) -> dict[str, str]:
    """Each parameter that takes descriptors, threads, memory or room, as large as 1 GiB of memory lets it be sensible."""
    for name in ("journal", "data", "nodes", "buffer"):
        (tmp_path / name).mkdir(mode=0o700)
    return {
        "write_buffer": "256M",
        "cache_memory": "128M",
        "index_memory": "64M",
        "cache_dir": str(tmp_path / "data"),
        "cache_disk": "100G",
        "node_cache_config": f"LocalDisk,{tmp_path}/nodes,32G,ReuseCache",
        "write_buffer_dir": str(tmp_path / "buffer"),
        "backend_wal_url": f"file://{tmp_path}/journal/",
        "runtime_threads": "64",
        "compaction": "auto",
        "retention_interval": "1s",
        "metrics": f"unix:{tmp_path}/metrics",
        "io_timeout": "2m",
    }


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def descriptors_below(pid: int, directory: Path) -> int:
    """How many lead to something in a directory."""
    links = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it is closed by now, as a client is that has just left
            links.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return len([link for link in links if link.startswith(str(directory))])


def test_every_feature_with_512_clients_in_a_gibibyte(limited, make_group, make_volume, tmp_path):
    """The soft limit is 1024, as it usually is; a connection takes three."""
    group = make_group("memory", 1 * GI)
    server = limited("-S -n 1024", [group], make_volume(256 * MI, 64 * KI), **everything(tmp_path)).start()
    clients, refused = connect_as_many(server, CLIENTS)
    assert refused == 0, server.log_text()
    all_at_work(clients, 8 * KI)
    leave_all(clients)
    assert server.terminate() == 0, server.log_text()
    assert "allowed" not in server.log_text() and "allows" not in server.log_text(), server.log_text()
    assert 256 * MI < group.peak() <= 1 * GI


def test_every_feature_with_more_clients_than_a_hard_limit_has_room_for(limited, make_volume, tmp_path):
    """Those that there is room for are served, with all that the volume itself needs; the others are refused with a sentence."""
    server = limited("-n 1024", (), make_volume(256 * MI, 64 * KI), **everything(tmp_path)).start()
    told = re.search(r"about (\d+) connections", server.log_text())
    clients, refused = connect_as_many(server, CLIENTS)
    assert len(clients) >= int(told[1]) and refused > 0
    all_at_work(clients, 8 * KI)
    assert descriptors(server.process.pid) < 1024
    assert re.search(r"a client is refused: 1024 open descriptors .*`ulimit -Hn` .*LimitNOFILE=", server.log_text())
    assert "Too many open files" not in server.log_text(), server.log_text()
    # There is room again once some have left.
    for client in clients[:10]:
        client.shutdown()
    wait_for(lambda: connect_as_many(server, 1)[1] == 0, "a place that was left to be taken")
    leave_all(clients[10:])
    assert server.terminate() == 0, server.log_text()


def test_no_memory_is_locked_and_no_temporary_directory_used(limited, make_volume, tmp_path):
    """So no limit of locked memory, and no full or absent $TMPDIR, is in anybody's way."""
    server = limited("-l 0", (), make_volume(), **everything(tmp_path))
    server.env = {"TMPDIR": str(tmp_path / "nothing")}
    server.start()
    clients = [server.handle() for _ in range(4)]
    all_at_work(clients, 8 * KI)
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    assert re.search(r"^VmLck:\s+0 kB$", status, re.MULTILINE), status
    leave_all(clients)
    assert server.terminate() == 0, server.log_text()


def test_caches_take_few_descriptors_whatever_room_they_have(limited, make_volume, tmp_path):
    counts = []
    for name, disk, nodes in (("small", "64M", "32M"), ("large", "100G", "32G")):
        (tmp_path / name).mkdir()
        parameters = {
            "cache_dir": str(tmp_path / name),
            "cache_disk": disk,
            "node_cache_config": f"LocalDisk,{tmp_path}/{name},{nodes},ReuseCache",
        }
        server = limited(None, (), make_volume(), **parameters).start()
        held = server.handle()
        assert [path for path in Path(tmp_path / name).rglob("*") if "foyer" in path.name], "there are no caches"
        counts.append(descriptors_below(server.process.pid, tmp_path / name))
        held.shutdown()
        assert server.terminate() == 0
    assert counts[0] == counts[1] <= 6, counts


def test_too_few_threads_are_told_and_no_more_than_fit_are_begun(limited, make_group):
    """A control group's limit, as systemd's TasksMax= is one: each connection has 17 threads."""
    group = make_group("pids", 400)
    server = limited(None, [group]).start()
    told = re.search(rf"{group.limit_file} allows 400 threads, .* about (\d+) connections; .*TasksMax=", server.log_text())
    assert told, server.log_text()
    # The threads of a connection come a moment after it, and those of one that is refused or has left go a moment after it.
    clients, refused = connect_as_many(server, int(told[1]) + 5, threads_each=17)
    assert abs(len(clients) - int(told[1])) <= 2 and refused > 0
    all_at_work(clients, 8 * KI)
    assert re.search(rf"a client is refused: {group.limit_file} allows 400 threads, .*TasksMax=", server.log_text())
    leave_all(clients)
    assert server.terminate() == 0, server.log_text()


def test_who_takes_the_place_of_a_client_that_leaves_is_not_refused(limited, make_group):
    """The threads of a connection go a moment after it."""
    group = make_group("pids", 400)
    server = limited(None, [group]).start()
    told = re.search(r"about (\d+) connections; .*TasksMax=", server.log_text())
    clients, refused = connect_as_many(server, int(told[1]) + 5, threads_each=17)
    assert refused > 0, "there is room for more: the test tests nothing"
    for _ in range(10):
        clients.pop(0).shutdown()
        came, refused = connect_as_many(server, 1)
        assert refused == 0, server.log_text()
        clients += came
    all_at_work(clients, 8 * KI)
    leave_all(clients)
    assert server.terminate() == 0, server.log_text()


def test_too_little_memory_is_told_at_the_start(limited, make_group):
    group = make_group("memory", 1 * GI)
    server = limited(None, [group]).start()
    told = re.search(rf"{group.limit_file} allows 1 GiB of memory: .* take up to 960 MiB, .* about (\d+) connections; .*MemoryMax=",
                     server.log_text())  # fmt: skip
    assert told and 50 < int(told[1]) < 150, server.log_text()
    clients, refused = connect_as_many(server, int(told[1]))
    assert refused == 0
    all_at_work(clients, 8 * KI)
    leave_all(clients)
    assert server.terminate() == 0, server.log_text()


def test_the_command_line_raises_its_limit(make_volume, make_server, nbdkit):
    """For `serve`, which passes it on, as for all other commands."""
    volume = make_volume()
    socket = make_server(volume).directory / "served"
    command = [str(CLI), "serve", volume.url, "--socket", str(socket)]
    low = ["sh", "-c", f'ulimit -S -n {SOFT}; exec "$@"', "sh"]
    env = {**os.environ, "NBDKIT": nbdkit, "HYPERNBD_PLUGIN": str(PLUGIN)}
    process = subprocess.Popen(low + command, env=env, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: listens(socket), "the server to listen")
        soft, hard = limits(process.pid)
        assert soft == hard > SOFT
        client = nbd.NBD()
        client.connect_unix(str(socket))
        client.shutdown()
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0
