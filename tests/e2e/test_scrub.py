"""`scrub_interval`: a server that finds damage before a client does, says so, and remembers it."""

import json
import random
import re

import pytest

from support.busy import busy
from support.endpoints import ask, page
from support.model import pattern
from support.others import objects_of
from support.past import verb
from support.process import wait_for
from support.server import KI, MI, Volume
from support.stores import BUCKET, free_port

SIZE = 32 * MI
# Passes that follow each other; and one that nothing follows.
AGAIN, ONCE = "1s", "30d"
LIMIT_S = 240


@pytest.fixture
def scrubbed(make_server):
    """Starts a server that scrubs and tells of itself: `scrubbed(volume, interval, parameter=value…)`; gives it and its address."""

    def start(volume, interval, **parameters):
        address = f"127.0.0.1:{free_port()}"
        server = make_server(volume, metrics=address, scrub_interval=interval, **parameters).start()
        return server, address

    return start


def scrub(address) -> dict | None:
    """What a server says of its scrub, once it knows of it."""
    volume = ask(address, "/status").json["volume"]
    return volume and volume["scrub"]


def ended(address, after_ms: int = 0) -> dict | None:
    """The last pass, once one has ended that began after this moment."""
    last = (scrub(address) or {}).get("last")
    return last if last and last["began_ms"] > after_ms else None


def kept(volume) -> dict | None:
    """What the volume keeps of its scrub."""
    return json.loads(verb(volume, "info", volume.url, "--json")).get("scrub")


@pytest.fixture
def volume(make_volume, make_server):
    """A volume with an object that was put in one piece, and one that was uploaded in parts."""
    volume = make_volume(SIZE, 4 * KI)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for tag, at, length in ((1, 0, 10 * MI), (2, 16 * MI, MI)):
            client.pwrite(pattern(length, tag), at)
            client.flush()
    assert server.terminate() == 0
    return volume


@pytest.mark.parametrize("name, first, last", [("0000000001.0", 0, 10 * MI), ("0000000002.0", 16 * MI, 17 * MI)])
def test_damage_behind_a_server_is_told_and_remembered(volume, scrubbed, name, first, last):
    server, address = scrubbed(volume, AGAIN)
    with server.connect():
        wait_for(lambda: ended(address), "a pass", LIMIT_S)
        whole = page(address)
        assert whole.value("scrub_bytes_total", checked="yes") >= 11 * MI
        assert whole.value("scrub_bytes_total", checked="no") == 0
        assert whole.value("scrub_damaged_places") == 0 and whole.sum("damage_found_total") == 0
        assert whole.value("scrub_timestamp_seconds") > whole.value("start_timestamp_seconds")
        assert ask(address, "/status").json["problems"] == []

        objects = objects_of(volume)
        at = len(objects.get(name)) * 2 // 3
        objects.flip(name, at)
        wait_for(lambda: page(address).value("damage_found_total", by="scrub") > 0, "the damage to be found", LIMIT_S)
        wait_for(lambda: page(address).value("scrub_damaged_places") == 1, "it to be told of", LIMIT_S)
        (problem,) = ask(address, "/status").json["problems"]
        assert name in problem, problem
        (place,) = scrub(address)["damage"]
        assert place["object"].endswith(f"/{name}") and place["is_newest_affected"]
        assert place["offset_bytes"] <= at < place["offset_bytes"] + place["len_bytes"]
        ranges = [(one["offset_bytes"], one["offset_bytes"] + one["len_bytes"]) for one in place["ranges"]]
        assert ranges and all(first <= start < end <= last for start, end in ranges), place
        # Each pass finds it again, and it is one. The first of these may be the pass that found it.
        began_ms = scrub(address)["last"]["began_ms"]
        for _ in range(2):
            began_ms = wait_for(lambda: ended(address, began_ms), "another pass", LIMIT_S)["began_ms"]
        assert page(address).value("damage_found_total", by="scrub") == 1
        wait_for(lambda: (kept(volume) or {}).get("damage") == [place], "it to be stored", LIMIT_S)
    log = [line for line in server.log_text().splitlines() if "the scrub found damage" in line]
    assert len(log) == 1 and name in log[0] and str(place["offset_bytes"]) in log[0], log
    assert server.terminate() == 0

    # Without any server: info names it, and check finds the same.
    shown = verb(volume, "info", volume.url)
    assert any(line.startswith("damage") and name in line for line in shown.splitlines()), shown
    done = volume.cli("check", volume.url, "--data", "--json")
    assert done.returncode == 1
    assert [problem["object"] for problem in json.loads(done.stdout)["problems"]] == [place["object"]]

    # Put back, it is forgotten by the next server, which looks at it first of all.
    objects.flip(name, at)
    server, address = scrubbed(volume, ONCE)
    with server.connect():
        wait_for(lambda: scrub(address) and scrub(address)["damage"] == [], "it to be forgotten", LIMIT_S)
        wait_for(lambda: kept(volume)["damage"] == [], "that to be stored", LIMIT_S)
        assert ask(address, "/status").json["problems"] == []
    assert server.terminate() == 0


