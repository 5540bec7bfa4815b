"""The past of a volume: its checkpoints, names for them, exports of them, rollbacks, differences."""

import contextlib
import json
import random
import time
from datetime import datetime, timezone

import nbd
import pytest

from support.lease import put_lease_from_elsewhere
from support.lives import listens
from support.model import Model, block_status, extent_map, pattern, random_change, read_all
from support.past import at, read_at, verb
from support.process import check, spawn, wait_for
from support.server import KI, MI, TI, leave
from support.stores import S3Store
from support.terminal import on_a_terminal

SIZE = 16 * MI


def checkpoints(volume, *words: str) -> list[dict]:
    return json.loads(verb(volume, "checkpoints", volume.url, "--json", *words))


def random_lives(server, rng: random.Random, model: Model, count: int) -> dict[int, bytes]:
    """Random changes with a flush after some of each; the bytes at each checkpoint, by its number."""
    kept: dict[int, bytes] = {}
    with server.connect() as client:
        for _ in range(count):
            for _ in range(rng.randint(1, 8)):
                random_change(rng, client, model, 512 * KI)
            client.flush()
            newest = json.loads(verb(server.volume, "info", server.volume.url, "--json"))["last_checkpoint"]
            # The first changes may change nothing: a volume that was never published has no checkpoint.
            if newest:
                kept[newest] = bytes(model.data)
    return kept


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_every_checkpoint_is_within_reach(make_volume, make_server, seed, block_bytes):
    """Beside the live volume, which is written on, and on a read-only server of its own; as it was, byte for byte."""
    rng = random.Random(seed)
    volume = make_volume(SIZE, block_bytes)
    server = make_server(volume, checkpoint_interval="1h").start()
    model = Model(SIZE, block_bytes)
    kept = random_lives(server, rng, model, 12)
    readers = make_server(volume, nbdkit_options=["-r"]).start()
    for number, expected in kept.items():
        assert read_at(server, f"@{number}", SIZE) == expected, number
        assert read_at(readers, f"@{number}", SIZE) == expected, number
    assert read_at(server, "", SIZE) == bytes(model.data)
    listed = checkpoints(volume)
    assert set(kept) <= {one["cno"] for one in listed}
    assert [one["cno"] for one in listed] == sorted(one["cno"] for one in listed)
    for one in listed:
        assert set(one) == {"cno", "time", "size_bytes", "written_bytes", "names", "kept_by", "kept_until"}
        assert one["size_bytes"] == SIZE and one["written_bytes"] > 0
        age = datetime.now(timezone.utc) - datetime.fromisoformat(one["time"].replace("Z", "+00:00"))
        assert abs(age.total_seconds()) < 3600


def test_an_export_of_the_past(make_volume, make_server):
    """It is read-only whatever the client asks for, has the extents of then, and stays while the volume goes on."""
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), MI)
        client.flush()
        verb(volume, "snapshot", "create", volume.url, "before")
        past = at(server, "@before")
        client.pwrite(pattern(4 * MI, 2), 0)
        client.flush()
        assert past.is_read_only() and past.get_size() == SIZE
        assert past.pread(2 * MI, 0) == bytes(MI) + pattern(MI, 1)
        hole = nbd.STATE_HOLE | nbd.STATE_ZERO
        assert block_status(past, SIZE, 0) == [(MI, hole), (MI, 0), (SIZE - 2 * MI, hole)]
        past.set_strict_mode(0)
        with pytest.raises(nbd.Error):
            past.pwrite(b"x", 0)
        with pytest.raises(nbd.Error):
            past.trim(64 * KI, 0)
        past.flush()
        past.cache(MI, 0)
        leave(past)
    # Several connections see the same.
    clients = [at(server, "@before") for _ in range(4)]
    for one in clients:
        assert one.pread(MI, MI) == pattern(MI, 1)
        leave(one)
    assert server.terminate() == 0, server.log_text()


