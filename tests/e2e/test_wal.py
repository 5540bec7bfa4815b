"""The write-ahead log: parameters, what it leaves behind, refusals with their way out, and its commands."""

import contextlib
import json
import os
import shutil
import signal

import nbd
import pytest

from support.lives import refused, with_the_log_alone
from support.model import pattern
from support.process import check, run, wait_for
from support.server import KI, MI, PLUGIN


@pytest.fixture(params=["s3", "journal"])
def wal_url(request, store, tmp_path) -> str:
    """Where the log goes: a prefix beside the volume, or a directory that is not there yet."""
    if request.param == "s3":
        if store.kind != "s3":
            pytest.skip("a log on S3 needs S3")
        return store.url("log")
    return f"file://{tmp_path}/logs/journal/"


@pytest.fixture
def log_objects(store, wal_url, tmp_path):
    """What the log consists of just now."""

    def look() -> list[str]:
        if wal_url.startswith("file:"):
            return [str(path) for path in (tmp_path / "logs").rglob("*") if path.is_file()]
        return [key for key in store.objects() if "/log/" in key]

    return look


def killed_with_flushed_writes(make_volume, make_server, **parameters):
    """A server killed with one write flushed to its log alone."""

    def leave_one():
        server = make_server(make_volume(), checkpoint_interval="1h", **parameters).start()
        with server.connect() as client:
            client.pwrite(pattern(10 * KI, 1), 5 * KI)
            client.flush()
            server.kill()
        return server, server.volume, 0

    return with_the_log_alone(leave_one)


def test_a_flush_is_in_the_log_until_it_is_published(make_volume, make_server, wal_url, log_objects):
    server = make_server(make_volume(), backend_wal_url=wal_url, checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 1), 1 * MI + 5)
        client.pwrite(pattern(100, 2), 3 * MI + 7, nbd.CMD_FLAG_FUA)
        client.trim(1 * MI, 8 * MI)
        client.zero(3000, 10 * MI + 1)
        client.flush()
        assert log_objects()
        server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(64 * KI, 1 * MI + 5) == pattern(64 * KI, 1)
        assert client.pread(100, 3 * MI + 7) == pattern(100, 2)
    assert "replayed" in server.log_text()
    assert server.terminate() == 0
    assert log_objects() == [], "a clean stop leaves nothing"


def test_a_clean_stop_needs_no_log_afterwards(make_volume, make_server, wal_url, log_objects):
    """The first README's advice: the log can be removed after a clean stop, and the volume opens without it."""
    volume = make_volume()
    server = make_server(volume, backend_wal_uri=wal_url).start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
    assert server.terminate() == 0
    assert log_objects() == []
    assert "no log" in volume.cli("wal", "info", volume.url).stdout
    plain = make_server(volume).start()
    with plain.connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)


def test_bulk_data_is_not_written_twice(make_volume, make_server, wal_url):
    server = make_server(make_volume(), backend_wal_url=wal_url, checkpoint_interval="1h").start()
    with server.connect() as client:
        for at in range(0, 32 * MI, 4 * MI):
            client.pwrite(pattern(4 * MI, at), at)
        client.flush()
        client.pwrite(pattern(4 * KI, 7), 0)
        client.flush()
        server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(4 * KI, 0) == pattern(4 * KI, 7)
        assert client.pread(4 * MI, 28 * MI) == pattern(4 * MI, 28 * MI)
    replayed = [line for line in server.log_text().splitlines() if "replayed" in line]
    assert len(replayed) == 1 and " 4096 bytes" in replayed[0], replayed


def test_a_log_with_records_is_never_ignored(make_volume, make_server, wal_url):
    server = killed_with_flushed_writes(make_volume, make_server, backend_wal_url=wal_url)
    volume = server.volume
    text = refused(make_server(volume))
    assert wal_url in text and "backend_wal_url" in text and "discard_wal=yes" in text
    text = refused(make_server(volume, backend_wal_url=wal_url.replace("/log", "/other-log")))
    assert wal_url in text and "discard_wal=yes" in text
    resized = volume.cli("resize", volume.url, "--size", "65M")
    assert resized.returncode != 0 and "wal replay" in resized.stderr

    reader = make_server(volume, nbdkit_options=["-r"]).start()
    with reader.connect() as client:
        assert client.pread(4 * KI, 5 * KI) == bytes(4 * KI), "a read-only opening replays nothing"
    assert wal_url in reader.log_text()
    reader.terminate()

    server.start()
    with server.connect() as client:
        assert client.pread(10 * KI, 5 * KI) == pattern(10 * KI, 1)


