"""How long checkpoints are kept: by which rules, by whom they are removed, and what never is."""

import json
import random
from datetime import datetime

import nbd
import pytest

from support.faulty import Fault, FaultyProxy
from support.model import Model, pattern, random_change, read_all
from support.others import objects_of
from support.past import at, read_at, verb
from support.process import wait_for
from support.server import KI, MI, leave

SIZE = 16 * MI
AT_ONCE = {"retention_interval": "1s", "retention_grace": "1s", "checkpoint_interval": "1h"}
NEWEST_KEPT = 16
"""Checkpoints that are kept whatever the rules say."""


def listed(volume) -> list[dict]:
    return json.loads(verb(volume, "checkpoints", volume.url, "--json"))


def numbers(volume) -> list[int]:
    return [one["cno"] for one in listed(volume)]


def newest(volume) -> int:
    return json.loads(verb(volume, "info", volume.url, "--json"))["last_checkpoint"]


def space(volume) -> dict:
    return json.loads(verb(volume, "space", volume.url, "--json"))


def overwrite(client, count: int, length: int = MI, first_tag: int = 1) -> None:
    """Writes the same range again and again, each time a checkpoint."""
    for tag in range(first_tag, first_tag + count):
        client.pwrite(pattern(length, tag), 0)
        client.flush()


def test_new_volumes_have_rules_that_can_be_changed(make_volume):
    volume = make_volume(SIZE, 64 * KI)
    assert verb(volume, "retention", "show", volume.url).strip() == "--keep-within 24h --keep-hourly 168 --keep-daily 30"
    verb(volume, "retention", "set", volume.url, "--keep-last", "3", "--keep-within", "7d")
    assert verb(volume, "retention", "show", volume.url).strip() == "--keep-within 7d --keep-last 3"
    shown = json.loads(verb(volume, "retention", "show", volume.url, "--json"))
    assert (shown["keep_last"], shown["keep_within_ms"], shown["keep_daily"]) == (3, 7 * 24 * 3600 * 1000, 0)
    assert "retention unset" in verb(volume, "retention", "set", volume.url, status=2)
    verb(volume, "retention", "set", volume.url, "--keep-last", "x", status=2)
    # Months in restic, whose words these are.
    assert "180d" in verb(volume, "retention", "set", volume.url, "--keep-within", "6m", status=2)
    verb(volume, "retention", "set", volume.url, "--keep-within", "90min")
    assert verb(volume, "retention", "show", volume.url).strip() == "--keep-within 90min"
    verb(volume, "retention", "unset", volume.url)
    assert "everything is kept" in verb(volume, "retention", "show", volume.url)
    assert "retention set" in verb(volume, "prune", volume.url)
    gone = volume.url.rstrip("/") + "-none/"
    said = verb(volume, "retention", "set", gone, "--keep-last", "1", status=1)
    assert "no volume" in said or "does not exist" in said


def test_a_served_volume_gives_its_space_back(make_volume, make_server):
    """Overwritten thirty times, it takes what is needed and little more; names and readers keep theirs, byte for byte."""
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    server = make_server(volume, **AT_ONCE).start()
    with server.connect() as client:
        overwrite(client, 1)
        verb(volume, "snapshot", "create", volume.url, "first")
        overwrite(client, 1, first_tag=2)
        readers = make_server(volume, nbdkit_options=["-r"]).start()
        read, second = at(server, "@-0s"), at(readers, "")
        overwrite(client, 40, first_tag=3)
        wait_for(lambda: len(numbers(volume)) <= NEWEST_KEPT + 3, "checkpoints to be removed")
        left = listed(volume)
        assert "name" in left[0]["kept_by"] and left[0]["names"] == ["first"]
        assert "in-use" in left[1]["kept_by"] and left[-1]["kept_by"] == ["newest", "last"]
        wait_for(lambda: space(volume)["stored_bytes"] < (NEWEST_KEPT + 6) * MI, "space to come back")
        assert space(volume)["live_bytes"] >= MI
        assert client.pread(MI, 0) == pattern(MI, 42)
        assert read_at(server, "@first", MI) == pattern(MI, 1)
        for past in (read, second):
            assert past.pread(MI, 0) == pattern(MI, 2)
            leave(past)
        gone = left[1]["cno"] + 1
        assert gone not in [one["cno"] for one in left]
        with pytest.raises(nbd.Error):
            at(server, f"@{gone}")
        # Once nobody needs them they go, too.
        assert readers.terminate() == 0
        verb(volume, "snapshot", "delete", volume.url, "first")
        overwrite(client, 1, first_tag=43)
        wait_for(lambda: len(numbers(volume)) <= NEWEST_KEPT + 1, "the rest to be removed")
    assert server.terminate() == 0, server.log_text()
    server.start()
    with server.connect() as client:
        assert client.pread(MI, 0) == pattern(MI, 43)


