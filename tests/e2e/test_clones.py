"""Clones: what they share with their parents, what they keep from going, and what ends that."""

import json
import random
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.faulty import Fault, FaultyProxy
from support.lives import refused
from support.model import Model, pattern, random_change, read_all
from support.past import read_at, verb
from support.process import wait_for
from support.server import GI, KI, MI, Volume, flush_until_it_succeeds

SIZE = 8 * MI + 3 * KI
BLOCK = 64 * KI
REQUESTS_MAX = 13
"""Requests of a clone, whatever its size."""
FIRST_READ_MAX = 10
"""Requests of the container's objects, and for what stands beside them, until the first block is read."""


def clone(volume, name: str, *words: str) -> Volume:
    """A clone of a volume."""
    made = Volume(volume.store.url(name), volume.store, volume.size_bytes, volume.block_bytes)
    verb(volume, "clone", volume.url, *words, made.url)
    return made


def info(volume) -> dict:
    return json.loads(verb(volume, "info", volume.url, "--json"))


def space(volume) -> dict:
    return json.loads(verb(volume, "space", volume.url, "--json"))


def change(rng: random.Random, server, model: Model, changes: int = 12) -> None:
    """Random changes to a served volume and its model, all of them flushed."""
    with server.connect() as client:
        for _ in range(changes):
            random_change(rng, client, model, 256 * KI)
        client.flush()


def assert_same(server, model: Model) -> None:
    with server.connect() as client:
        model.assert_same(read_all(client, len(model.data)))


def copy_of(model: Model) -> Model:
    copied = Model(len(model.data), model.block_bytes)
    copied.data[:] = model.data
    return copied


