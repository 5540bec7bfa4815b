"""Replications beside which something goes on: a log that nobody publishes, another replication, a deletion of the replica."""

import json
import re
import signal

import pytest

from support.faulty import Fault, FaultyProxy
from support.lives import begin
from support.model import pattern
from support.past import verb
from support.process import wait_for
from support.server import Volume
from test_replication import BLOCK, SIZE, Both, assert_whole, place


@pytest.fixture(params=["file", "s3"])
def both(request, make_volume, store, tmp_path, minio):
    yield Both(make_volume(SIZE, BLOCK), place(store, tmp_path, request.param, minio))


def test_flushed_writes_that_lie_in_a_log_alone_are_told_of(both, make_server, store, tmp_path):
    """While a server holds the volume they are its own; when nobody does, the copy is not all there is, and is no success."""
    log_url = store.url("log") if store.kind == "s3" else f"file://{tmp_path}/journal/"
    server = make_server(both.volume, backend_wal_url=log_url, checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(BLOCK, 1), 0)
        client.flush()
        assert both.must()["log_left"] is None
        server.kill()
    for more in ["--json"], []:
        done = both.run(*more)
        assert done.returncode == 1, done.stdout
        assert "wal replay" in done.stderr and log_url.rstrip("/") in done.stdout, (done.stdout, done.stderr)
    assert json.loads(both.run("--json").stdout)["log_left"].startswith(log_url.rstrip("/"))
    verb(both.volume, "wal", "replay", both.volume.url)
    assert both.must()["log_left"] is None
    reading = make_server(both.replica, nbdkit_options=["-r"]).start()
    with reading.connect() as client:
        assert client.pread(BLOCK, 0) == pattern(BLOCK, 1)


def test_who_follows_is_told_of_a_log_that_nobody_publishes(both, make_server, store, tmp_path):
    log_url = store.url("log") if store.kind == "s3" else f"file://{tmp_path}/journal/"
    # Whoever follows takes the server for dead once it has seen no renewal for as long: on a slow machine one of 2 s may come too late.
    options = {"backend_wal_url": log_url, "checkpoint_interval": "1h", "lease_duration": "10s"}
    server = make_server(both.volume, **options).start()
    log = tmp_path / "log"
    process = both.begin(log, "--follow", "--interval", "1s")
    with server.connect() as client:
        client.pwrite(pattern(BLOCK, 1), 0)
        client.flush()
        wait_for(lambda: "is at checkpoint" in log.read_text(), "the replica to be made")
        assert "in the log" not in log.read_text()
        server.kill()
    wait_for(lambda: "in the log" in log.read_text(), "the log to be told of")
    server.start()
    wait_for(lambda: "in the log" not in log.read_text().splitlines()[-1], "the log to be served again")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, log.read_text()


def held_in_one_store(make_volume, make_server, store, tmp_path, minio, where: str):
    """A replication within one store, whose first request of a kind is held back until the proxy heals."""
    volume = make_volume(SIZE, BLOCK)
    server = make_server(volume, checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(SIZE, 1), 0)
        client.flush()
    assert server.terminate() == 0
    proxy = FaultyProxy(minio.endpoint)
    replica = Volume(store.url("replica"), store, SIZE, BLOCK)
    fault = proxy.fail(Fault("hang", where=where, times_max=1))
    log = tmp_path / "log"
    process = begin(volume, proxy, log, "replicate", volume.url, replica.url)
    wait_for(lambda: fault.hits, "the request to be held back")
    return volume, replica, proxy, process, log


@pytest.mark.s3_only
def test_a_first_copy_replaces_nothing_of_what_another_one_made(make_volume, make_server, store, tmp_path, minio):
    """The end of an upload that the store fills itself arrives when the replica has been made, and written to, by others."""
    held = held_in_one_store(make_volume, make_server, store, tmp_path, minio, r"POST \S*/replica/0000000001\.0\?\S*uploadId")
    volume, replica, proxy, process, log = held
    verb(volume, "replicate", volume.url, replica.url)
    server = make_server(replica, checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(BLOCK, 2), 0)
        client.flush()
    assert server.terminate() == 0
    bucket, prefix = re.fullmatch(r"s3://([^/]*)/(.*)/", replica.url).groups()

    def written() -> dict:
        """When each object was; the same bytes have the same ETag."""
        listed = minio.client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
        return {one["Key"]: one["LastModified"] for one in listed}

    before = written()
    proxy.heal()
    assert process.wait(timeout=60) == 1, log.read_text()
    proxy.close()
    assert "a volume of its own" in log.read_text()
    assert written() == before
    assert_whole(replica)


@pytest.mark.s3_only
def test_a_place_that_is_deleted_while_it_is_made_becomes_no_volume(make_volume, make_server, store, tmp_path, minio):
    """The inode arrives after the deletion; nothing gives it a label, and a lease is not taken."""
    held = held_in_one_store(make_volume, make_server, store, tmp_path, minio, r"PUT \S*/replica/inode")
    _, replica, proxy, process, log = held
    verb(replica, "delete", replica.url, "--yes")
    proxy.heal()
    assert process.wait(timeout=60) == 1, log.read_text()
    proxy.close()
    assert "was deleted, or made anew" in log.read_text()
    assert not [key for key in store.objects() if "/replica" in key]


@pytest.mark.s3_only
def test_a_volume_that_is_made_at_the_replicas_place_keeps_its_objects(make_volume, make_server, store, tmp_path, minio):
    """The end of a copy arrives when the replica was deleted, and another volume there has an object of that name."""
    volume = make_volume(SIZE, BLOCK)
    server = make_server(volume, checkpoint_interval="1h").start()
    replica = Volume(store.url("replica"), store, SIZE, BLOCK)
    with server.connect() as client:
        client.pwrite(pattern(SIZE, 1), 0)
        client.flush()
        verb(volume, "replicate", volume.url, replica.url)
        client.pwrite(pattern(SIZE, 2), 0)
        client.flush()
    assert server.terminate() == 0
    proxy = FaultyProxy(minio.endpoint)
    # Without the fix it is a PUT with x-amz-copy-source, which replaces whatever is there.
    where = r"(POST \S*/replica/0000000002\.0\?\S*uploadId|PUT \S*/replica/0000000002\.0 )"
    fault = proxy.fail(Fault("hang", where=where, times_max=1))
    log = tmp_path / "log"
    process = begin(volume, proxy, log, "replicate", volume.url, replica.url)
    wait_for(lambda: fault.hits, "the copy to be held back")
    verb(replica, "delete", replica.url, "--yes", "--takeover")
    verb(replica, "create", replica.url, "--size", str(SIZE))
    server = make_server(replica, checkpoint_interval="1h").start()
    with server.connect() as client:
        for seed in (3, 4, 5):
            client.pwrite(pattern(SIZE, seed), 0)
            client.flush()
    assert server.terminate() == 0
    proxy.heal()
    assert process.wait(timeout=60) == 1, log.read_text()
    proxy.close()
    assert_whole(replica)
    server = make_server(replica).start()
    with server.connect() as client:
        assert client.pread(SIZE, 0) == pattern(SIZE, 5)
