"""The log that `hypernbd serve` keeps beside a volume on S3 unless told otherwise: one request a flush, found by every next
server, gone after a regular end, and no business of copies, clones and commands."""

import copy
import json
import re
import signal

import nbd
import pytest

from support.faulty import FaultyProxy
from support.lives import refused, with_the_log_alone
from support.model import pattern
from support.process import wait_for
from support.serve import Served
from support.server import KI, MI, Volume
from support.stores import BUCKET

FLUSHES = 60
LOUD = "info,hypernbd_volume::read::read_path=debug"
AT = 5 * KI
WRITTEN = pattern(10 * KI, 1)


@pytest.fixture
def serve(make_server, nbdkit, tmp_path):
    """Starts `hypernbd serve` on a volume, with these options; ended with the test."""
    running = []

    def start(volume, *options) -> Served:
        directory = tmp_path / f"served-{len(running) + 1}"
        directory.mkdir()
        socket = make_server(volume).directory / "served"
        served = Served(volume, nbdkit, directory, socket, *options)
        running.append(served)
        return served

    yield start
    for served in running:
        if served.process.poll() is None:
            served.kill()


@pytest.fixture
def killed(make_volume, serve):
    """A volume whose `hypernbd serve` was killed with one flushed write in its log alone."""

    def leave_one():
        volume = make_volume()
        served = serve(volume, "--checkpoint-interval", "1h")
        client = served.connect()
        client.pwrite(WRITTEN, AT)
        client.flush()
        served.kill()
        return volume, volume, 0

    volume = with_the_log_alone(leave_one)
    assert records(volume), "the log is beside the volume"
    return volume


def records(volume) -> list[str]:
    """The objects of the log beside a volume."""
    return [key for key in volume.store.objects() if key.startswith(beside(volume))]


def beside(volume) -> str:
    return volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/") + ".meta/log/"


def is_log_open(volume) -> bool:
    shown = volume.cli("wal", "info", volume.url, "--json")
    return json.loads(shown.stdout)["log"] is not None


def assert_reads(client, data: bytes, offset: int) -> None:
    assert client.pread(len(data), offset) == data


@pytest.mark.s3_only
@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI])
@pytest.mark.parametrize("options", [(), ("--wal", "off")])
def test_requests_of_a_flush(make_volume, serve, minio, monkeypatch, block_bytes, options):
    """A write of 4 KiB and a flush, again and again, over blocks that are stored: what of it goes to the store. The figures of
    docs/durability.md."""
    volume = make_volume(64 * MI, block_bytes)
    filled = serve(volume)
    client = filled.connect()
    client.pwrite(pattern(32 * MI, 1), 0)
    client.shutdown()
    assert filled.end() == 0
    proxy = FaultyProxy(minio.endpoint)
    behind = copy.copy(volume)
    behind.store = copy.copy(volume.store)
    behind.store.cli_options = ["--endpoint-url", proxy.endpoint, *volume.store.cli_options[2:]]
    monkeypatch.setenv("RUST_LOG", LOUD)
    # A renewal of the lease would be counted.
    served = serve(behind, "--checkpoint-interval", "1h", "--lease-duration", "24h", *options)
    client = served.connect()
    wait_for(lambda: "leaves of the index are in memory" in served.log.read_text(), "the index to be in memory")
    with proxy.lock:
        proxy.requests.clear()
    for number in range(FLUSHES):
        client.pwrite(pattern(4 * KI, number), (number * 7919 % 8192) * 4 * KI)
        client.flush()
    with proxy.lock:
        seen = list(proxy.requests)
    puts = [line for line in seen if line.startswith("PUT ")]
    # Listings are of the start, as that of the uploads that a killed server left, which is made behind the first client's back.
    gets = [line for line in seen if line.startswith("GET ") and not re.search(r"list-type|[?&]uploads|\.meta/", line)]
    print(f"{block_bytes} {options}: {len(puts) / FLUSHES} PUT, {len(gets) / FLUSHES} GET a flush")
    if options:
        # The checkpoint's data and its inode, and behind the answer its entry in the list, which several may share.
        assert 1.9 * FLUSHES <= len(puts) <= 3.1 * FLUSHES
        assert (not gets) == (block_bytes == 4 * KI), "a block written in part is completed first"
    else:
        assert FLUSHES <= len(puts) <= 1.15 * FLUSHES
        assert not gets, gets
    client.shutdown()
    assert served.end() == 0
    assert records(volume) == []


@pytest.mark.s3_only
def test_a_regular_end_leaves_no_log(make_volume, make_server, serve):
    volume = make_volume()
    served = serve(volume)
    client = served.connect()
    client.pwrite(WRITTEN, AT)
    client.flush()
    shown = json.loads(volume.cli("info", volume.url, "--json").stdout)
    assert shown["wal_url"].startswith(f"s3://{BUCKET}/{beside(volume)}") and "log record" in shown["durability"]
    told = volume.cli("info", volume.url).stdout
    assert "other Hyperfile tools do not look" in told and shown["wal_url"] in told, told
    client.shutdown()
    assert served.end() == 0
    assert "log record" in served.log.read_text(), "the announcement"
    assert records(volume) == [] and not is_log_open(volume)
    with make_server(volume).start().connect() as client:
        assert_reads(client, WRITTEN, AT)