def test_a_pass_outlives_servers_however_they_end(volume, scrubbed, store):
    server, address = scrubbed(volume, ONCE)
    with server.connect():
        last = wait_for(lambda: ended(address), "a pass", LIMIT_S)
        wait_for(lambda: (kept(volume) or {}).get("last") == last, "its end to be stored", LIMIT_S)
    server.kill()
    for end in (lambda server: server.kill(), lambda server: server.terminate()):
        server, address = scrubbed(volume, ONCE)
        with server.connect():
            known = wait_for(lambda: scrub(address), "the record", LIMIT_S)
            assert known["last"] == last and "pass" not in known, "the next one is due in a month"
            assert page(address).value("scrub_bytes_total", checked="yes") == 0
        end(server)
    shown = verb(volume, "info", volume.url)
    assert re.search(r"^scrub +ended .* 11[.\d]* MiB as they were written$", shown, re.MULTILINE), shown
    report = json.loads(verb(volume, "check", volume.url, "--json"))
    assert report["problems"] == [] and not any("not the volume's" in note for note in report["notes"])
    verb(volume, "delete", volume.url, "--yes")
    assert store.objects_of_volumes() == set(), "nothing of it stays"


def test_a_copy_is_scrubbed_for_itself(volume, scrubbed, store):
    """What a clone and a replica begin with knows nothing of the scrub of what they come from."""
    server, address = scrubbed(volume, ONCE)
    with server.connect():
        wait_for(lambda: ended(address), "a pass", LIMIT_S)
        wait_for(lambda: kept(volume), "it to be stored", LIMIT_S)
    assert server.terminate() == 0
    for words in (["clone"], ["clone", "--full"], ["replicate"]):
        to = Volume(store.url("-".join(words)), store, volume.size_bytes, volume.block_bytes)
        verb(volume, *words, volume.url, to.url)
        assert kept(to) is None
        server, address = scrubbed(to, ONCE)
        with server.connect() as client:
            # A clone's inherited objects too.
            wait_for(lambda: ended(address), "a pass", LIMIT_S)
            assert page(address).value("scrub_bytes_total", checked="yes") >= 11 * MI, words
            assert client.pread(MI, 16 * MI) == pattern(MI, 2)
        assert server.terminate() == 0


def test_nothing_that_it_reads_enters_a_cache(volume, scrubbed):
    server, address = scrubbed(volume, AGAIN)
    with server.connect() as client:
        last = wait_for(lambda: ended(address), "a pass", LIMIT_S)
        wait_for(lambda: ended(address, last["began_ms"]), "another one", LIMIT_S)
        before = page(address)
        assert client.pread(64 * KI, 5 * MI) == pattern(10 * MI, 1)[5 * MI : 5 * MI + 64 * KI]
        after = page(address)
        memory = {"cache": "data", "tier": "memory"}
        assert after.value("cache_hits_total", **memory) == before.value("cache_hits_total", **memory)
        assert after.value("cache_misses_total", cache="data") > before.value("cache_misses_total", cache="data")
    assert server.terminate() == 0


def test_beside_a_busy_server_nothing_is_missed_wrongly(make_volume, scrubbed, seed):
    """Checkpoints, objects and copies come and go while it reads."""
    rng = random.Random(seed)
    volume = make_volume(SIZE, 4 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "3")
    server, address = scrubbed(
        volume, AGAIN, retention_interval="1s", retention_grace="1s", checkpoint_interval="100ms", compaction="auto"
    )
    with busy(server, rng, 31 * MI):
        began_ms = 0
        for _ in range(5):
            last = wait_for(lambda: ended(address, began_ms), "a pass", LIMIT_S)
            began_ms = last["began_ms"]
        wait_for(lambda: page(address).value("retention_removed_checkpoints_total") > 50, "checkpoints to go", LIMIT_S)
        last = wait_for(lambda: ended(address, began_ms), "one more pass", LIMIT_S)
    assert page(address).value("damage_found_total", by="scrub") == 0
    assert scrub(address)["damage"] == [] and ask(address, "/status").json["problems"] == []
    assert server.terminate() == 0
    assert json.loads(verb(volume, "check", volume.url, "--data", "--json"))["problems"] == []


@pytest.mark.s3_only
def test_a_record_that_is_damaged_costs_a_pass(volume, scrubbed, store):
    server, address = scrubbed(volume, ONCE)
    with server.connect():
        wait_for(lambda: kept(volume) and kept(volume).get("last"), "a pass to be stored", LIMIT_S)
    assert server.terminate() == 0
    root = volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    store.minio.client().put_object(Bucket=BUCKET, Key=f"{root}.meta/scrub", Body=b"damaged")
    assert kept(volume) is None, "info goes on without it"
    assert ".meta/scrub" in verb_of_damage(volume)
    server, address = scrubbed(volume, ONCE)
    with server.connect():
        wait_for(lambda: kept(volume) and kept(volume).get("last"), "another one", LIMIT_S)
    assert server.terminate() == 0


def verb_of_damage(volume) -> str:
    """What a check says that finds something."""
    done = volume.cli("check", volume.url)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout
