"""The flat-array model of a volume: its bytes, and which of them may be reported as empty."""

import hashlib
import random

import nbd


def pattern(length: int, tag: int) -> bytes:
    """`length` bytes without a zero among them, different for each `tag`."""
    block = bytes(byte or 0xA5 for byte in hashlib.sha512(tag.to_bytes(8, "little")).digest())
    return (block * (length // len(block) + 1))[:length]


class Model:
    """What a volume's bytes must be after a row of requests.

    Trim follows the project's rule, stricter than the protocol's: whole blocks read as zeroes afterwards, the
    partly covered ones at the ends keep their bytes.
    """

    def __init__(self, size_bytes: int, block_bytes: int):
        self.data = bytearray(size_bytes)
        self.block_bytes = block_bytes

    def write(self, offset: int, data: bytes) -> None:
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def trim(self, offset: int, length: int) -> None:
        first, end = self.whole_blocks(offset, length)
        if first < end:
            self.zero(first, end - first)

    def whole_blocks(self, offset: int, length: int) -> tuple[int, int]:
        """The byte range of the blocks that lie wholly in a range; the last block may be cut by the end."""
        block = self.block_bytes
        first = -(-offset // block) * block
        end = offset + length
        if end != len(self.data):
            end = end // block * block
        return first, end

    def assert_same(self, actual: bytes, offset: int = 0, what: str = "") -> None:
        """Fails naming the first differing byte."""
        expected = self.data[offset : offset + len(actual)]
        if actual != expected:
            at = next(i for i, (a, b) in enumerate(zip(actual, expected)) if a != b)
            wrong = sum(a != b for a, b in zip(actual, expected))
            raise AssertionError(
                f"{what}: byte {offset + at} is {actual[at]:#x}, must be {expected[at]:#x}; {wrong} bytes differ"
            )


def random_range(rng: random.Random, size_bytes: int, block_bytes: int, length_max: int) -> tuple[int, int]:
    """An (offset, length) that hits single bytes, block edges and whole runs of blocks alike."""
    shape = rng.randrange(4)
    if shape == 0:  # anything
        length = rng.randint(1, length_max)
        return rng.randint(0, size_bytes - length), length
    if shape == 1:  # whole blocks
        count = rng.randint(1, max(1, length_max // block_bytes))
        blocks = size_bytes // block_bytes
        first = rng.randint(0, blocks - min(count, blocks))
        return first * block_bytes, min(count, blocks) * block_bytes
    if shape == 2:  # across a block's edge, by a few bytes
        edge = rng.randint(1, size_bytes // block_bytes - 1) * block_bytes
        before, after = rng.randint(1, 16), rng.randint(1, 16)
        return edge - before, before + after
    length = rng.randint(1, 3)  # a few bytes, often at the ends of the volume
    return rng.choice([0, size_bytes - length, rng.randint(0, size_bytes - length)]), length


def random_change(rng: random.Random, client: nbd.NBD, model: Model, length_max: int) -> None:
    """One write, zero or trim, made to the volume and, once it is answered, to the model. Its range is the first draw."""
    offset, length = random_range(rng, len(model.data), model.block_bytes, length_max)
    kind = rng.randrange(10)
    if kind < 7:
        data = pattern(length, rng.randrange(1 << 30))
        client.pwrite(data, offset)
        model.write(offset, data)
    elif kind < 9:
        client.zero(length, offset)
        model.zero(offset, length)
    else:
        client.trim(length, offset)
        model.trim(offset, length)


def read_all(client: nbd.NBD, size_bytes: int, chunk_bytes: int = 8 << 20) -> bytes:
    """The whole volume."""
    return b"".join(
        client.pread(min(chunk_bytes, size_bytes - at), at) for at in range(0, size_bytes, chunk_bytes)
    )


def block_status(client: nbd.NBD, length: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    """One block status request: (length, flags) for each extent of base:allocation."""
    extents: list[tuple[int, int]] = []

    def collect(context, at, entries, error):
        assert context == nbd.CONTEXT_BASE_ALLOCATION and at == offset
        extents.extend(zip(entries[0::2], entries[1::2]))

    client.block_status(length, offset, collect, flags)
    return extents


def extent_map(client: nbd.NBD, offset: int, length: int) -> list[tuple[int, int, int]]:
    """(offset, length, flags) over a whole range, by as many requests as it takes."""
    found = []
    at, end = offset, offset + length
    while at < end:
        for extent_length, flags in block_status(client, end - at, at):
            found.append((at, extent_length, flags))
            at += extent_length
    return found