def test_prune(make_volume, make_server):
    """Of a volume that is not served, at once; a dry run says as much, and removes nothing. A server that cannot be asked keeps others
    from it."""
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(volume, checkpoint_interval="1h", control="off").start()
    with server.connect() as client:
        overwrite(client, 30)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    assert "held" in verb(volume, "prune", volume.url, status=1)
    assert server.terminate() == 0
    before = space(volume)
    assert before["reclaimable_bytes"] >= 12 * MI and before["live_bytes"] < 2 * MI
    assert len(numbers(volume)) == 30
    would_go = json.loads(verb(volume, "retention", "set", volume.url, "--keep-last", "20", "--dry-run", "--json"))
    assert [one["cno"] for one in would_go] == numbers(volume)[:10]
    said = verb(volume, "prune", volume.url, "--dry-run").replace("would go", "").split()
    assert space(volume) == before
    assert verb(volume, "prune", volume.url).split()[1:6] == said[:5]
    after = space(volume)
    assert after["reclaimable_bytes"] == 0 and after["stored_bytes"] <= before["stored_bytes"] - 12 * MI
    assert numbers(volume) == list(range(numbers(volume)[-1] - NEWEST_KEPT + 1, numbers(volume)[-1] + 1))
    assert "removed 0 checkpoints and 0 objects" in verb(volume, "file", "prune", volume.url)
    assert json.loads(verb(volume, "file", "du", volume.url, "--json"))["stored_bytes"] > 0
    server.start()
    for number in (numbers(volume)[0], numbers(volume)[-1]):
        assert read_at(server, f"@{number}", MI) == pattern(MI, number)


def milliseconds(text: str) -> int:
    return round(datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() * 1000)


def test_until_when_each_is_kept(make_volume, make_server):
    """A time where a rule tells one, none for a name, for one of the newest and without rules; the table says which of these."""
    volume = make_volume(SIZE, 64 * KI)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        overwrite(client, 20, 64 * KI)
    assert server.terminate() == 0
    verb(volume, "snapshot", "create", volume.url, "first", "@1")

    def shown() -> dict[int, tuple[str | None, str]]:
        rows = {int(row.split()[0]): row for row in verb(volume, "checkpoints", volume.url).splitlines()[1:]}
        return {one["cno"]: (one["kept_until"], rows[one["cno"]]) for one in listed(volume)}

    verb(volume, "retention", "set", volume.url, "--keep-within", "3d")
    times = {one["cno"]: milliseconds(one["time"]) for one in listed(volume)}
    for number, (until, row) in shown().items():
        if number == 1:
            assert until is None and "for ever" in row
        else:
            assert milliseconds(until) == times[number] + 3 * 24 * 3600 * 1000
            assert until.rstrip("Z").replace("T", " ")[:19] in row
    # One millisecond after the newest: none but the newest are kept by the rule then, and no time is told.
    verb(volume, "retention", "set", volume.url, "--keep-within", "1ms")
    for number, (until, row) in shown().items():
        if number > 4:
            assert until is None and f"while among the newest {NEWEST_KEPT}" in row
        elif number > 1:
            assert until is None and "it goes" in row and " - " in f"{row} "
    verb(volume, "retention", "set", volume.url, "--keep-last", "100")
    assert {until for until, _ in shown().values()} == {None}
    assert all("while among the newest 100" in row for number, (_, row) in shown().items() if number > 1)
    verb(volume, "retention", "unset", volume.url)
    assert all(until is None and "for ever" in row for until, row in shown().values())


def test_what_a_name_alone_holds(make_volume, make_server):
    """`space` says it before, and it comes back once the name is gone."""
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        overwrite(client, 30)
    assert server.terminate() == 0
    for name, checkpoint in (("first", "@1"), ("again", "@1"), ("last", "@30")):
        verb(volume, "snapshot", "create", volume.url, name, checkpoint)
    verb(volume, "prune", volume.url)
    before = space(volume)
    first, last = before["snapshots"]
    assert (first["cno"], first["names"]) == (1, ["again", "first"]) and (last["cno"], last["names"]) == (30, ["last"])
    assert MI <= first["alone_bytes"] < MI + 256 * KI and last["alone_bytes"] < 256 * KI
    assert "held by @again @first alone" in verb(volume, "space", volume.url)
    for name in ("first", "again"):
        verb(volume, "snapshot", "delete", volume.url, name)
    verb(volume, "prune", volume.url)
    after = space(volume)
    assert abs(before["stored_bytes"] - after["stored_bytes"] - first["alone_bytes"]) < 64 * KI
    # Without rules nothing goes with a name.
    verb(volume, "retention", "unset", volume.url)
    assert space(volume)["snapshots"] is None