def test_a_log_given_up(make_volume, make_server, wal_url):
    server = killed_with_flushed_writes(make_volume, make_server, backend_wal_url=wal_url)
    without = make_server(server.volume, discard_wal="yes").start()
    with without.connect() as client:
        assert client.pread(10 * KI, 5 * KI) == bytes(10 * KI)
        client.pwrite(pattern(10 * KI, 2), 5 * KI)
        client.flush()
    assert "given up" in without.log_text()
    assert without.terminate() == 0
    # Its records are still there, and must never come back over what was written since.
    server.start()
    with server.connect() as client:
        assert client.pread(10 * KI, 5 * KI) == pattern(10 * KI, 2)
    assert server.terminate() == 0


def test_a_log_that_vanished(make_volume, make_server, store, wal_url, tmp_path):
    server = killed_with_flushed_writes(make_volume, make_server, backend_wal_url=wal_url)
    if wal_url.startswith("file:"):
        shutil.rmtree(tmp_path / "logs" / "journal")
    else:
        for key in store.objects():
            if "/log/" in key:
                store.minio.client().delete_object(Bucket="hypernbd-e2e", Key=key)
    text = refused(server)
    assert "discard_wal=yes" in text
    resigned = make_server(server.volume, backend_wal_url=wal_url, discard_wal="yes").start()
    with resigned.connect() as client:
        assert client.pread(10 * KI, 5 * KI) == bytes(10 * KI)
        client.pwrite(b"new", 0, nbd.CMD_FLAG_FUA)
        resigned.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(3, 0) == b"new"


def test_the_log_of_another_volume(make_volume, make_server, wal_url):
    first = killed_with_flushed_writes(make_volume, make_server, backend_wal_url=wal_url)
    second = make_server(make_volume(), backend_wal_url=wal_url)
    assert "belongs to volume" in refused(second)
    first.start()
    with first.connect() as client:
        assert client.pread(10 * KI, 5 * KI) == pattern(10 * KI, 1)


def test_the_commands(make_volume, make_server, wal_url, log_objects):
    server = killed_with_flushed_writes(make_volume, make_server, backend_wal_url=wal_url)
    volume = server.volume
    shown = volume.cli("wal", "info", volume.url)
    assert shown.returncode == 0 and wal_url in shown.stdout, shown.stderr
    assert json.loads(volume.cli("wal", "info", volume.url, "--json").stdout)["log"]["url"] == wal_url
    assert json.loads(volume.cli("info", volume.url, "--json").stdout)["wal_url"] == wal_url

    replayed = volume.cli("wal", "replay", volume.url, "--wal-url", wal_url)
    assert replayed.returncode == 0, replayed.stderr
    assert log_objects() == []
    assert "no log" in volume.cli("wal", "info", volume.url).stdout
    plain = make_server(volume).start()
    with plain.connect() as client:
        assert client.pread(10 * KI, 5 * KI) == pattern(10 * KI, 1)
    plain.terminate()

    server.start()
    with server.connect() as client:
        client.pwrite(pattern(10 * KI, 3), 5 * KI)
        client.flush()
        server.kill()
    asked = volume.cli("wal", "discard", volume.url)
    assert asked.returncode != 0 and "--yes" in asked.stderr
    done = volume.cli("wal", "discard", volume.url, "--yes")
    assert done.returncode == 0, done.stderr
    assert log_objects() == []
    plain.start()
    with plain.connect() as client:
        assert client.pread(10 * KI, 5 * KI) == pattern(10 * KI, 1)