def test_snapshots_are_listed_as_exports(make_volume, make_server):
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(b"x", 0)
        client.flush()
    for name in ("monday", "tuesday"):
        assert "checkpoint" in verb(volume, "snapshot", "create", volume.url, name)
    assert "monday" in verb(volume, "snapshot", "create", volume.url, "monday", status=1)
    client = nbd.NBD()
    client.set_opt_mode(True)
    client.connect_unix(str(server.socket))
    found = {}
    client.opt_list(lambda name, description: found.update({name: description}))
    client.opt_abort()
    assert set(found) == {"", "@monday", "@tuesday"}
    assert "checkpoint" in found["@monday"]
    names = [one["name"] for one in json.loads(verb(volume, "snapshot", "list", volume.url, "--json"))]
    assert names == ["monday", "tuesday"]
    assert {"monday", "tuesday"} == {name for one in checkpoints(volume) for name in one["names"]}
    verb(volume, "snapshot", "delete", volume.url, "monday")
    assert "no checkpoint @monday" in verb(volume, "snapshot", "delete", volume.url, "monday", status=1)
    with pytest.raises(nbd.Error):
        at(server, "@monday")
    assert read_at(server, "@tuesday", MI)[:1] == b"x"


@pytest.mark.s3_only
def test_a_snapshot_of_a_volume_that_is_served_elsewhere(make_volume, make_server):
    """Its server cannot be told to publish: it is said which checkpoint was named, and how old that is."""
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag in (1, 2):
            client.pwrite(pattern(64 * KI, tag), 0)
            client.flush()
    assert server.terminate() == 0
    newest = checkpoints(volume)[-1]
    put_lease_from_elsewhere(volume, 3_600_000)
    done = volume.cli("snapshot", "create", volume.url, "there")
    assert done.returncode == 0, done.stderr
    assert f"there is checkpoint {newest['cno']}, the newest that is published: " in done.stdout and " ago" in done.stdout
    assert "far-away" in done.stderr and "what it has not published is not in it" in done.stderr
    assert [one["names"] for one in checkpoints(volume)] == [[], ["there"]]
    # One that was asked for is what was asked for.
    assert "newest" not in verb(volume, "snapshot", "create", volume.url, "first", "@1")


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_an_export_of_a_difference(make_volume, make_server, seed, tmp_path, block_bytes):
    """What changed is data, all else is a hole: stock tools make an image of it upon the one of before."""
    rng = random.Random(seed)
    volume = make_volume(SIZE + 512, block_bytes)
    server = make_server(volume, checkpoint_interval="1h").start()
    model = Model(SIZE, block_bytes)
    with server.connect() as client:
        client.pwrite(b"end" * 100, SIZE)
    kept = random_lives(server, rng, model, 8)
    for turn in range(4):
        one, other = sorted(rng.sample(sorted(kept), 2))
        ranges = json.loads(verb(volume, "diff", volume.url, f"@{one}", f"@{other}", "--json"))
        client = at(server, f"@{one}..{other}")
        expected = bytearray(SIZE + 512)
        for r in ranges:
            piece = slice(r["offset_bytes"], r["offset_bytes"] + r["len_bytes"])
            expected[piece] = (kept[other] + bytes(512))[piece]
        assert read_all(client, SIZE + 512) == bytes(expected)
        found = extent_map(client, 0, SIZE + 512)
        assert merged((start, length) for start, length, flags in found if flags == 0) == merged(
            (r["offset_bytes"], r["len_bytes"]) for r in ranges
        )
        leave(client)
        increment(server, one, other, kept, tmp_path / str(turn))
    with pytest.raises(nbd.Error):
        at(server, "@1..4000")


def merged(ranges) -> list[tuple[int, int]]:
    """(offset, length) with neighbours joined."""
    joined: list[tuple[int, int]] = []
    for start, length in ranges:
        if joined and sum(joined[-1]) == start:
            start, length = joined[-1][0], joined[-1][1] + length
            joined.pop()
        joined.append((start, length))
    return joined