@pytest.mark.s3_only
@pytest.mark.parametrize("how", [(), ("--wal", "off"), ("--wal", "auto"), ("--backend-wal-url", "auto")])
def test_the_next_serve_replays(killed, serve, how):
    served = serve(killed, "--checkpoint-interval", "1h", *how)
    client = served.connect()
    assert_reads(client, WRITTEN, AT)
    client.pwrite(pattern(4 * KI, 2), 1 * MI)
    client.flush()
    is_off = "off" in how
    assert is_log_open(killed) != is_off and (records(killed) == []) == is_off
    served.kill()
    again = serve(killed)
    client = again.connect()
    assert_reads(client, WRITTEN, AT)
    assert_reads(client, pattern(4 * KI, 2), 1 * MI)


@pytest.mark.s3_only
def test_bare_nbdkit_replays_and_goes_on_without(killed, make_server):
    server = make_server(killed, checkpoint_interval="1h").start()
    with server.connect() as client:
        assert_reads(client, WRITTEN, AT)
        assert not is_log_open(killed) and records(killed) == []
        client.pwrite(pattern(4 * KI, 2), AT)
        client.flush()
        server.kill()
    text = server.log_text()
    assert "replayed 1 records" in text and "is ended" in text, text
    with make_server(killed, backend_wal_url="auto").start().connect() as client:
        assert_reads(client, pattern(4 * KI, 2), AT)
        assert_reads(client, WRITTEN[4 * KI :], AT + 4 * KI)


@pytest.mark.s3_only
def test_read_only_reads_the_newest_checkpoint_and_says_so(killed, make_server):
    before = records(killed)
    server = make_server(killed, nbdkit_options=["-r"]).start()
    with server.connect() as client:
        assert_reads(client, bytes(10 * KI), AT)
    assert "may hold flushed writes" in server.log_text() and beside(killed) in server.log_text()
    assert server.terminate() == 0
    assert records(killed) == before


@pytest.mark.s3_only
@pytest.mark.parametrize("with_log", [True, False])
def test_a_takeover_shuts_the_older_server_out(make_volume, make_server, serve, with_log):
    """It was stopped with SIGSTOP, and wakes up: with and without a log of the new one's."""
    volume = make_volume()
    parameters = {"checkpoint_interval": "1h"}
    older = make_server(volume, backend_wal_url="auto", **parameters).start()
    paused = older.handle()
    paused.pwrite(WRITTEN, AT)
    paused.flush()
    older.process.send_signal(signal.SIGSTOP)
    log = {"backend_wal_url": "auto"} if with_log else {}
    newer = make_server(volume, takeover="yes", **log, **parameters).start()
    with newer.connect() as client:
        assert_reads(client, WRITTEN, AT)
        client.pwrite(pattern(4 * KI, 2), 1 * MI)
        client.flush()
        newer.kill()
    older.process.send_signal(signal.SIGCONT)
    with pytest.raises(nbd.Error):
        paused.pwrite(pattern(4 * KI, 3), 0)
        paused.flush()
    older.kill()
    client = serve(volume).connect()
    assert_reads(client, bytes(4 * KI), 0)
    assert_reads(client, WRITTEN, AT)
    assert_reads(client, pattern(4 * KI, 2), 1 * MI)