def test_delete_takes_the_log_with_it(make_volume, make_server, wal_url, log_objects):
    server = killed_with_flushed_writes(make_volume, make_server, backend_wal_url=wal_url)
    deleted = server.volume.cli("delete", server.volume.url, "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert log_objects() == []
    assert server.volume.store.objects_of_volumes() == set()


def test_what_a_reply_means_is_said_everywhere(make_volume, make_server, wal_url):
    server = make_server(make_volume(), backend_wal_url=wal_url, env={"RUST_LOG": "info"}).start()
    dumped = run(server.nbdkit, "--dump-plugin", str(PLUGIN), env=server.environment()).stdout
    name = "hypernbd_durability_file_log" if wal_url.startswith("file:") else "hypernbd_durability_s3_log"
    sentence = next(line.split("=", 1)[1] for line in dumped.splitlines() if line.startswith(name))
    assert sentence in server.log_text()
    with server.connect() as client:
        client.pwrite(b"x", 0)
        client.flush()
        info = server.volume.cli("info", server.volume.url, "--json")
        assert json.loads(info.stdout)["durability"] == sentence


@pytest.mark.file_only
def test_two_servers_and_one_journal(make_volume, make_server, tmp_path):
    url = f"file://{tmp_path}/journal/"
    volume = make_volume()
    first = make_server(volume, backend_wal_url=url).start()
    with first.connect() as client:
        client.pwrite(b"first", 0)
        client.flush()
        assert "held by another server" in refused(make_server(volume, backend_wal_url=url))
        client.pwrite(b"still", 0)
        client.flush()
        assert client.pread(5, 0) == b"still"
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700
    for file in (tmp_path / "journal").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the server lives, and removes what it needs no more
            assert file.stat().st_mode & 0o777 == 0o600, file


@pytest.mark.s3_only
def test_a_second_server_shuts_the_first_out_of_the_log(make_volume, make_server, store):
    """The first one was only paused: what it acknowledges afterwards would be lost."""
    volume = make_volume()
    parameters = {"backend_wal_url": store.url("log"), "checkpoint_interval": "1h"}
    first = make_server(volume, **parameters).start()
    with first.connect() as paused:
        paused.pwrite(pattern(4 * KI, 1), 0)
        paused.flush()
        second = make_server(volume, takeover="yes", **parameters).start()
        with second.connect() as client:
            assert client.pread(4 * KI, 0) == pattern(4 * KI, 1)
            # It may have seen by itself that it was shut out.
            with pytest.raises(nbd.Error):
                paused.pwrite(pattern(4 * KI, 2), 0)
                paused.flush()
            client.pwrite(pattern(4 * KI, 3), 0)
            client.flush()
            second.kill()
    first.kill()
    second.start()
    with second.connect() as client:
        assert client.pread(4 * KI, 0) == pattern(4 * KI, 3)


@pytest.mark.s3_only
def test_old_records_are_removed(make_volume, make_server, store):
    server = make_server(make_volume(), backend_wal_url=store.url("log"), checkpoint_interval="100ms").start()
    with server.connect() as client:
        for number in range(100):
            client.pwrite(pattern(4 * KI, number), 4 * KI * number)
            client.flush()
        wait_for(lambda: sum("/log/" in key for key in store.objects()) < 20, "old records to be removed")


def test_a_takeover_leaves_a_server_with_its_journal_alone(make_volume, make_server, tmp_path):
    """The journal cannot be taken from it, so its lease is not: else it would be shut out and nobody could serve."""
    volume = make_volume()
    parameters = {"backend_wal_url": f"file://{tmp_path}/journal/", "checkpoint_interval": "1h"}
    first = make_server(volume, **parameters).start()
    with first.connect() as client:
        client.pwrite(pattern(4 * KI, 1), 0)
        client.flush()
        assert "another server has it open" in refused(make_server(volume, takeover="yes", **parameters))
        replayed = volume.cli("wal", "replay", volume.url, "--takeover")
        assert replayed.returncode != 0 and "another server has it open" in replayed.stderr, replayed.stderr
        client.pwrite(pattern(4 * KI, 2), 0)
        client.flush()
        client.pwrite(pattern(4 * KI, 3), 1 * MI)
    assert first.terminate() == 0, "it can still publish"
    plain = make_server(volume).start()
    with plain.connect() as client:
        assert client.pread(4 * KI, 0) == pattern(4 * KI, 2)
        assert client.pread(4 * KI, 1 * MI) == pattern(4 * KI, 3)


def held_with_a_flushed_write(make_volume, make_server, wal_url):
    """A running server whose log alone has a write, and a client of it."""
    server = make_server(make_volume(), backend_wal_url=wal_url, checkpoint_interval="1h").start()
    client = server.handle()
    client.pwrite(pattern(4 * KI, 1), 0)
    client.flush()
    return server, client


@pytest.mark.s3_only
def test_the_commands_respect_the_server_unless_told_otherwise(make_volume, make_server, store):
    url = store.url("log")
    server, client = held_with_a_flushed_write(make_volume, make_server, url)
    volume = server.volume
    for verb in (["replay"], ["discard", "--yes"]):
        done = volume.cli("wal", *verb, volume.url)
        assert done.returncode != 0, verb
        assert f"pid {server.process.pid}" in done.stderr and "--takeover" in done.stderr, done.stderr
    client.pwrite(pattern(4 * KI, 2), 4 * KI)
    client.flush()

    replayed = volume.cli("wal", "replay", volume.url, "--takeover")
    assert replayed.returncode == 0, replayed.stderr
    # It may have seen by itself that it was shut out.
    with pytest.raises(nbd.Error):
        client.pwrite(pattern(4 * KI, 9), 0)
        client.flush()
    server.kill()
    server.start()
    with server.connect() as client:
        assert client.pread(8 * KI, 0) == pattern(4 * KI, 1) + pattern(4 * KI, 2)


@pytest.mark.s3_only
def test_a_log_is_discarded_under_its_server(make_volume, make_server, store):
    """What the server had flushed is given up, as was asked for; what it would flush next is not acknowledged."""
    server, client = held_with_a_flushed_write(make_volume, make_server, store.url("log"))
    volume = server.volume
    done = volume.cli("wal", "discard", volume.url, "--yes", "--takeover")
    assert done.returncode == 0, done.stderr
    # It may have seen by itself that it was shut out.
    with pytest.raises(nbd.Error):
        client.pwrite(pattern(4 * KI, 9), 0)
        client.flush()
    server.kill()
    plain = make_server(volume).start()
    with plain.connect() as client:
        assert client.pread(4 * KI, 0) == bytes(4 * KI)


@pytest.mark.s3_only
@pytest.mark.parametrize("second_ends_cleanly", [False, True])
def test_a_paused_server_acknowledges_nothing_after_its_successor(
    make_volume, make_server, store, second_ends_cleanly
):
    """It is stopped with SIGSTOP, taken over from, and wakes up when the other one has ended, too."""
    volume = make_volume()
    parameters = {"backend_wal_url": store.url("log"), "checkpoint_interval": "1h"}
    first = make_server(volume, **parameters).start()
    paused = first.handle()
    paused.pwrite(pattern(4 * KI, 1), 0)
    paused.flush()
    first.process.send_signal(signal.SIGSTOP)
    second = make_server(volume, takeover="yes", **parameters).start()
    with second.connect() as client:
        assert client.pread(4 * KI, 0) == pattern(4 * KI, 1)
        client.pwrite(pattern(4 * KI, 2), 4 * KI)
        client.flush()
    if second_ends_cleanly:
        assert second.terminate() == 0
    else:
        second.kill()
    first.process.send_signal(signal.SIGCONT)
    with pytest.raises(nbd.Error):
        paused.pwrite(pattern(4 * KI, 3), 0)
        paused.flush()
    first.kill()
    second.start()
    with second.connect() as client:
        assert client.pread(8 * KI, 0) == pattern(4 * KI, 1) + pattern(4 * KI, 2)


@pytest.mark.file_only
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_under_the_journal_loses_nothing(make_volume, make_server, tmp_path):
    """The disk takes one segment and not two, and is full of something else in the end: flushes go by checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    check("mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", disk)
    try:
        volume = make_volume()
        server = make_server(volume, backend_wal_url=f"file://{disk}/journal/", checkpoint_interval="1h").start()
        with server.connect() as client:
            for number in range(12):
                client.pwrite(pattern(3 * MI, number), 3 * MI * number)
                client.flush()
        assert "accepts no records" in server.log_text(), "the disk was not full: the test has tested nothing"
        server.kill()
        server.start()
        with server.connect() as client:
            for number in range(12):
                assert client.pread(3 * MI, 3 * MI * number) == pattern(3 * MI, number), number
        assert server.terminate() == 0
    finally:
        server.kill()
        check("umount", "--lazy", disk)
