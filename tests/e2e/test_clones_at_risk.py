"""Volumes and clones that are deleted, or made anew, at the place where somebody is making one and was stopped for long."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from support.faulty import Fault
from support.model import Model, pattern, read_all
from support.process import wait_for
from support.server import KI, MI, Volume

pytestmark = pytest.mark.s3_only

SIZE = 8 * MI
BLOCK = 4 * KI
MAKERS = {
    "create": lambda _, url: ["create", url, "--size", str(SIZE)],
    "clone": lambda parent, url: ["clone", parent, url],
    "full": lambda parent, url: ["clone", "--full", parent, url],
}
INODE = r"^PUT \S+/other/inode[? ]"


@pytest.fixture
def parent(make_volume, make_server):
    """A volume of several checkpoints, and how it reads."""
    volume = make_volume(SIZE, BLOCK)
    model = Model(SIZE, BLOCK)
    server = make_server(volume, checkpoint_interval="1h").start()
    write(server, model, 1)
    assert server.terminate() == 0
    return volume, model


def write(server, model, seed: int) -> None:
    """Some checkpoints."""
    rng = random.Random(seed)
    with server.connect() as client:
        for tag in range(4):
            data, at = pattern(64 * KI, 100 * seed + tag), rng.randrange(0, SIZE - 64 * KI, BLOCK)
            client.pwrite(data, at)
            client.flush()
            model.write(at, data)


@dataclass
class Nth(Fault):
    """One of the requests of a kind, by its number among these."""

    number: int = 1
    seen: int = 0

    def applies(self, line: str) -> bool:
        self.seen += bool(re.search(self.where, line))
        return self.seen == self.number and super().applies(line)


@dataclass
class AfterTheInode(Fault):
    """Requests that come after that for the inode."""

    is_sent: bool = False

    def applies(self, line: str) -> bool:
        self.is_sent |= bool(re.search(INODE, line))
        return self.is_sent and super().applies(line)


def late(parent, proxy, what: str, fault: Fault, meanwhile):
    """How a verb ends, of which a request is carried out only after what happens meanwhile."""
    held = proxy.fail(fault)
    volume = parent[0]
    with ThreadPoolExecutor(1) as pool:
        url = volume.store.url("other")
        verb = pool.submit(volume.cli, *MAKERS[what](volume.url, url), "--endpoint-url", proxy.endpoint)
        try:
            wait_for(lambda: held.hits or verb.done(), f"{what} to come so far")
            assert held.hits, verb.result().stderr
            meanwhile(Volume(url, volume.store, SIZE, BLOCK))
        finally:
            proxy.heal()
        return verb.result()


def delete(volume) -> None:
    done = volume.cli("delete", volume.url, "--yes")
    assert done.returncode == 0, done.stderr


def is_other(key: str) -> bool:
    return "/other/" in key or "/other." in key


@pytest.mark.parametrize("what", MAKERS)
def test_what_is_deleted_while_it_is_made_is_not_made(parent, proxy, store, what):
    """The deletion finds no inode, and takes everything else away; the inode that comes afterwards does not stay."""
    done = late(parent, proxy, what, Fault("late", INODE), delete)
    assert done.returncode == 1, done.stdout
    assert [key for key in store.objects() if is_other(key)] == []
    delete(parent[0])


@pytest.mark.parametrize("what", ["clone", "full"])
def test_a_deletion_ends_before_it_is_looked_whether_it_was_made(parent, proxy, store, what):
    """The inode is there, and somebody deletes that volume before whoever has made it has looked at its label once more."""
    done = late(parent, proxy, what, AfterTheInode("late", r"^GET \S+/other\.meta/volume\.json"), delete)
    assert done.returncode == 1, done.stdout
    assert [key for key in store.objects() if is_other(key)] == []
    delete(parent[0])


def test_a_full_clone_replaces_nothing_of_a_volume_made_there_meanwhile(parent, proxy, make_server):
    """Objects of the same names: the copies that come late are refused, and the volume reads as it was written."""
    model = Model(SIZE, BLOCK)
    made = []

    def replace(volume) -> None:
        delete(volume)
        done = volume.cli(*MAKERS["create"](None, volume.url), "--block-size", str(BLOCK))
        assert done.returncode == 0, done.stderr
        server = make_server(volume, checkpoint_interval="1h").start()
        write(server, model, 2)
        assert server.terminate() == 0
        made.append(volume)

    copy = r"^(PUT|POST) \S+/other/\d{10}\.\d+\?(?!.*uploads).*uploadId=\S+ |^PUT \S+/other/\d{10}\.\d+(\?x-id=CopyObject)? "
    done = late(parent, proxy, "full", Nth("late", copy, number=3), replace)
    assert done.returncode == 1, done.stdout
    assert "another" in done.stderr, done.stderr
    server = make_server(made[0], checkpoint_interval="1h").start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE))