def increment(server, one: int, other: int, kept: dict[int, bytes], directory) -> None:
    """The commands of docs/history.md."""
    directory.mkdir()
    uri = f"nbd+unix:///%40{{}}?socket={server.socket}"
    base, image, after = directory / "base.raw", directory / "increment.qcow2", directory / "after.raw"
    check("nbdcopy", uri.format(one), base)
    check("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image)
    changed = uri.format(f"{one}..{other}")
    served = directory / "socket"
    with contextlib.closing(Served(["qemu-nbd", "--socket", str(served), str(image)], served, directory)):
        words = [f"--request-size={server.volume.block_bytes}", "-S", "0", "--destination-is-zero", "--flush"]
        check("nbdcopy", *words, changed, f"nbd+unix:///?socket={served}")
    check("qemu-img", "convert", "-O", "raw", image, after)
    assert after.read_bytes()[:SIZE] == kept[other]


class Served:
    """qemu-nbd, until its one client has gone, or it is closed."""

    def __init__(self, command: list[str], socket, directory):
        self.process = spawn(command, directory / "qemu-nbd.log", env={}, limit_s=240)
        wait_for(lambda: listens(socket), "qemu-nbd to listen")

    def close(self) -> None:
        """Waits for the end that comes with the client's."""
        self.process.wait(120)


HOSTILE = ["@1..", "@..2", "@1..x/y", "x", "@", "@../../label", "@99999999999999999999", "@0", "@4000000000", "@1\x1b[2J", "@" + "y" * 4000, "@-x"]


def test_names_that_are_none_are_refused(make_volume, make_server):
    server = make_server(make_volume(SIZE, 64 * KI)).start()
    for name in HOSTILE:
        with pytest.raises(nbd.Error):
            at(server, name)
        server.assert_running()
    assert "\x1b" not in server.log_text()
    with server.connect() as client:
        client.pread(512, 0)


def is_asking(client: nbd.NBD) -> bool:
    """Whether a client that connects has asked for its export, and has no answer yet."""
    client.poll(50)
    return "OPT_GO.RECV_REPLY" in client.connection_state()


@pytest.mark.s3_only
def test_a_time_ago_is_looked_up_for_each_client(make_volume, make_server, own_minio, seed):
    """A client that went away while its export was opened leaves nothing behind that the next one would be given."""
    volume = make_volume(SIZE, 64 * KI, in_store=S3Store(own_minio))
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag in (1, 2):
            client.pwrite(pattern(64 * KI, tag), 0)
            client.flush()
            if tag == 1:
                own_minio.pause()
                gone = nbd.NBD()
                gone.set_export_name("@-0s")
                gone.aio_connect_unix(str(server.socket))
                wait_for(lambda: is_asking(gone), "the client to ask for its export")
                del gone
                # How fast a server notices that depends on the machine.
                wait_for(lambda: "the client has gone" in server.log_text(), "its opening to be given up")
                own_minio.resume()
                # What it might have left behind comes to its end.
                time.sleep(1)
        assert read_at(server, "@-0s", 64 * KI) == pattern(64 * KI, 2)


def test_a_checkpoint_by_its_time(make_volume, make_server):
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(volume, checkpoint_interval="1h").start()
    times = []
    with server.connect() as client:
        for tag in range(1, 6):
            client.pwrite(pattern(64 * KI, tag), 0)
            client.flush()
            # Whole milliseconds are compared: in the one that a checkpoint is published in, no time lies before or after it.
            time.sleep(0.3)
            times.append(datetime.now(timezone.utc).isoformat().replace("+00:00", "Z"))
            time.sleep(0.3)
    for tag, when in enumerate(times, 1):
        assert read_at(server, f"@{when}", 64 * KI) == pattern(64 * KI, tag)
    assert read_at(server, "@-0s", 64 * KI) == pattern(64 * KI, 5)
    with pytest.raises(nbd.Error):
        at(server, "@-1h")
    first = checkpoints(volume, "--until", times[0])
    assert len(first) == 1 and len(checkpoints(volume, "--since", times[0])) == 4
    assert len(checkpoints(volume, "--since", "-1h")) == 5


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_a_rollback_and_its_undoing(make_volume, make_server, seed, block_bytes):
    """The volume reads as then; what was undone has a name, and the rollback of the rollback brings it back."""
    rng = random.Random(seed)
    volume = make_volume(SIZE, block_bytes)
    server = make_server(volume, checkpoint_interval="1h").start()
    model = Model(SIZE, block_bytes)
    kept = random_lives(server, rng, model, 6)
    assert "held" in verb(volume, "rollback", volume.url, "@1", "--yes", status=1)
    assert server.terminate() == 0
    newest = bytes(model.data)
    target = rng.choice(sorted(kept)[:-1])
    assert "--yes" in verb(volume, "rollback", volume.url, f"@{target}", status=1)
    newest_number = max(kept)
    assert "the newest" in verb(volume, "rollback", volume.url, f"@{newest_number}", "--yes", status=1)
    said = verb(volume, "rollback", volume.url, f"@{target}", "--yes")
    before = said.split()[-1]
    assert before.startswith("before-rollback-")

    server.start()
    assert read_at(server, "", SIZE) == kept[target]
    assert read_at(server, f"@{before}", SIZE) == newest
    # Life goes on, and none of it harms what is kept.
    model.data[:] = kept[target]
    kept |= random_lives(server, rng, model, 4)
    for number, expected in kept.items():
        assert read_at(server, f"@{number}", SIZE) == expected, number
    assert server.terminate() == 0
    verb(volume, "file", "rollback", volume.url, f"@{before}", "--yes")
    server.start()
    assert read_at(server, "", SIZE) == newest


def test_what_was_shown_is_what_it_is_rolled_back_to(make_volume, make_server):
    """The name means another checkpoint by the time of the answer."""
    volume = make_volume(SIZE)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag in (1, 2, 3):
            client.pwrite(pattern(MI, tag), 0)
            client.flush()
    assert server.terminate() == 0
    verb(volume, "snapshot", "create", volume.url, "good", "@1")

    def meanwhile() -> None:
        verb(volume, "snapshot", "delete", volume.url, "good")
        verb(volume, "snapshot", "create", volume.url, "good", "@2")

    status, shown = on_a_terminal(volume, ["rollback", volume.url, "@good"], "yes\n", meanwhile)
    assert status == 0 and "as at checkpoint 1," in shown and "rolled back to checkpoint 1 " in shown, shown
    server.start()
    with server.connect() as client:
        assert client.pread(MI, 0) == pattern(MI, 1)


def test_a_rollback_brings_the_size_of_then_back(make_volume, make_server):
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), SIZE - MI)
    assert server.terminate() == 0
    verb(volume, "snapshot", "create", volume.url, "small")
    verb(volume, "resize", volume.url, "--size", str(2 * SIZE))
    verb(volume, "resize", volume.url, "--size", str(SIZE // 2), "--allow-shrink")
    verb(volume, "rollback", volume.url, "@small", "--yes")
    server.start()
    with server.connect() as client:
        assert client.get_size() == SIZE
        assert client.pread(MI, SIZE - MI) == pattern(MI, 1)


@pytest.mark.s3_only
def test_a_rollback_with_a_log(make_volume, make_server, store, tmp_path):
    """A log that was not closed is in the way; one that was brings nothing back of what is undone."""
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(volume, backend_wal_url=store.url("log"), checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 0)
        client.flush()
    assert server.terminate() == 0
    verb(volume, "snapshot", "create", volume.url, "one")
    server.start()
    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 2), 0)
        client.flush()
        server.kill()
    assert "wal replay" in verb(volume, "rollback", volume.url, "@one", "--yes", status=1)
    verb(volume, "wal", "replay", volume.url)
    verb(volume, "rollback", volume.url, "@one", "--yes")
    for tag in (3, 4):
        server.start()
        with server.connect() as client:
            assert client.pread(MI - 64 * KI, 64 * KI) == pattern(MI, 1)[64 * KI :]
            assert client.pread(64 * KI, 0) == (pattern(MI, 1)[: 64 * KI] if tag == 3 else pattern(64 * KI, 3))
            client.pwrite(pattern(64 * KI, tag), 0)
            client.flush()
            server.kill()


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_differences(make_volume, make_server, seed, block_bytes):
    """Every byte that differs lies in a range, and every block of a range was written in between."""
    rng = random.Random(seed)
    volume = make_volume(SIZE, block_bytes)
    server = make_server(volume, checkpoint_interval="1h").start()
    kept = random_lives(server, rng, Model(SIZE, block_bytes), 8)
    numbers = sorted(kept)
    for _ in range(8):
        one, other = rng.choice(numbers), rng.choice(numbers)
        ranges = json.loads(verb(volume, "diff", volume.url, f"@{one}", f"@{other}", "--json"))
        patched = bytearray(kept[one])
        end = 0
        for r in ranges:
            start, length = r["offset_bytes"], r["len_bytes"]
            assert start >= end and length > 0 and start % block_bytes == 0
            end = start + length
            new = kept[other][start:end]
            assert r["kind"] == "data" or new == bytes(length)
            patched[start:end] = new
        assert bytes(patched) == kept[other]
        stat = json.loads(verb(volume, "diff", volume.url, f"@{one}", f"@{other}", "--stat", "--json"))
        assert stat["data_bytes"] + stat["zero_bytes"] == sum(r["len_bytes"] for r in ranges)
        if one == other:
            assert ranges == []