@pytest.mark.parametrize("how", ["plain", "log", "buffer"])
def test_killed_again_and_again(make_volume, make_server, store, tmp_path, seed, how):
    """Whatever was removed meanwhile: what was flushed is there, what is listed reads as it did, and what a log or the write buffer's
    file continue is there too."""
    rng = random.Random(seed)
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "2")
    more = {"plain": {}, "log": {"backend_wal_url": store.url("log")}, "buffer": {"write_buffer_dir": str(tmp_path / "buffer")}}[how]
    server = make_server(volume, **{**AT_ONCE, "checkpoint_interval": "100ms"}, lease_duration="2s", **more)
    readers = make_server(volume, nbdkit_options=["-r"]).start()
    model = Model(SIZE, 64 * KI)
    pinned: list[tuple[nbd.NBD, bytes]] = []
    removed = 0
    for life in range(4):
        server.start()
        with server.connect() as client:
            model.assert_same(read_all(client, SIZE))
            begun = newest(volume)
            while newest(volume) < begun + (8 if life else NEWEST_KEPT + 6):
                for _ in range(rng.randint(1, 5)):
                    random_change(rng, client, model, 256 * KI)
                    client.flush()
            if how != "log":
                # A checkpoint of its own, whose bytes are known.
                name = f"@{numbers(volume)[-1]}"
                past = at(readers, name)
                pinned.append((past, read_all(past, SIZE)))
                assert pinned[-1][1] == bytes(model.data)
            wait_for(lambda: len(numbers(volume)) <= NEWEST_KEPT + 4 + len(pinned), "some to be removed")
            removed = newest(volume) - len(numbers(volume))
            if how == "buffer":
                random_change(rng, client, model, 256 * KI)
            server.kill()
        for past, expected in pinned:
            assert read_all(past, SIZE) == expected
    assert removed > 12
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE))
    for number in rng.sample(numbers(volume), 5):
        try:
            read_at(server, f"@{number}", SIZE)
        except nbd.Error:
            # An older one may go between the list and the reading of it; one that is listed still reads.
            assert number not in numbers(volume), number
    for past, expected in pinned:
        assert read_all(past, SIZE) == expected
        leave(past)


@pytest.mark.s3_only
def test_a_store_that_refuses_to_delete(make_volume, make_server, minio):
    """It costs nothing but space, is said, and is made good once it is allowed."""
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    proxy = FaultyProxy(minio.endpoint)
    try:
        server = make_server(volume, endpoint_url=proxy.endpoint, **AT_ONCE).start()
        fault = proxy.fail(Fault("denied", r"^POST [^ ]*\?delete"))
        with server.connect() as client:
            overwrite(client, 30)
            wait_for(lambda: fault.hits, "an attempt to remove something")
            overwrite(client, 5, first_tag=31)
            assert client.pread(MI, 0) == pattern(MI, 35)
            wait_for(lambda: "retention has failed" in server.log_text(), "a warning")
            listed, refused = numbers(volume), 0
            for number in listed:
                try:
                    assert read_at(server, f"@{number}", MI) == pattern(MI, number)
                except nbd.Error as error:
                    # It is about to be removed, which nobody may begin to read.
                    assert "has no export" in str(error)
                    assert f"no checkpoint @{number}, which its retention removes" in server.log_text()
                    refused += 1
            assert len(listed) - refused >= NEWEST_KEPT
            proxy.heal()
            wait_for(lambda: len(numbers(volume)) <= NEWEST_KEPT + 1, "checkpoints to be removed")
            wait_for(lambda: space(volume)["stored_bytes"] < (NEWEST_KEPT + 4) * MI, "space to come back")
        assert server.terminate() == 0, server.log_text()
    finally:
        proxy.close()


@pytest.mark.s3_only
def test_a_rollback_where_nothing_may_be_deleted(make_volume, make_server, minio):
    """What was being removed is gone for people; what is kept is within reach, and new rounds go on."""
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    proxy = FaultyProxy(minio.endpoint)
    try:
        server = make_server(volume, endpoint_url=proxy.endpoint, **AT_ONCE).start()
        proxy.fail(Fault("denied", r"^POST [^ ]*\?delete"))
        with server.connect() as client:
            overwrite(client, 30)
            wait_for(lambda: "retention has failed" in server.log_text(), "a warning")
        assert server.terminate() == 0
        target = numbers(volume)[2]
        options = ["--endpoint-url", proxy.endpoint]
        verb(volume, "rollback", volume.url, f"@{target}", "--yes", *options)
    finally:
        proxy.close()
    server = make_server(volume, **AT_ONCE).start()
    assert read_at(server, "", MI) == pattern(MI, target)
    with server.connect() as client:
        overwrite(client, 5, first_tag=50)
        wait_for(lambda: space(volume)["stored_bytes"] < (NEWEST_KEPT + 8) * MI, "space to come back")
    assert server.terminate() == 0


