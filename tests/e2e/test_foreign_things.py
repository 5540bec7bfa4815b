"""What is not a volume's is not touched, what cannot be checked is not passed, and every number has an end."""

import errno
import json
import struct

import nbd
import pytest

from support.faulty import Fault
from support.lives import SIZE, close
from support.model import pattern
from support.others import objects_of
from support.process import run, wait_for
from support.server import CLI, KI, MI

CHECKPOINT_NUMBERS = (1 << 30) - 1
LAST_SEQUENCE_AT = 88
"""Where an inode says how many checkpoint numbers were used: behind i_size and i_blocks."""


@pytest.mark.file_only
@pytest.mark.parametrize("command", ["create", "probe"])
@pytest.mark.parametrize("name", ["scratch", "lock"])
def test_files_that_were_there_stay_as_they_were(store, command, name):
    directory = store.directory / "mine"
    (directory / "scratch" / "old").mkdir(parents=True)
    if name == "lock":
        (directory / "scratch" / "old").rmdir()
        (directory / "scratch").rmdir()
        (directory / "lock").write_text("mine")
    else:
        (directory / "scratch" / "old" / "file").write_text("mine")

    def look() -> dict[str, str]:
        return {str(path): path.read_text() if path.is_file() else "" for path in directory.rglob("*")}

    before, more = look(), ["--size", str(SIZE)] if command == "create" else []
    done = run(CLI, command, f"file://{directory}/", *more)
    assert look() == before, done.stderr
    if command == "create":
        assert done.returncode != 0 and str(directory) in done.stderr, done.stderr


@pytest.mark.s3_only
@pytest.mark.parametrize("kind", ["expired", "503", "html-404", "bare-404"])
def test_a_volume_is_not_deleted_while_its_lease_cannot_be_looked_at(make_volume, make_server, proxy, kind):
    server = make_server(make_volume(SIZE)).start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 0)
        client.flush()
        fault = proxy.fail(Fault(kind, r"^(GET|HEAD) \S+/lease[? ]"))
        command = [CLI, "delete", server.volume.url, "--yes", "--region", "us-east-1", "--endpoint-url", proxy.endpoint]
        done = run(*command, env=server.volume.store.env)
        assert done.returncode != 0 and fault.hits, done.stderr
        client.pwrite(pattern(MI, 2), MI)
        client.flush()
    close(server)
    server.start()
    with server.connect() as client:
        assert client.pread(2 * MI, 0) == pattern(MI, 1) + pattern(MI, 2)


def test_a_served_volume_with_a_damaged_lease_is_not_deleted(make_volume, make_server):
    server = make_server(make_volume(SIZE), lease_duration="1h").start()
    volume = server.volume
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 0)
        client.flush()
        objects_of(volume).put(".meta/lease", b"{ damaged")
        done = volume.cli("delete", volume.url, "--yes")
        assert done.returncode != 0 and "--damaged" in done.stderr, done.stderr
        client.pwrite(pattern(MI, 2), MI)
        client.flush()
        assert client.pread(2 * MI, 0) == pattern(MI, 1) + pattern(MI, 2)
    assert "inode" in objects_of(volume).names()


class FromWrite(Fault):
    """Hits a number of the PUTs, and no DELETE: what was begun can be taken back."""

    def __init__(self, kind: str, number: int):
        super().__init__(kind)
        self.number, self.seen = number, 0

    def applies(self, line: str) -> bool:
        if not line.startswith("PUT"):
            return False
        self.seen += 1
        if self.seen < self.number:
            return False
        self.hits.append(line)
        return True


@pytest.mark.s3_only
def test_a_creation_that_fails_at_any_write_leaves_nothing_in_the_way(store, make_volume, proxy):
    """Each write of it by number, and every later one: a second creation works."""
    make_volume(SIZE)  # so that what is remembered of the store is known to it
    for number in range(1, 30):
        url = store.url(f"created-{number}")
        command = [CLI, "create", url, "--size", str(SIZE), "--region", "us-east-1", "--endpoint-url", proxy.endpoint]
        seen = len(proxy.requests)
        fault = proxy.fail(FromWrite("expired", number))
        done = run(*command, env=store.env)
        proxy.heal()
        writes = [line for line in proxy.requests[seen:] if line.startswith("PUT")]
        if not fault.hits:
            assert done.returncode == 0 and number > 2, f"{done.stderr}, {len(writes)} writes"
            return
        assert done.returncode != 0, f"write {number}"
        again = run(*command, env=store.env)
        assert again.returncode == 0, f"after write {number} failed: {again.stderr}"
    raise AssertionError("a creation takes more writes than this test has patience for")


