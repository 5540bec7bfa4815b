"""Every request an NBD client can send, one by one, and the negotiated facts."""

import re
from pathlib import Path

import nbd
import pytest

from support.model import pattern, read_all
from support.server import KI, MI, create_volume

EINVAL, ENOSPC, EPERM = 22, 28, 1


def test_negotiated_flags(server):
    with server.connect(extents=True) as client:
        assert client.get_size() == 64 * MI
        assert not client.is_read_only()
        assert client.can_flush()
        assert client.can_fua()
        assert client.can_trim()
        assert client.can_zero()
        assert client.can_fast_zero()
        assert client.can_cache()
        assert client.can_multi_conn()
        assert client.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        assert not client.is_rotational()


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI, 256 * KI])
@pytest.mark.file_only
def test_block_size_constraints(make_volume, make_server, block_bytes):
    server = make_server(make_volume(block_bytes=block_bytes)).start()
    with server.connect() as client:
        assert client.get_block_size(nbd.SIZE_MINIMUM) == 1
        assert client.get_block_size(nbd.SIZE_PREFERRED) == block_bytes
        assert client.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MI


def test_new_volume_reads_as_zeroes(server):
    with server.connect() as client:
        assert read_all(client, 64 * MI) == bytes(64 * MI)


@pytest.mark.old_nbdkit_too
def test_write_then_read_before_and_after_a_flush(server):
    data = pattern(3 * MI + 17, 1)
    with server.connect() as client:
        client.pwrite(data, 12345)
        assert client.pread(len(data), 12345) == data
        client.flush()
        assert client.pread(len(data), 12345) == data
        assert client.pread(12345, 0) == bytes(12345)


@pytest.mark.old_nbdkit_too
def test_single_bytes_at_every_kind_of_place(server):
    with server.connect() as client:
        for at in (0, 1, 511, 4095, 4096, 65535, 65536, 1234567, 64 * MI - 1):
            client.pwrite(b"\x5a", at)
        client.flush()
        for at in (0, 1, 511, 4095, 4096, 65535, 65536, 1234567, 64 * MI - 1):
            assert client.pread(1, at) == b"\x5a"
        assert client.pread(2, 65537) == b"\0\0"
        assert client.pread(2, 64 * MI - 3) == b"\0\0"


def test_largest_request(make_volume, make_server):
    server = make_server(make_volume(96 * MI)).start()
    data = pattern(32 * MI, 2)
    with server.connect() as client:
        client.pwrite(data, 7)
        assert client.pread(32 * MI, 7) == data
        client.flush()
        assert client.pread(32 * MI, 7) == data


@pytest.mark.old_nbdkit_too
def test_zero_inside_a_block_and_over_blocks(server):
    data = pattern(4 * MI, 3)
    for flags in (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA):
        with server.connect() as client:
            client.pwrite(data, 0)
            client.zero(100, 1000, flags)
            client.zero(2 * MI + 5, 1 * MI, flags)
            expected = bytearray(data)
            expected[1000:1100] = bytes(100)
            expected[1 * MI : 3 * MI + 5] = bytes(2 * MI + 5)
            assert client.pread(4 * MI, 0) == expected
            client.flush()
            assert client.pread(4 * MI, 0) == expected


def test_fast_zero_is_honest(server):
    """A fast zero either zeroes or says that it will not; never anything between."""
    data = pattern(1 * MI, 4)
    with server.connect() as client:
        client.pwrite(data, 0)
        client.flush()
        try:
            client.zero(1 * MI, 0, nbd.CMD_FLAG_FAST_ZERO)
            expected = bytes(1 * MI)
        except nbd.Error as error:
            assert error.errnum == 95, error  # ENOTSUP
            expected = data
        assert client.pread(1 * MI, 0) == expected


def test_trim_drops_whole_blocks_and_leaves_partial_ones(server):
    data = pattern(1 * MI, 5)
    block = 64 * KI
    with server.connect() as client:
        client.pwrite(data, 0)
        client.flush()
        client.trim(6 * block, block + 100)  # covers blocks 2 to 6 whole, 1 and 7 in part
        expected = bytearray(data)
        expected[2 * block : 7 * block] = bytes(5 * block)
        assert client.pread(1 * MI, 0) == expected
        client.flush()
        assert client.pread(1 * MI, 0) == expected


@pytest.mark.parametrize("request_name", ["write", "zero", "trim"])
def test_fua_is_durable_without_a_flush(server, request_name):
    data = pattern(256 * KI, 6)
    expected = bytearray(data)
    with server.connect() as client:
        client.pwrite(data, 0, nbd.CMD_FLAG_FUA)
        if request_name == "zero":
            client.zero(128 * KI, 0, nbd.CMD_FLAG_FUA)
            expected[: 128 * KI] = bytes(128 * KI)
        elif request_name == "trim":
            client.trim(128 * KI, 0, nbd.CMD_FLAG_FUA)
            expected[: 128 * KI] = bytes(128 * KI)
        server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(256 * KI, 0) == expected