@pytest.mark.s3_only
def test_a_name_of_a_checkpoint_whose_entry_was_never_written(make_volume, make_server, minio):
    """A server that is killed leaves checkpoints that no list has. A name that one was given keeps it all the same."""
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "unset", volume.url)
    proxy = FaultyProxy(minio.endpoint)
    try:
        server = make_server(volume, endpoint_url=proxy.endpoint, checkpoint_interval="1h", lease_duration="2s").start()
        with server.connect() as client:
            overwrite(client, 3)
            # The newest one is listed without its entry, too.
            wait_for(lambda: ".meta/checkpoints/0000000003" in objects_of(volume).names(), "the entries of three")
            proxy.fail(Fault("hang", r"^PUT [^ ]*\.meta(/|%2F)checkpoints"))
            overwrite(client, 1, first_tag=4)
            verb(volume, "snapshot", "create", volume.url, "precious")
            overwrite(client, 2, first_tag=5)
            server.kill()
    finally:
        proxy.close()
    server = make_server(volume, **AT_ONCE).start()
    assert 4 not in numbers(volume)
    assert read_at(server, "@precious", MI) == pattern(MI, 4)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    with server.connect() as client:
        overwrite(client, 30, first_tag=10)
        wait_for(lambda: len(numbers(volume)) <= NEWEST_KEPT + 1, "others to be removed")
    assert read_at(server, "@precious", MI) == pattern(MI, 4)
    assert server.terminate() == 0
    verb(volume, "rollback", volume.url, "@precious", "--yes")
    server.start()
    assert read_at(server, "", MI) == pattern(MI, 4)


def test_a_reader_from_before_there_were_rules(make_volume, make_server):
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "unset", volume.url)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        overwrite(client, 1)
        readers = make_server(volume, nbdkit_options=["-r"], cache_memory="0").start()
        reader = at(readers, "")
        overwrite(client, 30, first_tag=2)
    assert server.terminate() == 0
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    assert "removed 14 checkpoints" in verb(volume, "prune", volume.url)
    assert reader.pread(MI, 0) == pattern(MI, 1)
    leave(reader)


def test_a_lease_that_was_deleted_does_not_end_it(make_volume, make_server):
    """Epochs begin anew then, below the one that the plan was made in."""
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        overwrite(client, 20, 64 * KI)
    assert server.terminate() == 0
    for _ in range(3):
        verb(volume, "prune", volume.url)
    objects_of(volume).remove([".meta/lease"])
    server = make_server(volume, **AT_ONCE).start()
    with server.connect() as client:
        overwrite(client, 20, 64 * KI)
        wait_for(lambda: len(numbers(volume)) <= NEWEST_KEPT + 1, "checkpoints to be removed")
    assert server.terminate() == 0


def test_a_prune_leaves_answered_writes_to_their_server(make_volume, make_server, tmp_path):
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    server = make_server(volume, write_buffer_dir=str(tmp_path / "buffer"), checkpoint_interval="1h", lease_duration="2s")
    server.start()
    with server.connect() as client:
        overwrite(client, 30, 64 * KI)
        client.pwrite(b"x" * 4096, 8 * MI)
        server.kill()
    assert str(tmp_path / "buffer") in verb(volume, "prune", volume.url, status=1)
    server.start()
    with server.connect() as client:
        assert client.pread(4096, 8 * MI) == b"x" * 4096
    assert server.terminate() == 0
    verb(volume, "prune", volume.url)


def test_volumes_from_before_keep_everything(make_volume, make_server):
    volume = make_volume(SIZE, 64 * KI)
    verb(volume, "retention", "unset", volume.url)
    server = make_server(volume, **AT_ONCE).start()
    with server.connect() as client:
        overwrite(client, 20, 64 * KI)
        # Another volume's rounds tell that time has passed.
        other = make_volume(SIZE, 64 * KI)
        verb(other, "retention", "set", other.url, "--keep-last", "1")
        beside = make_server(other, **AT_ONCE).start()
        with beside.connect() as second:
            overwrite(second, 20, 64 * KI)
            wait_for(lambda: len(numbers(other)) == NEWEST_KEPT, "the other one's to be removed")
    assert len(numbers(volume)) == 20
    assert {reason for one in listed(volume) for reason in one["kept_by"]} == {"everything", "newest"}
    assert not [key for key in volume.store.objects() if "retention/" in key and volume.url.split("/")[-2] in key]
