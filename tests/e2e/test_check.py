"""`hypernbd check`: beside servers, after crashes, with what is wrong named, and with few requests."""

import json
import random
import re

import pytest

from support.busy import busy
from support.faulty import FaultyProxy
from support.model import pattern
from support.others import objects_of
from support.past import verb
from support.process import wait_for
from support.server import GI, KI, MI, Volume
from support.stamps import SIZE, kill_and_check
from support.stores import BUCKET

REQUESTS_MAX = 400


def checked(volume, *words: str, status: int = 0) -> dict:
    """The report of a check."""
    done = volume.cli("check", volume.url, "--json", *words)
    assert done.returncode == status, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_volume_that_is_whole(make_volume, make_server, store):
    volume = make_volume(64 * MI, 4 * KI)
    server = make_server(volume).start()
    with server.connect() as client:
        for number in range(1, 6):
            client.pwrite(pattern(MI, number), number * 5 * MI)
            client.flush()
    verb(volume, "snapshot", "create", volume.url, "monday", "@2")
    assert server.terminate() == 0
    before = store.objects()
    report = checked(volume, "--data")
    assert report["problems"] == [] and report["checkpoints"] == 5 and report["data_bytes"] == 5 * MI
    assert report["verified_bytes"] + report["unverified_bytes"] >= 5 * MI
    assert checked(volume, "--data", "--snapshot", "@monday")["data_bytes"] == 2 * MI
    assert checked(volume, "--data", "--since", "@monday")["data_bytes"] == 3 * MI
    text = verb(volume, "check", volume.url)
    assert "nothing is wrong" in text and "5 checkpoints up to 5" in text, text
    assert store.objects() == before, "a check writes nothing"


def test_what_cannot_be_checked_is_told_by_the_exit_status(store, make_volume):
    volume = make_volume()
    nothing = Volume(store.url("nothing"), store, MI, 64 * KI)
    assert "hypernbd:" in verb(nothing, "check", nothing.url, status=2)
    assert "@17" in verb(volume, "check", volume.url, "--snapshot", "@17", status=2)


@pytest.mark.s3_only
@pytest.mark.parametrize("name", ["inode", "0000000001.0", ".meta/checkpoints/0000000001", ".meta/lease", ".meta/snapshots/monday"])
def test_a_changed_object_is_named_with_what_it_affects(make_volume, make_server, store, name):
    """Changed in the bucket, with the metadata that it has; and gone."""
    volume = make_volume(64 * MI, 4 * KI)
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(MI, 1), 8 * MI)
        client.flush()
    verb(volume, "snapshot", "create", volume.url, "monday")
    assert server.terminate() == 0
    root = volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    key = root + name if name.startswith(".meta") else f"{root}/{name}"
    client = store.minio.client()
    got = client.get_object(Bucket=BUCKET, Key=key)
    body = got["Body"].read()
    at = len(body) * 2 // 3
    changed = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
    client.put_object(Bucket=BUCKET, Key=key, Body=changed, Metadata=got["Metadata"])
    report = checked(volume, "--data", status=1)
    problem = next(problem for problem in report["problems"] if problem["object"] == key)
    assert problem["kind"] == "damaged" and problem["advice"]
    if name == "0000000001.0":
        assert problem["checkpoints"] == [[1, 1]] and problem["names"] == ["monday"] and problem["is_newest_affected"]
        ranges = problem["ranges"]
        assert ranges and all(8 * MI <= one["offset_bytes"] < 9 * MI for one in ranges), ranges
        assert sum(one["len_bytes"] for one in ranges) <= 128 * KI
        text = volume.cli("check", volume.url, "--data")
        assert text.returncode == 1 and f"PROBLEM {key}" in text.stdout and "affects checkpoints 1" in text.stdout
        client.delete_object(Bucket=BUCKET, Key=key)
        gone = checked(volume, status=1)
        assert [one["kind"] for one in gone["problems"]] == ["missing"]
    client.put_object(Bucket=BUCKET, Key=key, Body=body, Metadata=got["Metadata"])
    assert checked(volume, "--data")["problems"] == []