def test_cache_is_a_prefetch(server):
    data = pattern(1 * MI, 7)
    with server.connect() as client:
        client.pwrite(data, 0)
        client.flush()
        client.cache(1 * MI, 0)
        client.cache(1 * MI, 32 * MI)  # a hole
        assert client.pread(1 * MI, 0) == data
        assert client.pread(1 * MI, 32 * MI) == bytes(1 * MI)


def test_requests_beyond_the_end_are_refused(server):
    with server.connect(lenient=True) as client:
        for refused in (
            lambda: client.pread(2, 64 * MI - 1),
            lambda: client.pwrite(b"xx", 64 * MI - 1),
            lambda: client.zero(2, 64 * MI - 1),
            lambda: client.trim(2, 64 * MI - 1),
            lambda: client.cache(2, 64 * MI - 1),
            lambda: client.pread(1, 1 << 62),
        ):
            with pytest.raises(nbd.Error) as caught:
                refused()
            assert caught.value.errnum in (EINVAL, ENOSPC)
        assert client.pread(1, 64 * MI - 1) == b"\0"
    server.assert_running()


def test_read_only_server_refuses_writes(make_volume, make_server):
    volume = make_volume()
    writer = make_server(volume).start()
    with writer.connect() as client:
        client.pwrite(b"kept", 0)
        client.flush()
    assert writer.terminate() == 0
    before = volume.store.objects()
    reader = make_server(volume, nbdkit_options=["-r"]).start()
    with reader.connect(lenient=True) as client:
        assert client.is_read_only()
        assert client.pread(4, 0) == b"kept"
        for refused in (
            lambda: client.pwrite(b"lost", 0),
            lambda: client.zero(4, 0),
            lambda: client.trim(4, 0),
        ):
            with pytest.raises(nbd.Error) as caught:
                refused()
            assert caught.value.errnum == EPERM
        assert client.pread(4, 0) == b"kept"
    assert reader.terminate() == 0
    assert volume.store.objects() == before


@pytest.mark.file_only
@pytest.mark.parametrize("size_bytes", [1, 511, 4097, 1 * MI + 1])
def test_volumes_of_odd_sizes(make_volume, make_server, size_bytes):
    server = make_server(make_volume(size_bytes, 4 * KI)).start()
    data = pattern(size_bytes, 8)
    with server.connect() as client:
        assert client.get_size() == size_bytes
        client.pwrite(data, 0)
        client.flush()
    server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(size_bytes, 0) == data
        client.zero(1, size_bytes - 1)
        client.flush()
        assert client.pread(size_bytes, 0) == data[:-1] + b"\0"


@pytest.mark.file_only
def test_every_block_size(make_volume, make_server):
    """The whole row of block sizes works, each with data that straddles blocks."""
    for block_bytes in (4 * KI, 8 * KI, 16 * KI, 32 * KI, 128 * KI, 512 * KI, 1 * MI):
        server = make_server(make_volume(8 * MI, block_bytes)).start()
        data = pattern(2 * MI + 3, block_bytes)
        with server.connect() as client:
            client.pwrite(data, block_bytes - 1)
            client.flush()
        server.kill()
        server.start()
        with server.connect() as client:
            assert client.pread(len(data), block_bytes - 1) == data
            assert client.pread(block_bytes - 1, 0) == bytes(block_bytes - 1)
        server.dispose()


def test_only_the_default_export_exists(server):
    with server.connect() as client:
        assert client.get_export_name() == ""
    client = nbd.NBD()
    client.set_export_name("no-such-snapshot")
    with pytest.raises(nbd.Error):
        client.connect_unix(str(server.socket))
    server.assert_running()


def test_memory_stays_within_the_write_buffer(make_volume, make_server):
    """Far more data than buffer and cache hold passes through; the process never holds much more than both."""
    server = make_server(make_volume(512 * MI), write_buffer="32M", cache_memory="16M").start()

    def peak_bytes() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * KI

    with server.connect() as client:
        for number in range(384):
            client.pwrite(pattern(1 * MI, number), number * MI)
        client.flush()
        for number in range(0, 384, 7):
            assert client.pread(1 * MI, number * MI) == pattern(1 * MI, number)
        assert peak_bytes() < (32 + 16 + 128) * MI


def test_a_url_with_unusual_characters(store, make_server):
    volume = create_volume(store, 8 * MI, 4 * KI, "ä b+c%20=d&e")
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 9), 1)
        client.flush()
    server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(1 * MI, 1) == pattern(1 * MI, 9)
    server.terminate()
    deleted = volume.cli("delete", volume.url, "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert store.objects_of_volumes() == set()