def test_a_difference_costs_what_changed(make_volume, make_server):
    """On a large volume with many blocks: few ranges, each block once."""
    volume = make_volume(TI, 4 * KI)
    server = make_server(volume, checkpoint_interval="1h").start()
    rng = random.Random(1)
    with server.connect() as client:
        for _ in range(3000):
            client.pwrite(pattern(4 * KI, 1), rng.randrange(TI // (4 * KI)) * 4 * KI)
        client.flush()
        verb(volume, "snapshot", "create", volume.url, "full")
        places = sorted({rng.randrange(TI // (4 * KI)) * 4 * KI for _ in range(20)})
        for place in places:
            client.pwrite(pattern(4 * KI, 2), place)
        client.flush()
    ranges = json.loads(verb(volume, "diff", volume.url, "@full", "@-0s", "--json"))
    assert [(r["offset_bytes"], r["len_bytes"], r["kind"]) for r in ranges] == [(p, 4 * KI, "data") for p in places]


def test_verbs_on_what_is_not_there(make_volume):
    volume = make_volume(SIZE, 64 * KI)
    assert checkpoints(volume) == []
    for words in (
        ("snapshot", "create", volume.url, "x"),
        ("snapshot", "create", volume.url, "x", "@17"),
        ("rollback", volume.url, "@17", "--yes"),
        ("diff", volume.url, "@1", "@2"),
    ):
        assert "has no checkpoint" in verb(volume, *words, status=1)
    for words in (("snapshot", "create", volume.url, "../x"), ("rollback", volume.url, "17")):
        verb(volume, *words, status=2)
    nothing = volume.url.rstrip("/") + "-not-there/"
    for words in (("checkpoints", nothing), ("snapshot", "list", nothing), ("rollback", nothing, "@1", "--yes")):
        said = verb(volume, *words, status=1)
        assert "there is no volume" in said or "does not exist" in said


def test_space(make_volume, make_server):
    """What is live, what history keeps, and all of it: overwritten data is history, trimmed data too."""
    volume = make_volume(SIZE, 64 * KI)

    def space() -> dict:
        return json.loads(verb(volume, "space", volume.url, "--json"))

    def space_with(live_bytes: int) -> dict:
        """That of the newest checkpoint: it counts once its entry is in the list, which comes behind the answer to the flush."""

        def found() -> dict | None:
            told = space()
            return told if live_bytes <= told["live_bytes"] < live_bytes + 64 * KI else None

        return wait_for(found, f"{live_bytes} bytes to be live")

    empty = space()
    assert set(empty) == {
        "live_bytes",
        "history_bytes",
        "reclaimable_bytes",
        "grace_bytes",
        "shared_bytes",
        "debt_bytes",
        "stored_bytes",
        "objects",
        "snapshots",
        "cost_a_month",
    }
    assert empty["live_bytes"] == 0 and empty["snapshots"] == []
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(8 * MI, 1), 0)
        client.flush()
        full = space_with(8 * MI)
        assert full["history_bytes"] < 64 * KI
        client.pwrite(pattern(4 * MI, 2), 0)
        client.flush()
        client.trim(2 * MI, 6 * MI)
        client.flush()
    after = space_with(6 * MI)
    assert 6 * MI <= after["history_bytes"] < 6 * MI + 256 * KI
    assert after["stored_bytes"] >= after["live_bytes"] + after["history_bytes"] and after["objects"] > 4
    assert "live" in verb(volume, "space", volume.url)
    costs = json.loads(verb(volume, "space", volume.url, "--json", "--price", "1000"))
    if volume.store.kind == "s3":
        assert costs["cost_a_month"] == pytest.approx(costs["stored_bytes"] / 1e6)
    else:
        assert costs["cost_a_month"] is None
