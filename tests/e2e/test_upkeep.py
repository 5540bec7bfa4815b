"""Compaction and retention of a volume that is served, for who asks its server; and what a server says of its debt."""

import json
import signal

import pytest

from support.endpoints import ask, page
from support.model import Model, pattern, read_all
from support.others import objects_of
from support.past import read_at, verb
from support.process import spawn, wait_for
from support.server import CLI, KI, MI

SIZE = 64 * MI
BLOCK = 64 * KI
NEWEST_KEPT = 16
"""Checkpoints that are kept whatever the rules say."""
# Nothing is published, removed or moved by itself.
BY_HAND = {"checkpoint_interval": "1h", "retention_interval": "off", "retention_grace": "1s", "compaction": "off"}


@pytest.fixture
def serve(make_server):
    """Starts a server with a control socket: `serve(volume, …)`; gives both."""

    def start(volume, **parameters):
        server = make_server(volume, **{**BY_HAND, **parameters})
        path = server.directory / "control"
        server.parameters["control"] = f"unix:{path}"
        return server.start(), path

    return start


def numbers(volume) -> list[int]:
    return [one["cno"] for one in json.loads(verb(volume, "checkpoints", volume.url, "--json"))]


def space(volume) -> dict:
    return json.loads(verb(volume, "space", volume.url, "--json"))


def info(volume) -> dict:
    return json.loads(verb(volume, "info", volume.url, "--json"))


def write(client, model, data: bytes, at: int) -> None:
    client.pwrite(data, at)
    model.write(at, data)


