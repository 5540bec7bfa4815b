"""Compaction: space stays near what is live, and whatever it is caught in the middle of, no byte is another."""

import json
import random
import re
import time

import pytest

from support.model import Model, read_all
from support.others import objects_of
from support.past import read_at, verb
from support.process import spawn, wait_for
from support.server import CLI, KI, MI

SIZE = 128 * MI
PIECE = 16 * KI
BATCH = 4 * MI
"""Bytes written to one checkpoint."""
NEWEST_KEPT = 16
BOUND = 256 * MI
EAGER = {"compaction": "auto", "retention_interval": "1s", "retention_grace": "1s", "checkpoint_interval": "1h", "write_buffer": "64M"}


def listed(volume) -> list[dict]:
    return json.loads(verb(volume, "checkpoints", volume.url, "--json"))


def space(volume) -> dict:
    return json.loads(verb(volume, "space", volume.url, "--json"))


def overwrite(rng, client, model, count: int) -> None:
    """So many checkpoints of scattered writes."""
    for _ in range(count):
        for _ in range(BATCH // PIECE):
            at = rng.randrange(SIZE // PIECE) * PIECE
            data = rng.randbytes(64) * (PIECE // 64)
            client.pwrite(data, at)
            model.write(at, data)
        client.flush()


def fill(client, model) -> None:
    for at in range(0, SIZE, MI):
        data = bytes([at // MI % 255 + 1]) * MI
        client.pwrite(data, at)
        model.write(at, data)
    client.flush()


def copies(volume) -> set[str]:
    """Numbers under which there are parts and no first one."""
    found: dict[str, set[str]] = {}
    for name in objects_of(volume).names():
        if match := re.fullmatch(r"(\d{10})\.(\d+)", name):
            found.setdefault(match[1], set()).add(match[2])
    return {number for number, parts in found.items() if "0" not in parts}


@pytest.mark.s3_only
def test_random_overwrites_stay_within_the_bound(make_volume, make_server, seed):
    """A volume that is overwritten at random, six times its size: what is stored for nothing stays in bounds, and a named
    checkpoint reads as it did."""
    rng = random.Random(seed)
    volume = make_volume(SIZE, 4 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    server = make_server(volume, **EAGER).start()
    model = Model(SIZE, 4 * KI)
    with server.connect() as client:
        fill(client, model)
        overwrite(rng, client, model, 3)
        verb(volume, "snapshot", "create", volume.url, "early")
        early = bytes(model.data)
        for _ in range(12):
            overwrite(rng, client, model, 16)
            # A moment to catch up: the rate of this loop is not a line's.
            wait_for(lambda: space(volume)["debt_bytes"] == 0, "the debt to be paid", limit_s=300)
        assert read_at(server, "@early", SIZE) == early
        model.assert_same(read_all(client, SIZE))
    assert copies(volume), "it has compacted"
    assert server.terminate() == 0, server.log_text()
    # What the last rounds had not let go of yet depends on how fast the machine is.
    verb(volume, "prune", volume.url)
    now = space(volume)
    early_bytes = SIZE + 4 * BATCH
    newest_bytes = 2 * NEWEST_KEPT * 2 * BATCH
    assert now["stored_bytes"] <= 1.3 * now["live_bytes"] + BOUND + early_bytes + newest_bytes, now
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE))


@pytest.mark.s3_only
def test_killed_while_it_compacts(make_volume, make_server, seed):
    """Again and again, as soon as there are copies: everything that was flushed is there, every checkpoint that is kept reads as it did."""
    rng = random.Random(seed)
    volume = make_volume(SIZE, 4 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    model = Model(SIZE, 4 * KI)
    kept: dict[str, bytes] = {}
    for life, rate in enumerate(["0", "8M"]):
        # The debt is made first.
        server = make_server(volume, **{**EAGER, "compaction": "off"}, lease_duration="2s").start()
        with server.connect() as client:
            if life == 0:
                fill(client, model)
            model.assert_same(read_all(client, SIZE))
            overwrite(rng, client, model, 140)
            verb(volume, "snapshot", "create", volume.url, f"life-{life}")
            kept[f"life-{life}"] = bytes(model.data)
        assert server.terminate() == 0, server.log_text()
        seen = copies(volume)
        server = make_server(volume, **EAGER, lease_duration="2s", compaction_rate=rate).start()
        with server.connect() as client:

            def is_copied() -> bool:
                # A server looks again once enough was published: what it found first depends on what retention had let go of.
                overwrite(rng, client, model, 1)
                # Whoever writes goes first: without a pause nothing would ever be copied.
                time.sleep(1)
                return bool(copies(volume) - seen)

            wait_for(is_copied, "copies", limit_s=300)
            server.kill()
    server = make_server(volume, **EAGER, lease_duration="2s").start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE))
        for name, then in kept.items():
            assert read_at(server, f"@{name}", SIZE) == then, name
    assert server.terminate() == 0, server.log_text()


@pytest.mark.s3_only
def test_compact_may_be_stopped_and_killed(make_volume, make_server, seed):
    """The verb, for a volume that is not served; what it says; and its end at any moment. A server that cannot be asked keeps others from
    it."""
    rng = random.Random(seed)
    volume = make_volume(SIZE, 4 * KI)
    server = make_server(volume, **{**EAGER, "compaction": "off"}, lease_duration="2s", control="off").start()
    model = Model(SIZE, 4 * KI)
    with server.connect() as client:
        fill(client, model)
        verb(volume, "retention", "unset", volume.url)
        assert "every checkpoint" in verb(volume, "compact", volume.url)
        verb(volume, "retention", "set", volume.url, "--keep-last", "1")
        overwrite(rng, client, model, 60)
        assert "held" in verb(volume, "compact", volume.url, status=1)
        wait_for(lambda: len(listed(volume)) <= NEWEST_KEPT + 1, "checkpoints to be removed", limit_s=300)
        overwrite(rng, client, model, 20)
        wait_for(lambda: len(listed(volume)) <= NEWEST_KEPT + 1, "checkpoints to be removed", limit_s=300)
    assert server.terminate() == 0, server.log_text()
    verb(volume, "prune", volume.url)
    before = objects_of(volume).names()
    would = json.loads(verb(volume, "compact", volume.url, "--dry-run", "--json"))
    assert would["objects"] > 0 and would["copied_bytes"] < would["object_bytes"]
    assert objects_of(volume).names() == before
    assert "would be copied" in verb(volume, "compact", volume.url, "--dry-run")
    for life in range(3):
        command = [CLI, "compact", volume.url, *volume.store.cli_options, "--takeover"]
        log = server.directory / f"compact-{life}.log"
        process = spawn([str(word) for word in command], log, env=volume.store.env, limit_s=120)
        wait_for(lambda: copies(volume) or process.poll() is not None, "copies")
        process.kill()
        process.wait()
    done = json.loads(verb(volume, "compact", volume.url, "--takeover", "--json"))
    assert not done["is_stopped"]
    again = json.loads(verb(volume, "compact", volume.url, "--json"))
    assert again["objects"] == 0
    server = make_server(volume, retention_interval="off", lease_duration="2s").start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE))
        overwrite(rng, client, model, 3)
        model.assert_same(read_all(client, SIZE))
        for one in listed(volume):
            read_at(server, f"@{one['cno']}", SIZE)
    assert server.terminate() == 0, server.log_text()


@pytest.mark.file_only
def test_what_was_moved_is_no_difference(make_volume, make_server, seed):
    rng = random.Random(seed)
    volume = make_volume(SIZE, 4 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    server = make_server(volume, **{**EAGER, "compaction": "off"}).start()
    model = Model(SIZE, 4 * KI)
    with server.connect() as client:
        fill(client, model)
        overwrite(rng, client, model, 40)
        wait_for(lambda: len(listed(volume)) <= NEWEST_KEPT + 1, "checkpoints to be removed", limit_s=300)
        overwrite(rng, client, model, 20)
        wait_for(lambda: len(listed(volume)) <= NEWEST_KEPT + 1, "checkpoints to be removed", limit_s=300)
        verb(volume, "snapshot", "create", volume.url, "before")
    assert server.terminate() == 0, server.log_text()
    done = json.loads(verb(volume, "compact", volume.url, "--json"))
    assert done["objects"] > 0, done
    assert json.loads(verb(volume, "diff", volume.url, "@before", "@-0s", "--json")) == []