@pytest.mark.s3_only
def test_a_deletion_leaves_nothing(killed):
    deleted = killed.cli("delete", killed.url, "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert killed.store.objects_of_volumes() == set()


def copied(volume, name: str) -> Volume:
    """The prefixes of a volume, copied as `aws s3 cp --recursive` does."""
    store = volume.store
    client, old = store.minio.client(), f"{store.prefix}/{volume.url.rstrip('/').rsplit('/', 1)[1]}"
    for key in store.objects():
        if key.startswith((f"{old}/", f"{old}.meta/")):
            new = f"{store.prefix}/{name}" + key.removeprefix(old)
            client.copy_object(Bucket=BUCKET, Key=new, CopySource={"Bucket": BUCKET, "Key": key})
    return Volume(store.url(name), store, volume.size_bytes, volume.block_bytes)


@pytest.mark.s3_only
def test_a_copy_has_a_log_of_its_own(killed, make_server, serve):
    copy_of_it = copied(killed, "copy")
    before = {key: tag for key, tag in killed.store.objects().items() if key.startswith(beside(killed))}
    assert records(copy_of_it), "copied along"
    for log in ({}, {"backend_wal_url": "auto"}):
        text = refused(make_server(copy_of_it, **log))
        assert "of which this one is a copy" in text and "hypernbd wal replay" in text
    replayed = copy_of_it.cli("wal", "replay", copy_of_it.url)
    assert replayed.returncode == 0, replayed.stderr
    client = serve(copy_of_it).connect()
    assert_reads(client, WRITTEN, AT)
    client.pwrite(pattern(4 * KI, 2), AT)
    client.flush()
    after = {key: tag for key, tag in killed.store.objects().items() if key.startswith(beside(killed))}
    assert after == before
    original = serve(killed).connect()
    assert_reads(original, WRITTEN, AT)


@pytest.mark.s3_only
def test_a_clone_of_a_volume_with_an_open_log(killed, serve):
    """It begins at a checkpoint; the parent's log stays the parent's."""
    child = Volume(killed.store.url("child"), killed.store)
    cloned = killed.cli("clone", killed.url, child.url)
    assert cloned.returncode != 0 and "no checkpoint" in cloned.stderr, "nothing was published yet"
    assert killed.cli("wal", "replay", killed.url).returncode == 0
    cloned = killed.cli("clone", killed.url, child.url)
    assert cloned.returncode == 0, cloned.stderr
    parents = serve(killed, "--checkpoint-interval", "1h")
    parent = parents.connect()
    parent.pwrite(pattern(4 * KI, 2), AT)
    parent.flush()
    childs = serve(child, "--checkpoint-interval", "1h")
    client = childs.connect()
    assert_reads(client, WRITTEN, AT)
    client.pwrite(pattern(4 * KI, 3), 1 * MI)
    client.flush()
    parents.kill()
    childs.kill()
    client = serve(child).connect()
    assert_reads(client, WRITTEN, AT)
    assert_reads(client, pattern(4 * KI, 3), 1 * MI)
    parent = serve(killed).connect()
    assert_reads(parent, pattern(4 * KI, 2), AT)


@pytest.mark.s3_only
def test_commands_on_an_open_log(killed, tmp_path):
    """What would change the volume says what to do first; what reads it reads the newest checkpoint."""
    refusal = killed.cli("resize", killed.url, "--size", "65M")
    assert refusal.returncode != 0 and "wal replay" in refusal.stderr and beside(killed) in refusal.stderr
    image = tmp_path / "image"
    for data in (bytes(10 * KI), WRITTEN):
        exported = killed.cli("export", killed.url, str(image), "--format", "raw", "--overwrite")
        assert exported.returncode == 0, exported.stderr
        assert image.read_bytes()[AT : AT + 10 * KI] == data
        checked = killed.cli("check", killed.url, "--data")
        assert checked.returncode == 0, checked.stdout
        assert killed.cli("wal", "replay", killed.url).returncode == 0
    resized = killed.cli("resize", killed.url, "--size", "65M")
    assert resized.returncode == 0, resized.stderr


@pytest.mark.s3_only
def test_an_import_over_an_open_log(killed, make_server, tmp_path):
    """What the log holds is older than the image, and never comes over it."""
    image = tmp_path / "image"
    image.write_bytes(pattern(64 * MI, 4))
    imported = killed.cli("import", str(image), killed.url, "--overwrite")
    assert imported.returncode == 0, imported.stderr
    assert not is_log_open(killed) and records(killed) == []
    with make_server(killed, backend_wal_url="auto").start().connect() as client:
        assert_reads(client, pattern(64 * MI, 4)[: 1 * MI], 0)


@pytest.mark.file_only
def test_there_is_none_in_a_directory(make_volume, make_server, serve):
    """Unless it is asked for, nothing is said; `auto` is said to be none."""
    volume = make_volume()
    served = serve(volume)
    client = served.connect()
    client.pwrite(b"x", 0)
    client.flush()
    assert not is_log_open(volume)
    assert "makes no log" not in served.log.read_text()
    client.shutdown()
    assert served.end() == 0
    server = make_server(volume, backend_wal_url="auto").start()
    assert "makes no log for a volume in a directory" in server.log_text()


@pytest.mark.s3_only
@pytest.mark.parametrize(
    "options",
    [
        ("-o", "backend_wal_uri={}"),
        ("-o", "backend-wal-url={}"),
        ("--backend-wal-url", "{}"),
        ("--wal", "{}"),
        ("--", "backend_wal_url={}"),
    ],
)
def test_whoever_names_a_log_gets_that_one(make_volume, store, serve, options):
    volume = make_volume()
    url = store.url("log")
    # Behind the options that tests add, as nbdkit's arguments must be.
    store.cli_options, before = [*store.cli_options, *(option.format(url) for option in options)], store.cli_options
    served = serve(volume)
    store.cli_options = before
    client = served.connect()
    client.pwrite(b"x", 0)
    client.flush()
    assert records(volume) == []
    assert any("/log/" in key for key in store.objects())
    client.shutdown()
    assert served.end() == 0, served.log.read_text()
