"""A full disk and too little memory: honest errors or a clean death, and nothing that was flushed is lost."""

import os
from pathlib import Path

import nbd
import pytest

from support.model import Model, pattern, read_all
from support.process import check, run, wait_for
from support.server import KI, MI, flush_until_it_succeeds
from support.stamps import CLIENTS, SIZE, Writer, check_all
from support.stores import FileStore

EIO = 5
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 40 MiB; `size=` in a remount makes it larger."""
    path = tmp_path / "small-disk"
    path.mkdir()
    check("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", path)
    yield path
    run("umount", "--lazy", path)


@needs_root
@pytest.mark.file_only
def test_a_full_disk_under_a_local_volume(small_disk, make_volume, make_server):
    """Flushes fail, the buffer stays and is served; with room again everything is published."""
    volume = make_volume(64 * MI, in_store=FileStore(small_disk))
    server = make_server(volume, io_timeout="2s", checkpoint_interval="1h").start()
    model = Model(64 * MI, 64 * KI)
    with server.connect() as client:
        for number in range(4):
            client.pwrite(pattern(12 * MI, number), number * 12 * MI)
            model.write(number * 12 * MI, pattern(12 * MI, number))
            if number == 0:
                flush_until_it_succeeds(client)
        for _ in range(2):
            with pytest.raises(nbd.Error) as caught:
                client.flush()
            assert caught.value.errnum == EIO
        wait_for(lambda: "No space left on device" in server.log_text(), "the reason to be told")
        # In pieces that a slow machine, too, reads within the time of a request.
        model.assert_same(read_all(client, 64 * MI, 1 * MI), what="with the disk full")
        server.assert_running()
        check("mount", "-o", "remount,size=256m", small_disk)
        flush_until_it_succeeds(client)
        server.kill()
    server.parameters["io_timeout"] = "60s"
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, 64 * MI), what="after a kill")
    server.kill()


@needs_root
@pytest.mark.s3_only
def test_a_full_disk_under_the_caches(small_disk, make_volume, make_server):
    """Caches that cannot grow are caches that miss."""
    parameters = {
        "cache_dir": str(small_disk / "data"),
        "cache_disk": "64M",
        "cache_memory": "16M",
        "node_cache_config": f"LocalDisk,{small_disk}/nodes,32M,ReuseCache",
    }
    server = make_server(make_volume(64 * MI, 4 * KI), **parameters)
    data = pattern(48 * MI, 1)
    server.start()
    with server.connect() as client:
        for at in range(0, 48 * MI, 8 * MI):
            client.pwrite(data[at : at + 8 * MI], at)
        client.flush()
        for _ in range(2):
            assert read_all(client, 48 * MI) == data
    server.kill()
    server.start()
    with server.connect() as client:
        assert read_all(client, 48 * MI) == data
    server.assert_running()


def address_space_bytes(pid: int) -> int:
    """What a process has mapped."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.file_only
@pytest.mark.parametrize("spare", [32 * MI, 4 * MI])
def test_too_little_memory_costs_nothing_that_was_flushed(make_volume, make_server, seed, spare):
    """A server that gets no more memory may end, at any moment; what flushes promised is there afterwards."""
    server = make_server(make_volume(SIZE + 256 * MI, 64 * KI), checkpoint_interval="1h", cache_memory="0").start()
    writers = [Writer(number, seed).again(server) for number in range(CLIENTS)]
    for writer in writers:
        writer.start()
    wait_for(lambda: all(writer.flushes for writer in writers), "every writer to flush")
    pid = server.process.pid
    check("prlimit", f"--pid={pid}", f"--as={address_space_bytes(pid) + spare}")
    with pytest.raises(nbd.Error):
        with server.connect() as client:
            for number in range(256):
                client.pwrite(pattern(1 * MI, number), SIZE + number * MI)
    if server.is_running():  # it has refused, and goes on
        server.kill()
    for writer in writers:
        writer.join()
        if writer.failure:
            raise writer.failure
    server.process.wait()
    server.start()
    with server.connect() as client:
        check_all(client, writers)