@pytest.fixture
def parent(make_volume, make_server, seed):
    """A served volume with random contents, and its model."""
    volume = make_volume(SIZE, BLOCK)
    server = make_server(volume, checkpoint_interval="1h").start()
    model = Model(SIZE, BLOCK)
    with server.connect() as client:
        client.pwrite(pattern(SIZE // 2, seed), BLOCK)
        model.write(BLOCK, pattern(SIZE // 2, seed))
    change(random.Random(seed), server, model)
    return server, model


def test_both_go_their_own_ways(parent, make_server, seed):
    """While both are served and written to, each reads as its own model, and so does each after another start."""
    server, model = parent
    rng = random.Random(seed + 1)
    fork = copy_of(model)
    child = clone(server.volume, "child")
    children = make_server(child, checkpoint_interval="1h").start()
    of_child = copy_of(model)
    assert_same(children, of_child)
    for _ in range(4):
        change(rng, server, model)
        change(rng, children, of_child)
        assert_same(server, model)
        assert_same(children, of_child)
    first = json.loads(verb(child, "checkpoints", child.url, "--json"))[0]["cno"]
    fork.assert_same(read_at(children, f"@{first}", SIZE), what="the fork")
    verb(child, "snapshot", "create", child.url, "before")
    before = copy_of(of_child)
    change(rng, children, of_child)
    assert json.loads(verb(child, "diff", child.url, f"@{first}", "@before", "--json"))
    for one in (server, children):
        assert one.terminate() == 0, one.log_text()
    for volume in (server.volume, child):
        verb(volume, "check", volume.url, "--data")
    verb(child, "rollback", child.url, "@before", "--yes")
    for one, expected in ((server, model), (children, before)):
        one.start()
        assert_same(one, expected)
        assert one.terminate() == 0, one.log_text()
    verb(child, "rollback", child.url, f"@{first}", "--yes")
    children.start()
    assert_same(children, fork)


def test_of_an_earlier_checkpoint(parent, make_server, seed):
    server, model = parent
    volume = server.volume
    verb(volume, "snapshot", "create", volume.url, "golden")
    golden = copy_of(model)
    change(random.Random(seed + 2), server, model)
    for name, words in (("by-name", ["@golden"]), ("behind", None)):
        if words is None:
            child = Volume(volume.store.url(name), volume.store)
            verb(volume, "clone", f"{volume.url}@golden", child.url)
        else:
            child = clone(volume, name, *words)
        children = make_server(child).start()
        assert_same(children, golden)
    newest = make_server(clone(volume, "newest")).start()
    assert_same(newest, model)


def test_a_parent_stays_while_there_are_clones(parent, make_server):
    """It is not deleted, whoever asks; its rules remove what the clone does not need, and nothing that it does."""
    server, model = parent
    volume = server.volume
    verb(volume, "retention", "set", volume.url, "--keep-last", "1")
    child = clone(volume, "child")
    of_child = copy_of(model)
    with server.connect() as client:
        for tag in range(25):
            client.pwrite(pattern(SIZE, tag), 0)
            client.flush()
    assert server.terminate() == 0
    said = verb(volume, "delete", volume.url, "--yes", status=1)
    assert child.url in said and "--flatten" in said, said
    forked = info(child)["clone_of"]["checkpoint"]
    assert [one["checkpoint"] for one in info(volume)["clones"]] == [forked]
    assert info(volume)["clones"][0]["url"] == child.url
    removed = verb(volume, "prune", volume.url)
    assert not removed.startswith("removed 0"), removed
    kept = json.loads(verb(volume, "checkpoints", volume.url, "--json"))
    assert "in-use" in next(one for one in kept if one["cno"] == forked)["kept_by"]
    children = make_server(child, checkpoint_interval="1h").start()
    assert_same(children, of_child)
    # The clone has rules, too, and removes nothing of its parent's.
    verb(child, "retention", "set", child.url, "--keep-last", "1")
    with children.connect() as client:
        for tag in range(25):
            client.pwrite(pattern(MI, tag), 0)
            client.flush()
            of_child.write(0, pattern(MI, tag))
    assert children.terminate() == 0
    of_parent = {key for key in volume.store.objects_of_volumes() if "child" not in key}
    assert not verb(child, "prune", child.url).startswith("removed 0")
    assert {key for key in volume.store.objects_of_volumes() if "child" not in key} == of_parent
    children.start()
    assert_same(children, of_child)
    assert children.terminate() == 0
    verb(child, "delete", child.url, "--yes")
    assert not info(volume).get("clones")
    assert not verb(volume, "prune", volume.url).startswith("removed 0"), "what the clone alone needed goes"
    verb(volume, "delete", volume.url, "--yes")


@pytest.mark.s3_only
def test_takes_few_requests_at_any_size(make_volume, make_server, minio):
    """A volume of 100 GiB with data all over it."""
    size = 100 * GI
    volume = make_volume(size, BLOCK)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        for at in range(0, size, 2 * GI):
            client.pwrite(pattern(BLOCK, at), at)
        client.flush()
    assert server.terminate() == 0
    proxy = FaultyProxy(minio.endpoint)
    # What is not answered for long is asked for again, and counted twice.
    for attempt in range(3):
        proxy.requests.clear()
        child = Volume(volume.store.url(f"child-{attempt}"), volume.store, size, BLOCK)
        done = volume.cli("clone", volume.url, child.url, "--endpoint-url", proxy.endpoint)
        assert done.returncode == 0, done.stderr
        if len(proxy.requests) <= REQUESTS_MAX:
            break
    assert len(proxy.requests) <= REQUESTS_MAX, "\n".join(proxy.requests)
    proxy.requests.clear()
    reading = make_server(child, endpoint_url=proxy.endpoint, nbdkit_options=["-r"]).start()
    with reading.connect() as client:
        assert client.pread(BLOCK, 8 * GI) == pattern(BLOCK, 8 * GI)
    assert reading.terminate() == 0
    proxy.close()


@pytest.mark.s3_only
def test_half_of_an_import_is_not_cloned(parent, minio):
    """Unless its checkpoint is named. Whether there is a note of one is seen in a listing."""
    server, _ = parent
    volume = server.volume
    bucket, root = volume.url.removeprefix("s3://").rstrip("/").split("/", 1)
    note = {"source": None, "written_bytes": 0, "epoch": 1, "is_new": False}
    for body, why in ((json.dumps(note), "is not finished"), ("damaged", "the note of an import")):
        minio.client().put_object(Bucket=bucket, Key=f"{root}.meta/import", Body=body.encode())
        assert why in verb(volume, "clone", volume.url, volume.store.url("half"), status=1)
    # The list has it a moment after the flush.
    listed = wait_for(lambda: json.loads(verb(volume, "checkpoints", volume.url, "--json")), "the list to have a checkpoint")
    newest = listed[-1]["cno"]
    clone(volume, "named", f"@{newest}")
    minio.client().put_object(Bucket=bucket, Key=f"{root}.meta/import", Body=json.dumps({**note, "is_finished": True}).encode())
    clone(volume, "whole")


@pytest.mark.parametrize("how", ["log", "buffer", "plain"])
def test_killed_again_and_again(parent, make_server, store, tmp_path, seed, how):
    """A clone's server is killed: what was flushed, or answered with a buffer file, is there."""
    server, model = parent
    rng = random.Random(seed + 3)
    child = clone(server.volume, "child")
    more = {"plain": {}, "log": {"backend_wal_url": store.url("log")}, "buffer": {"write_buffer_dir": str(tmp_path / "buffer")}}
    children = make_server(child, checkpoint_interval="200ms", lease_duration="2s", **more[how])
    of_child = copy_of(model)
    for _ in range(3):
        children.start()
        assert_same(children, of_child)
        change(rng, children, of_child)
        children.kill()
    children.start()
    assert_same(children, of_child)
    assert_same(server, model)


@pytest.mark.s3_only
def test_a_publish_that_fails_is_made_good(parent, make_server, minio, seed):
    """The index of what is inherited is found again after a recovery."""
    server, model = parent
    child = clone(server.volume, "child")
    proxy = FaultyProxy(minio.endpoint)
    children = make_server(child, endpoint_url=proxy.endpoint, checkpoint_interval="1h", env={"AWS_MAX_ATTEMPTS": "1"}).start()
    rng = random.Random(seed + 4)
    of_child = copy_of(model)
    for where in (r"PUT \S*/child/inode", r"PUT \S*/child/0000"):
        proxy.fail(Fault("500", where=where, times_max=1))
        with children.connect() as client:
            for _ in range(6):
                random_change(rng, client, of_child, 256 * KI)
            # A short last block, too.
            client.pwrite(b"end", SIZE - 3)
            of_child.write(SIZE - 3, b"end")
            flush_until_it_succeeds(client)
        proxy.heal()
        assert_same(children, of_child)
    assert children.terminate() == 0, children.log_text()
    children.start()
    assert_same(children, of_child)
    proxy.close()


def test_a_clone_of_a_clone(parent, make_server, seed):
    server, model = parent
    rng = random.Random(seed + 5)
    child = clone(server.volume, "child")
    children = make_server(child, checkpoint_interval="1h").start()
    of_child = copy_of(model)
    change(rng, children, of_child)
    grandchild = clone(child, "grandchild")
    grandchildren = make_server(grandchild, checkpoint_interval="1h").start()
    of_grandchild = copy_of(of_child)
    for one, its in ((server, model), (children, of_child), (grandchildren, of_grandchild)) * 2:
        change(rng, one, its)
        assert_same(one, its)
    for one, its in ((server, model), (children, of_child), (grandchildren, of_grandchild)):
        assert_same(one, its)
        assert one.terminate() == 0, one.log_text()
    for volume in (server.volume, child):
        assert "clones share its objects" in verb(volume, "delete", volume.url, "--yes", status=1)
    grandchildren.start()
    assert_same(grandchildren, of_grandchild)


@pytest.mark.s3_only
def test_in_another_bucket(parent, make_server, minio, seed):
    server, model = parent
    bucket = f"hypernbd-other-{seed}"
    minio.client().create_bucket(Bucket=bucket)
    volume = server.volume
    child = Volume(f"s3://{bucket}/child/", volume.store, SIZE, BLOCK)
    verb(volume, "clone", volume.url, child.url)
    children = make_server(child, checkpoint_interval="1h").start()
    of_child = copy_of(model)
    change(random.Random(seed + 6), children, of_child)
    assert_same(children, of_child)
    assert children.terminate() == 0
    assert child.url in verb(volume, "delete", volume.url, "--yes", status=1)
    verb(child, "delete", child.url, "--yes")
    minio.client().delete_bucket(Bucket=bucket)
    assert_same(server, model)


def test_what_cannot_be_is_refused(parent, make_server, store, tmp_path):
    server, model = parent
    volume = server.volume
    child = clone(volume, "child")
    assert "already" in verb(volume, "clone", volume.url, child.url, status=1)
    assert "onto itself" in verb(volume, "clone", volume.url, volume.url, status=1)
    other_kind = "s3://bucket/x/" if store.kind == "file" else f"file://{tmp_path}/x/"
    assert "another kind of store" in verb(volume, "clone", volume.url, other_kind, status=1)
    assert "no checkpoint" in verb(volume, "clone", volume.url, "@4711", store.url("other"), status=1)
    assert len(info(volume)["clones"]) == 1
    copied = Volume(store.url("copied"), store, SIZE, BLOCK)
    if store.kind == "file":
        shutil.copytree(store.directory / "child", store.directory / "copied")
    else:
        client = store.minio.client()
        for key in store.objects():
            if re.search(r"/child[/.]", key):
                to = re.sub(r"/child(?=[/.])", "/copied", key)
                client.copy_object(Bucket="hypernbd-e2e", Key=to, CopySource={"Bucket": "hypernbd-e2e", "Key": key})
    for options in ([], ["-r"]):
        log = refused(make_server(copied, nbdkit_options=options))
        assert "it was made at" in log, log
    assert "is a copy" in verb(copied, "export", copied.url, "-", status=1)
    assert_same(server, model)


def test_a_full_clone_shares_nothing(parent, make_server):
    server, model = parent
    volume = server.volume
    first = copy_of(model)
    verb(volume, "snapshot", "create", volume.url, "first")
    change(random.Random(1), server, model)
    copied = clone(volume, "copied", "@first", "--full")
    assert "clone_of" not in info(copied) and "clones" not in info(volume)
    assert space(copied)["shared_bytes"] == 0
    assert server.terminate() == 0
    verb(volume, "delete", volume.url, "--yes")
    of_copy = make_server(copied, checkpoint_interval="1h").start()
    assert_same(of_copy, first)
    change(random.Random(2), of_copy, first)
    assert_same(of_copy, first)


def test_a_flattened_clone_needs_its_parent_no_more(parent, make_server, seed):
    """Its own checkpoints, from the first on, read as they did, without the parent."""
    server, model = parent
    volume = server.volume
    fork = copy_of(model)
    child = clone(volume, "child")
    of_child = copy_of(model)
    children = make_server(child, checkpoint_interval="1h", control="off").start()
    change(random.Random(seed + 7), children, of_child)
    said = verb(child, "clone", "--flatten", child.url, status=1)
    assert "held" in said and "on the machine of that server" in said, said
    assert children.terminate() == 0
    shared = space(child)
    assert shared["shared_bytes"] > MI, shared
    grandchild = clone(child, "grandchild")
    assert "clones of its own" in verb(child, "clone", "--flatten", child.url, status=1)
    verb(grandchild, "delete", grandchild.url, "--yes")
    done = json.loads(verb(child, "clone", "--flatten", child.url, "--json"))
    assert done["objects"] > 0 and done["bytes"] >= shared["shared_bytes"] // 2
    assert "is no clone" in verb(child, "clone", "--flatten", child.url, status=1)
    flat = space(child)
    assert flat["shared_bytes"] == 0 and flat["live_bytes"] >= shared["live_bytes"] + shared["shared_bytes"]
    assert "clone_of" not in info(child) and "clones" not in info(volume)
    first = json.loads(verb(child, "checkpoints", child.url, "--json"))[0]["cno"]
    assert server.terminate() == 0
    verb(volume, "delete", volume.url, "--yes")
    children.start()
    assert_same(children, of_child)
    fork.assert_same(read_at(children, f"@{first}", SIZE), what="the fork")
    change(random.Random(seed + 8), children, of_child)
    assert_same(children, of_child)
    assert children.terminate() == 0
    verb(child, "retention", "set", child.url, "--keep-last", "1")
    verb(child, "prune", child.url)
    children.start()
    assert_same(children, of_child)


def serve(make_server, volume, **parameters):
    """A server that is told what to do."""
    server = make_server(volume, **parameters)
    server.parameters["control"] = f"unix:{server.directory / 'control'}"
    return server.start()


def test_a_served_clone_is_flattened_beside_its_clients(parent, make_server, seed):
    """Clients, compaction and retention go on meanwhile. The parent goes while the clone is served, which reads on, then and later."""
    server, model = parent
    volume = server.volume
    fork = copy_of(model)
    rng = random.Random(seed + 9)
    child = clone(volume, "child")
    first = json.loads(verb(child, "checkpoints", child.url, "--json"))[0]["cno"]
    verb(child, "snapshot", "create", child.url, "begun", f"@{first}")
    children = serve(make_server, child, checkpoint_interval="1h", retention_grace="1s")
    of_child = copy_of(model)
    change(rng, children, of_child)
    epoch = info(child)["lease"]["epoch"]
    with ThreadPoolExecutor() as pool:
        flattening = pool.submit(verb, child, "clone", "--flatten", child.url, "--json")
        is_over = False
        while not is_over:
            is_over = flattening.done()
            change(rng, children, of_child)
            verb(child, "compact", child.url)
            verb(child, "prune", child.url, "--no-wait")
        done = json.loads(flattening.result())
    assert done["objects"] > 0 and done["bytes"] > MI, done
    assert info(child)["lease"]["epoch"] == epoch, "nobody took the volume from its server"
    assert "clone_of" not in info(child) and "clones" not in info(volume)
    assert server.terminate() == 0, server.log_text()
    verb(volume, "delete", volume.url, "--yes")
    assert_same(children, of_child)
    fork.assert_same(read_at(children, "@begun", SIZE), what="the fork")
    change(rng, children, of_child)
    assert_same(children, of_child)
    assert "is no clone" in verb(child, "clone", "--flatten", child.url, status=1)
    assert children.terminate() == 0, children.log_text()
    children.start()
    assert_same(children, of_child)
    fork.assert_same(read_at(children, "@begun", SIZE), what="the fork")
    verb(child, "prune", child.url)
    assert_same(children, of_child)
    assert children.terminate() == 0, children.log_text()
    verb(child, "check", child.url, "--data")


def kill_while_it_is_flattened(server, words: list[str], after_s: float) -> None:
    """The command may have ended by then."""
    asked = "told to end the sharing"
    # The log has the words of earlier starts, too.
    before = server.log_text().count(asked)
    with ThreadPoolExecutor() as pool:
        flattening = pool.submit(server.volume.cli, *words)
        wait_for(lambda: flattening.done() or server.log_text().count(asked) > before, "the server to be asked")
        time.sleep(after_s)
        server.kill()
        flattening.result()


def test_killed_while_it_is_flattened(parent, make_server, seed):
    """Wherever that is, what was flushed is there, and the same command ends it."""
    server, model = parent
    volume = server.volume
    rng = random.Random(seed + 10)
    child = clone(volume, "child")
    of_child = copy_of(model)
    children = make_server(child, checkpoint_interval="200ms", lease_duration="2s")
    children.parameters["control"] = f"unix:{children.directory / 'control'}"
    words = ["clone", "--flatten", child.url]
    for _ in range(4):
        children.start()
        assert_same(children, of_child)
        change(rng, children, of_child)
        kill_while_it_is_flattened(children, words, rng.random() / 4)
    children.start()
    assert_same(children, of_child)
    done = child.cli(*words)
    assert done.returncode == 0 or "is no clone" in done.stderr, done.stderr
    assert server.terminate() == 0, server.log_text()
    verb(volume, "delete", volume.url, "--yes")
    assert_same(children, of_child)
    assert children.terminate() == 0, children.log_text()
    children.start()
    assert_same(children, of_child)
    assert children.terminate() == 0, children.log_text()
    verb(child, "check", child.url, "--data")
