"""Writers whose sectors tell who wrote them, and the kill -9 loop that checks them.

Each sector says who wrote it, where and when: (client, sequence number, offset), repeated to fill the sector, with a
checksum. After each kill the server is started again and every sector must be one that was written at that place, no
older than the last flush that covered it promised, and whole.
"""

import random
import struct
import threading
import zlib

import nbd

from .server import KI, MI

SECTOR = 4 * KI
SIZE = 4 * MI
CLIENTS = 4
ENOUGH_FLUSHES = 25
ENOUGH_LIMIT_S = 300
HEADER = struct.Struct("<8sIQQ")
MAGIC = b"hypernbd"


def stamp(client: int, sequence: int, offset: int) -> bytes:
    """A sector that tells where it belongs."""
    header = HEADER.pack(MAGIC, client, sequence, offset)
    sealed = header + struct.pack("<I", zlib.crc32(header))
    return sealed * (SECTOR // len(sealed)) + bytes(SECTOR % len(sealed))


def read_stamp(sector: bytes, offset: int) -> tuple[int, int] | None:
    """(client, sequence) of a sector, None for one never written; fails for a torn or foreign one."""
    if sector == bytes(SECTOR):
        return None
    magic, client, sequence, written_at = HEADER.unpack_from(sector)
    assert magic == MAGIC and written_at == offset, f"foreign data in the sector at {offset}"
    assert sector == stamp(client, sequence, offset), f"torn sector at {offset}"
    return client, sequence


class Writer(threading.Thread):
    """One client: random sectors of its own, a flush now and then, and a memory of what was promised."""

    def __init__(self, number: int, seed: int, enough: int = ENOUGH_FLUSHES):
        super().__init__(daemon=True)
        self.number, self.enough = number, enough
        self.rng = random.Random(seed * CLIENTS + number)
        self.sectors = [at for at in range(0, SIZE, SECTOR) if (at // SECTOR) % CLIENTS == number]
        self.sequence = 0
        self.born = 0  # sequence at the start of this life of the server
        self.flushes = 0  # answered with success, in this life of the server
        self.sent: dict[int, int] = {}  # offset -> newest sequence sent
        self.answered: dict[int, int] = {}  # offset -> newest sequence answered
        self.promised: dict[int, int] = {}  # offset -> newest sequence a flush has covered
        self.server = None
        self.has_enough = threading.Event()  # it has flushed `enough` times, or its server is gone
        self.failure: Exception | None = None

    def again(self, server) -> "Writer":
        """The same client, with its memory, for the next life of the server."""
        successor = Writer(self.number, self.rng.randrange(1 << 30), self.enough)
        successor.sequence = successor.born = self.sequence
        successor.sent, successor.promised = self.sent, self.promised
        successor.answered = dict(self.promised)
        successor.server = server
        return successor

    def run(self) -> None:
        try:
            client = self.server.handle()
            while True:
                for _ in range(self.rng.randint(1, 30)):
                    self.write(client)
                covered = dict(self.answered)
                client.flush()
                self.flushes += 1
                self.promised.update(covered)
                if self.flushes >= self.enough:
                    self.has_enough.set()
        except nbd.Error:
            pass  # the server was killed: what was promised so far is what counts
        except Exception as error:  # handed to the main thread
            self.failure = error
        finally:
            self.has_enough.set()

    def write(self, client) -> None:
        first = self.rng.randrange(len(self.sectors))
        for offset in self.sectors[first : first + self.rng.randint(1, 4)]:
            self.sequence += 1
            self.sent[offset] = self.sequence
            flags = nbd.CMD_FLAG_FUA if self.rng.random() < 0.02 else 0
            client.pwrite(stamp(self.number, self.sequence, offset), offset, flags)
            self.answered[offset] = self.sequence
            if flags:
                self.promised[offset] = self.sequence

    def check(self, offset: int, found: tuple[int, int] | None) -> None:
        """A sector after the restart against what this client was promised."""
        promised = self.promised.get(offset, 0)
        if found is None:
            assert promised == 0, f"flushed write {promised} of client {self.number} at {offset} is lost"
            return
        author, sequence = found
        assert author == self.number, f"the sector at {offset} is client {author}'s"
        assert sequence >= promised, f"at {offset} flushed write {promised} was replaced by the older {sequence}"
        # Nothing of an earlier life comes back over what was there when this one began.
        was_there = self.promised.get(offset) == sequence
        assert sequence > self.born or was_there, f"at {offset} the earlier write {sequence} came back"
        assert sequence <= self.sent.get(offset, 0), f"at {offset} is a write that was never sent"


def check_all(client, writers: list[Writer]) -> None:
    """Every sector after a restart against what the writers were promised."""
    for offset in range(0, SIZE, 1 * MI):
        piece = client.pread(1 * MI, offset)
        for at in range(0, 1 * MI, SECTOR):
            owner = writers[(offset + at) // SECTOR % CLIENTS]
            found = read_stamp(piece[at : at + SECTOR], offset + at)
            owner.check(offset + at, found)
            # What survived is what is there now; later lives build on it.
            if found:
                owner.promised[offset + at] = found[1]


def kill_and_check(server, seed: int, rounds: int, life_s: float = 1.0, enough: int = ENOUGH_FLUSHES) -> int:
    """Four writers on a started server of a volume of SIZE, killed at random moments and started again. One round ends
    no sooner than after `enough` flushes of each writer, however slow the machine is; returns how many were answered in all."""
    rng = random.Random(seed)
    writers = [Writer(number, seed, enough) for number in range(CLIENTS)]
    flushed_total = flushes = 0
    for round_number in range(rounds):
        writers = [writer.again(server) for writer in writers]
        before = sum(len(writer.promised) for writer in writers)
        for writer in writers:
            writer.start()
        # The moment is random.
        threading.Event().wait(rng.uniform(0.05, life_s))
        if round_number == rounds // 2:
            for writer in writers:
                assert writer.has_enough.wait(ENOUGH_LIMIT_S), "a writer hangs"
        server.kill()
        for writer in writers:
            writer.join()
            if writer.failure:
                raise writer.failure
        flushes += sum(writer.flushes for writer in writers)
        flushed_total += sum(len(writer.promised) for writer in writers) - before

        server.start()
        with server.connect() as client:
            check_all(client, writers)
    assert flushed_total > 0, "no flush was ever answered: the test has tested nothing"
    return flushes