@pytest.mark.s3_only
def test_a_server_that_was_taken_over_while_the_store_was_busy_publishes_nothing(make_volume, make_server, proxy):
    """Its uploads are answered with 503 until another server has written; the volume ends within a block."""
    size = MI + 512
    volume = make_volume(size, 4 * KI)
    parameters = {"checkpoint_interval": "1h", "lease_duration": "1h", "io_timeout": "60s"}
    first = make_server(volume, endpoint_url=proxy.endpoint, **parameters).start()
    with first.connect() as old:
        old.pwrite(pattern(size, 1), 0)
        old.flush()
        busy = proxy.fail(Fault("503", r"^(PUT|POST) \S+/\d{10}\.\d+[? ]"))
        old.pwrite(pattern(4 * KI, 2), 0)
        old.pwrite(pattern(512, 2), size - 512)
        cookie = old.aio_flush()

        def is_refused() -> bool:
            old.poll(0)
            return bool(busy.hits)

        wait_for(is_refused, "an upload to be refused")
        second = make_server(volume, takeover="yes", **parameters).start()
        with second.connect() as new:
            new.pwrite(pattern(4 * KI, 3), 4 * KI)
            new.pwrite(pattern(512, 4), size - 512)
            new.flush()
            proxy.heal()
            with pytest.raises(nbd.Error):
                while not old.aio_command_completed(cookie):
                    old.poll(-1)
            new.pwrite(pattern(4 * KI, 5), 8 * KI)
            new.flush()
            second.kill()
    first.kill()
    second.start()
    expected = bytearray(pattern(size, 1))
    expected[4 * KI : 8 * KI] = pattern(4 * KI, 3)
    expected[8 * KI : 12 * KI] = pattern(4 * KI, 5)
    expected[-512:] = pattern(512, 4)
    with second.connect() as client:
        assert client.pread(size, 0) == expected


def use_up(volume, numbers: int) -> None:
    """As if so many checkpoint numbers had been used."""
    stored = objects_of(volume)
    inode = bytearray(stored.get("inode"))
    struct.pack_into("<Q", inode, LAST_SEQUENCE_AT, numbers)
    stored.put("inode", bytes(inode))


def test_a_volume_near_the_end_of_its_checkpoint_numbers_says_so_and_is_read(make_volume, make_server):
    server = make_server(make_volume(SIZE), checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 0)
        client.flush()
    close(server)
    use_up(server.volume, CHECKPOINT_NUMBERS - 1100)
    assert "99 % of all checkpoint numbers are used" in server.volume.cli("info", server.volume.url).stdout
    server.start()
    written = 0
    with server.connect() as client:
        with pytest.raises(nbd.Error) as caught:
            while written < 200:
                client.pwrite(pattern(4 * KI, written), 2 * MI + written * 4 * KI, nbd.CMD_FLAG_FUA)
                written += 1
        assert caught.value.errnum == errno.ENOSPC and written > 0
        client.flush()
        assert client.pread(MI, 0) == pattern(MI, 1)
    assert "checkpoint numbers are used" in server.log_text()
    ends = json.loads(server.volume.cli("info", server.volume.url, "--json").stdout)["nearest_end"]
    assert ends["name"] == "checkpoint numbers" and ends["used"] > CHECKPOINT_NUMBERS - 1100, ends
    server.kill()
    server.start()
    with server.connect() as client:
        for number in range(written):
            assert client.pread(4 * KI, 2 * MI + number * 4 * KI) == pattern(4 * KI, number), number
        with pytest.raises(nbd.Error) as caught:
            client.zero(64 * KI, 0)
        assert caught.value.errnum == errno.ENOSPC
