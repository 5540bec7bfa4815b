"""Block status: what is called empty is empty, what was never written is called empty."""

import random

import nbd
import pytest

from support.model import Model, block_status, extent_map, pattern, random_range, read_all
from support.server import GI, KI, MI

BLOCK = 64 * KI
EMPTY = nbd.STATE_ZERO
HOLE = nbd.STATE_HOLE | nbd.STATE_ZERO


def emptiness(extents, size_bytes: int) -> bytearray:
    """1 for each byte reported as reading zero."""
    empty = bytearray(size_bytes)
    at = 0
    for offset, length, flags in extents:
        assert offset == at and length > 0, "extents must be contiguous and ascending"
        at += length
        if flags & EMPTY:
            empty[offset : offset + length] = b"\1" * length
    assert at == size_bytes, f"extents end at {at}, the volume at {size_bytes}"
    return empty


def test_a_new_volume_is_one_hole(server):
    with server.connect(extents=True) as client:
        assert all(flags == HOLE for _, _, flags in extent_map(client, 0, 64 * MI))


@pytest.mark.old_nbdkit_too
def test_unflushed_flushed_zeroed_and_trimmed(server):
    def flags_of(first: int, count: int) -> set[int]:
        return {flags for _, _, flags in extent_map(client, first * BLOCK, count * BLOCK)}

    with server.connect(extents=True) as client:
        client.pwrite(pattern(8 * BLOCK, 1), 8 * BLOCK)
        for _ in ("unflushed", "flushed"):
            assert flags_of(0, 8) == {HOLE}
            assert flags_of(8, 8) == {0}
            assert flags_of(16, 16) == {HOLE}
            client.flush()
        client.zero(2 * BLOCK, 8 * BLOCK)
        client.trim(2 * BLOCK, 12 * BLOCK)
        for _ in ("unflushed", "flushed"):
            assert all(flags & EMPTY for flags in flags_of(8, 2))
            assert flags_of(10, 2) == {0}
            assert all(flags & EMPTY for flags in flags_of(12, 2))
            assert flags_of(14, 2) == {0}
            client.flush()


def test_extents_stay_inside_the_request(server):
    with server.connect(extents=True) as client:
        client.pwrite(pattern(4 * BLOCK, 2), 4 * BLOCK)
        for offset, length in [(0, 1), (4 * BLOCK - 1, 2), (5 * BLOCK + 7, 13), (3 * BLOCK, 3 * BLOCK)]:
            extents = block_status(client, length, offset)
            assert sum(extent_length for extent_length, _ in extents) <= length


def test_one_extent_when_one_is_asked_for(server):
    with server.connect(extents=True) as client:
        for block in range(0, 64, 2):
            client.pwrite(pattern(BLOCK, block), block * BLOCK)
        assert len(block_status(client, 64 * BLOCK, 0)) > 1
        extents = block_status(client, 64 * BLOCK, 0, nbd.CMD_FLAG_REQ_ONE)
        assert extents == [(BLOCK, 0)]
        extents = block_status(client, 64 * BLOCK, BLOCK + 5, nbd.CMD_FLAG_REQ_ONE)
        assert extents == [(BLOCK - 5, HOLE)]


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_random_requests(make_volume, make_server, seed, block_bytes):
    """Byte for byte: empty means zero; a block never touched, or zeroed whole, is reported as empty."""
    size = 4 * MI
    rng = random.Random(seed)
    server = make_server(make_volume(size, block_bytes)).start()
    model = Model(size, block_bytes)
    # Blocks that must be reported as empty: untouched ones, and those a single zero or trim has covered.
    surely_empty = [True] * (size // block_bytes)

    def touch(offset: int, length: int, empty: bool) -> None:
        first, last = offset // block_bytes, (offset + length - 1) // block_bytes
        for block in range(first, last + 1):
            whole = offset <= block * block_bytes and (block + 1) * block_bytes <= offset + length
            if empty and whole:
                surely_empty[block] = True
            elif not empty:
                surely_empty[block] = False

    with server.connect(extents=True) as client:
        for step in range(150):
            operation = rng.choices(["write", "zero", "trim", "flush"], [50, 20, 15, 15])[0]
            offset, length = random_range(rng, size, block_bytes, 256 * KI)
            if operation == "write":
                data = pattern(length, step)
                client.pwrite(data, offset)
                model.write(offset, data)
                touch(offset, length, empty=False)
            elif operation == "zero":
                client.zero(length, offset)
                model.zero(offset, length)
                touch(offset, length, empty=True)
            elif operation == "trim":
                client.trim(length, offset)
                model.trim(offset, length)
                touch(offset, length, empty=True)
            else:
                client.flush()
            if step % 5 == 0:
                extents = extent_map(client, 0, size)
                empty = emptiness(extents, size)
                for at, extent_length, flags in extents:
                    if flags & EMPTY:
                        zeroes = model.data.count(0, at, at + extent_length)
                        assert zeroes == extent_length, f"step {step}: data in {at}+{extent_length}, reported as zero"
                for block, must_be_empty in enumerate(surely_empty):
                    at = block * block_bytes
                    if must_be_empty:
                        end = at + block_bytes
                        assert empty.find(0, at, end) == -1, f"step {step}: block {block} is empty, not reported so"
        model.assert_same(read_all(client, size), what="at the end")


@pytest.mark.old_nbdkit_too
def test_largest_status_request_on_a_huge_volume(make_volume, make_server):
    """A request of nearly 4 GiB on a hole far larger: clipped, and the server lives (CVE-2025-47711)."""
    server = make_server(make_volume(64 * GI)).start()
    with server.connect(extents=True) as client:
        for length in (4 * GI - BLOCK, 4 * GI - 1, 4 * GI - 512):
            extents = block_status(client, length, 0)
            assert sum(extent_length for extent_length, _ in extents) <= length
            assert all(flags == HOLE for _, flags in extents)
        client.pwrite(b"x", 0)
    server.assert_running()