def test_a_label_that_is_gone_is_named_with_what_to_do(make_volume, make_server):
    volume = make_volume()
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 1), 0)
        client.flush()
    assert server.terminate() == 0
    objects, name = objects_of(volume), ".meta/volume.json"
    label = objects.get(name)
    objects.remove([name])
    problems = checked(volume, status=1)["problems"]
    assert [one["kind"] for one in problems] == ["missing"] and problems[0]["object"].endswith(name), problems
    text = volume.cli("check", volume.url)
    assert text.returncode == 1 and "PROBLEM" in text.stdout and "put it back" in text.stdout, text.stdout
    objects.put(name, label)
    assert checked(volume)["problems"] == []


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
def test_what_kill_9_leaves_is_no_problem(make_volume, make_server, seed, block_bytes):
    volume = make_volume(SIZE, block_bytes)
    server = make_server(volume, checkpoint_interval="100ms").start()
    kill_and_check(server, seed, rounds=3)
    server.kill()
    assert checked(volume, "--data")["problems"] == []


def test_beside_a_busy_server(make_volume, make_server, seed):
    """Checkpoints come and go while it looks: nothing of that is a problem, and the server notices nothing."""
    rng = random.Random(seed)
    volume = make_volume(32 * MI, 4 * KI)
    verb(volume, "retention", "set", volume.url, "--keep-last", "3")
    server = make_server(volume, retention_interval="1s", retention_grace="1s", checkpoint_interval="100ms").start()
    with busy(server, rng, 31 * MI):
        wait_for(lambda: checked(volume)["newest_checkpoint"] > 25, "some checkpoints", 240)
        reports = [checked(volume, *words) for words in [[], ["--data"], [], ["--data"]]]
        seen = reports[-1]["newest_checkpoint"]
        wait_for(lambda: checked(volume, "--data")["newest_checkpoint"] > seen + 20, "more checkpoints", 240)
    assert all(report["problems"] == [] for report in reports)
    assert server.terminate() == 0


@pytest.mark.s3_only
def test_a_sparse_volume_takes_few_requests(store, make_server, minio):
    """100 GiB with 1 GiB in it, as an import stores it."""
    proxy = FaultyProxy(minio.endpoint)
    try:
        volume = Volume(store.url("sparse"), store, 100 * GI, 64 * KI)
        check_call(volume, "create", volume.url, "--size", "100G", "--block-size", "4K")
        server = make_server(volume, checkpoint_interval="1h").start()
        with server.connect() as client:
            # A run of 1 MiB in each of 1024 places.
            for number in range(1024):
                client.pwrite(pattern(MI, number), number * 100 * MI)
            client.flush()
        assert server.terminate() == 0
        seen = len(proxy.requests)
        report = through(proxy, volume, "check", volume.url, "--json")
        assert report["problems"] == [] and report["data_bytes"] == GI
        asked = len(proxy.requests) - seen
        assert asked <= REQUESTS_MAX, f"{asked} requests"
        changes = [line for line in proxy.requests[seen:] if not re.match(r"(GET|HEAD) ", line)]
        assert changes == []
        print(f"{asked} requests for {report['index_nodes']} nodes")
    finally:
        proxy.close()


def check_call(volume, *words: str) -> None:
    done = volume.cli(*words)
    assert done.returncode == 0, done.stderr


def through(proxy, volume, *words: str) -> dict:
    """A report of a check whose requests the proxy sees."""
    done = volume.cli("--endpoint-url", proxy.endpoint, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_an_object_that_lost_its_metadata_is_compared_before_it_gets_check_values(make_volume, make_server):
    """Uploaded anew by other tools: what lies beside the container tells what it was."""
    volume = make_volume(64 * MI, 4 * KI)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(7 * MI, 1), 0)
        client.flush()
    assert server.terminate() == 0
    objects, name = objects_of(volume), "0000000001.0"
    body, sums = objects.get(name), objects.get(f".meta/sums/{name}")
    changed = body[:3000000] + bytes([body[3000000] ^ 1]) + body[3000001:]
    objects.put(name, changed)
    assert name in json.dumps(checked(volume, "--data", "--write", status=1)["problems"])
    assert objects.get(f".meta/sums/{name}") == sums, "nothing makes the damage valid"
    objects.put(name, body)
    checked(volume, "--data", "--write")
    assert checked(volume, "--data")["unverified_bytes"] == 0