def fragment(client, model, first: int, count: int, length: int = MI) -> None:
    """So many checkpoints of this length: each has one block that stays, and others that the next one writes again."""
    for number in range(first, first + count):
        write(client, model, pattern(length - BLOCK, number), 0)
        write(client, model, pattern(BLOCK, 1000 + number), SIZE // 2 + number * BLOCK)
        client.flush()


def fragmented(make_volume, serve) -> tuple:
    """A volume with objects that are mostly dead, which no kept checkpoint needs; and what it reads as."""
    volume, model = make_volume(SIZE, BLOCK), Model(SIZE, BLOCK)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    server, _ = serve(volume)
    with server.connect() as client:
        for first in (0, 24, 48):
            fragment(client, model, first, 24)
            verb(volume, "prune", volume.url)
    assert server.terminate() == 0, server.log_text()
    return volume, model


def test_a_served_volume_is_pruned_when_asked(make_volume, serve):
    """Also by a server that removes nothing by itself; what was needed a moment ago is waited for, or left to a later round."""
    volume, model = make_volume(SIZE, BLOCK), Model(SIZE, BLOCK)
    server, path = serve(volume)
    with server.connect() as client:
        fragment(client, model, 0, 30)
        verb(volume, "retention", "unset", volume.url)
        for what in ("compact", "retention"):
            refused = ask(path, f"/v1/{what}", "POST", {})
            assert refused.status == 400 and "retention set" in refused.json["error"]
        said = verb(volume, "retention", "set", volume.url, "--keep-last", "1")
        assert "removed" not in said and "more" not in said, "it removes nothing by itself"
        epoch = info(volume)["lease"]["epoch"]
        said = verb(volume, "prune", volume.url, "--no-wait")
        assert "removed 0 checkpoints and 0 objects" in said and "have not been needed for 1s" in said
        assert len(numbers(volume)) == 30
        assert "removed 14 checkpoints" in verb(volume, "prune", volume.url)
        assert numbers(volume) == list(range(15, 31))
        assert "removed 0 checkpoints and 0 objects with 0 bytes" in verb(volume, "control", "retention", volume.url)
        answer = ask(path, "/v1/retention", "POST").json
        assert answer["is_done"] and (answer["checkpoints"], answer["waiting"], answer["grace_ms"]) == (0, 0, 1000)
        assert answer["gone_since_start"]["checkpoints"] == 14
        assert not ask(path, "/v1/retention", "POST", {"only_if_automatic": True}).json["is_done"]
        assert info(volume)["lease"]["epoch"] == epoch, "nobody took the volume from its server"
        model.assert_same(read_all(client, SIZE))
    assert server.terminate() == 0, server.log_text()


def test_new_rules_are_gone_by_at_once(make_volume, serve):
    """The next round by itself would come in a day."""
    volume, model = make_volume(SIZE, BLOCK), Model(SIZE, BLOCK)
    server, _ = serve(volume, retention_interval="24h")
    with server.connect() as client:
        fragment(client, model, 0, 30)
        wait_for(lambda: ".meta/checkpoints/0000000030" in objects_of(volume).names(), "the entry of the last one")
        said = verb(volume, "retention", "set", volume.url, "--keep-last", "1")
        assert "keeps --keep-last 1" in said and "have not been needed for 1s" in said
        wait_for(lambda: numbers(volume) == list(range(15, 31)), "checkpoints to be removed")
        model.assert_same(read_all(client, SIZE))
    assert server.terminate() == 0, server.log_text()


@pytest.mark.parametrize("how", ["plain", "log", "buffer"])
def test_a_served_volume_is_compacted_when_asked(make_volume, serve, store, tmp_path, how):
    """What clients were told of is there after a kill, whatever keeps it, and every checkpoint reads."""
    volume, model = fragmented(make_volume, serve)
    more = {"plain": {}, "log": {"backend_wal_url": store.url("log")}, "buffer": {"write_buffer_dir": str(tmp_path / "buffer")}}[how]
    server, path = serve(volume, lease_duration="2s", **more)
    with server.connect() as client:
        epoch = info(volume)["lease"]["epoch"]
        # In memory alone, or in the log.
        write(client, model, pattern(3 * BLOCK, 7), 5 * MI + 100)
        if how == "log":
            client.flush()
        done = json.loads(verb(volume, "compact", volume.url, "--json"))
        assert done["objects"] >= 20 and done["checkpoints"] > 0 and not done["is_stopped"], done
        assert 0 < done["copied_bytes"] * 4 < done["object_bytes"], done
        assert info(volume)["lease"]["epoch"] == epoch, "nobody took the volume from its server"
        assert "copied" in verb(volume, "control", "compact", volume.url)
        model.assert_same(read_all(client, SIZE))
        if how != "plain":
            # Made upon what the relocation published.
            write(client, model, pattern(3 * BLOCK, 8), 6 * MI + 100)
        if how == "log":
            client.flush()
        server.kill()
    server.start()
    with server.connect() as client:
        model.assert_same(read_all(client, SIZE))
        for number in numbers(volume):
            read_at(server, f"@{number}", SIZE)
        verb(volume, "prune", volume.url)
        model.assert_same(read_all(client, SIZE))
    assert server.terminate() == 0, server.log_text()
    checked = volume.cli("check", volume.url, "--data")
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.file_only
def test_who_hangs_up_stops_the_compaction(make_volume, serve, tmp_path):
    """At this rate it would take minutes."""
    volume, model = fragmented(make_volume, serve)
    server, _ = serve(volume, compaction_rate="16K")
    newest = info(volume)["last_checkpoint"]
    command = [CLI, "compact", volume.url, *volume.store.cli_options]
    process = spawn([str(word) for word in command], tmp_path / "log", env=volume.store.env, limit_s=120)
    wait_for(lambda: "told to compact" in server.log_text(), "the server to be asked")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT, (tmp_path / "log").read_text()
    wait_for(lambda: "who asked for it has gone" in server.log_text(), "the server to stop it", limit_s=180)
    assert info(volume)["last_checkpoint"] == newest, "nothing was flipped to"
    with server.connect() as client:
        write(client, model, pattern(BLOCK, 9), 0)
        client.flush()
        model.assert_same(read_all(client, SIZE))
    assert server.terminate() == 0, server.log_text()


@pytest.mark.file_only
def test_the_debt_is_told_of_and_paid_when_asked(make_volume, serve):
    """Half a gigabyte is written: there is no debt below 256 MiB."""
    volume, model = make_volume(SIZE, BLOCK), Model(SIZE, BLOCK)
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    server, path = serve(volume)

    def debts() -> list[int]:
        """On both pages, and as counted by who looks at the store."""
        told = page(path).value("compaction_debt_bytes"), ask(path, "/status").json["space"]["debt_bytes"]
        return [*map(int, told), space(volume)["debt_bytes"]]

    with server.connect() as client:
        assert "hypernbd_compaction_debt_bytes" not in page(path).names(), "not counted yet"
        for first, count in ((0, 100), (100, 20)):
            fragment(client, model, first, count, 4 * MI)
            verb(volume, "prune", volume.url)
        told, shown, counted = debts()
        assert told == shown == counted > 32 * MI
        done = json.loads(verb(volume, "compact", volume.url, "--json"))
        assert done["objects"] >= 80 and done["copied_bytes"] * 10 < done["object_bytes"], done
        assert done["debt_bytes"] == 0
        assert debts() == [0, 0, 0]
        model.assert_same(read_all(client, SIZE))
    assert server.terminate() == 0, server.log_text()
