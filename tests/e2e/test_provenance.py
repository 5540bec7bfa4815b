"""A volume believes only what is its own: logs and caches of another volume, or of another history, are not used."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.faulty import Fault, FaultyProxy
from support.lives import (
    IN_LOG,
    NOTE,
    SIZE,
    assert_flushed_writes_survive,
    assert_is_empty,
    assert_reads,
    begin,
    flush_to_log_and_kill,
    last_checkpoint,
    publish,
    refused,
    with_the_log_alone,
)
from support.model import pattern
from support.others import copy_of, is_container, objects_of, stored_label
from support.process import wait_for
from support.server import KI, MI

IS_THERE, IS_FLUSHED = pattern(MI, 97), pattern(NOTE, 98)
"""What `used` leaves: in the container (and the caches), and in the log alone."""


@pytest.fixture(params=["s3-log", "journal"])
def kept(request, store, tmp_path) -> dict[str, str]:
    """What lies outside a volume and outlives it: a log, and both caches on a disk."""
    if request.param == "s3-log" and store.kind != "s3":
        pytest.skip("a log on S3 needs S3")
    return {
        "backend_wal_url": store.url("log") if request.param == "s3-log" else f"file://{tmp_path}/journal/",
        "cache_dir": str(tmp_path / "pages"),
        "node_cache_config": f"LocalDisk,{tmp_path}/nodes,64M,ReuseCache",
        "checkpoint_interval": "1h",
        # A copy's first server watches the lease that came with it for so long.
        "lease_duration": "2s",
    }


@pytest.fixture
def log_content(kept, store):
    """Every byte of the log."""

    def look() -> dict[str, bytes]:
        url = kept["backend_wal_url"]
        if url.startswith("file:"):
            files = [path for path in Path(url.removeprefix("file://")).iterdir() if path.is_file()]
            return {path.name: path.read_bytes() for path in files}
        client = store.minio.client()
        bucket, prefix = url.removeprefix("s3://").split("/", 1)
        listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return {o["Key"]: client.get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for o in listed}

    return look


@pytest.fixture
def used(make_volume, make_server, kept):
    """A server that was killed: with checkpoints, caches of them, and a flushed write in the log alone."""

    def leave_one():
        server = make_server(make_volume(SIZE), **kept)
        publish(server, 97)
        before = last_checkpoint(server.volume)
        flush_to_log_and_kill(server, 98)
        return server, server.volume, before

    return with_the_log_alone(leave_one)


def create(volume):
    """`hypernbd create`, whatever its status."""
    return volume.cli("create", volume.url, "--size", str(SIZE), "--block-size", str(64 * KI))


@dataclass
class AfterTheInode(Fault):
    """A fault of requests that come after the inode's deletion: a probe removes its own objects before it."""

    is_gone: bool = False

    def applies(self, line: str) -> bool:
        self.is_gone |= bool(re.search(r"^DELETE \S+/inode[? ]", line))
        return self.is_gone and super().applies(line)


@dataclass
class AfterTheMark(Fault):
    """A fault of requests that come after a deletion has marked the label."""

    is_marked: bool = False

    def applies(self, line: str) -> bool:
        was_marked = self.is_marked
        self.is_marked |= bool(re.search(r"^PUT \S+/volume\.json[? ]", line))
        return was_marked and super().applies(line)


def begin_deletion(volume, proxy: FaultyProxy, log: Path):
    """`hypernbd delete` through a proxy."""
    return begin(volume, proxy, log, "delete", volume.url, "--yes")


def interrupt_deletion(volume, how: str, log: Path) -> None:
    """A deletion that gets no further than the inode, which goes first."""
    if volume.store.kind == "file":
        # What a kill leaves then: nothing stands between the program and its directory.
        objects_of(volume).remove(["inode"])
        return
    proxy = FaultyProxy(volume.store.minio.endpoint)
    kind = {"killed": "hang", "refused": "expired"}[how]
    fault = proxy.fail(AfterTheInode(kind, r"^POST \S+\?delete"))
    process = begin_deletion(volume, proxy, log)
    wait_for(lambda: fault.hits or process.poll() is not None, "the deletion to get stuck")
    if how == "killed":
        process.kill()
    assert process.wait() != 0 and fault.hits, log.read_text()
    proxy.close()
    assert "inode" not in objects_of(volume).names()


@pytest.mark.parametrize("how", ["killed", "refused"])
def test_a_volume_made_after_an_interrupted_deletion_has_nothing_of_the_old_one(used, how, tmp_path):
    volume, old = used.volume, stored_label(used.volume)["volume_id"]
    if volume.store.kind == "file" and how == "refused":
        pytest.skip("a directory refuses root nothing")
    interrupt_deletion(volume, how, tmp_path / "delete.log")
    assert objects_of(volume).names(), "nothing is left: the test has tested nothing"

    again = create(volume)
    assert again.returncode != 0 and "hypernbd delete" in again.stderr, again.stderr
    assert "no volume" in refused(used)
    ended = volume.cli("delete", volume.url, "--yes")
    assert ended.returncode == 0, ended.stderr
    again = create(volume)
    assert again.returncode == 0, again.stderr
    assert stored_label(volume)["volume_id"] != old
    assert_is_empty(used)
    assert_flushed_writes_survive(used)


def test_a_volume_made_after_all_was_removed_by_hand_leaves_the_old_log_alone(
    used, make_server, kept, log_content, tmp_path
):
    volume = used.volume
    objects_of(volume).remove(objects_of(volume).names())
    again = create(volume)
    assert again.returncode == 0, again.stderr
    before = log_content()
    assert "belongs to volume" in refused(used)
    assert log_content() == before
    own = make_server(volume, **kept | {"backend_wal_url": f"file://{tmp_path}/own-journal/"})
    assert_is_empty(own)
    assert_flushed_writes_survive(own)


def test_a_container_removed_by_other_tools_is_not_made_anew_upon_what_is_left(used):
    volume, old = used.volume, stored_label(used.volume)["volume_id"]
    left = objects_of(volume)
    left.remove(list(filter(is_container, left.names())))
    before = left.keep()
    again = create(volume)
    assert again.returncode != 0 and "hypernbd delete" in again.stderr, again.stderr
    assert left.keep() == before
    assert volume.cli("delete", volume.url, "--yes").returncode == 0
    assert create(volume).returncode == 0
    assert stored_label(volume)["volume_id"] != old
    assert_is_empty(used)
    assert_flushed_writes_survive(used)


def assert_log_is_refused_until_given_up(server, make_server, kept, log_content, expected) -> None:
    """Refused with the choices, and nothing is changed or mixed; given up, the volume is the one that was put there."""
    before = log_content()
    text = refused(server)
    assert "restored from a backup" in text and "discard_wal=yes" in text, text
    assert {name: log_content().get(name) for name in before} == before
    assert_reads(make_server(server.volume, **kept, discard_wal="yes"), expected)
    assert_reads(server, expected)
    assert_flushed_writes_survive(server)


def test_a_container_made_anew_by_other_tools_gets_nothing_of_the_one_before(
    used, make_volume, make_server, kept, log_content
):
    stored = objects_of(used.volume)
    stored.remove(list(filter(is_container, stored.names())))
    stored.put("inode", objects_of(make_volume(SIZE)).get("inode"))
    expected = {0: bytes(MI), IN_LOG: bytes(NOTE)}
    assert_log_is_refused_until_given_up(used, make_server, kept, log_content, expected)
    assert_is_not_mixed_with_caches(used)


def assert_is_not_mixed_with_caches(server) -> None:
    """As far as the history that was left went, other data is written without caches, and read with them."""
    plain = {key: value for key, value in server.parameters.items() if "cache" not in key}
    with_caches, server.parameters = server.parameters, plain
    publish(server, 60)
    server.parameters = with_caches
    assert_reads(server, {0: pattern(MI, 60)})


@pytest.mark.parametrize("part", ["all", "container"])
def test_a_log_and_caches_of_a_later_history_are_not_used_over_a_restored_backup(
    make_volume, make_server, kept, log_content, part
):
    server = make_server(make_volume(SIZE), **kept)
    stored = objects_of(server.volume)
    publish(server, 1)
    backup = stored.keep()
    publish(server, 97)
    publish(server, 2, 2 * MI)
    flush_to_log_and_kill(server, 98)
    stored.put_back(backup, is_container if part == "container" else lambda _: True)
    expected = {0: pattern(MI, 1), 2 * MI: bytes(MI), IN_LOG: bytes(NOTE)}
    assert_log_is_refused_until_given_up(server, make_server, kept, log_content, expected)
    assert_is_not_mixed_with_caches(server)


@pytest.mark.s3_only
@pytest.mark.parametrize("left", ["whole", "without the inode"])
def test_a_deletion_held_up_removes_nothing_of_a_volume_made_meanwhile(make_volume, make_server, tmp_path, left):
    """Two deletions of one volume; when the second has ended and there is a new volume, the first goes on."""
    volume = make_volume(SIZE)
    publish(make_server(volume), 97)
    if left == "without the inode":
        interrupt_deletion(volume, "killed", tmp_path / "interrupted")
    proxy = FaultyProxy(volume.store.minio.endpoint)
    fault = proxy.fail(AfterTheMark("hang", r"^GET \S+/volume\.json|^HEAD \S+/inode"))
    process = begin_deletion(volume, proxy, tmp_path / "held-up")
    wait_for(lambda: fault.hits or process.poll() is not None, "the deletion to hang")
    assert process.poll() is None, (tmp_path / "held-up").read_text()
    other = volume.cli("delete", volume.url, "--yes", *(["--takeover"] if left == "whole" else []))
    assert other.returncode == 0, other.stderr
    assert create(volume).returncode == 0
    server = make_server(volume)
    publish(server, 11)
    label = stored_label(volume)
    proxy.heal()
    assert process.wait() != 0
    assert "another command is at work there" in (tmp_path / "held-up").read_text() or left == "whole"
    proxy.close()
    assert stored_label(volume) == label
    assert_reads(server, {0: pattern(MI, 11), 2 * MI: bytes(MI)})
    assert_flushed_writes_survive(server)


def test_a_restored_backup_alone_goes_on_as_it_was(make_volume, make_server, kept):
    """The log was closed cleanly, so nothing of it is missed; the caches are those of the later history."""
    server = make_server(make_volume(SIZE), **kept)
    stored = objects_of(server.volume)
    publish(server, 1)
    backup = stored.keep()
    publish(server, 97)
    publish(server, 2, 2 * MI)
    stored.put_back(backup)
    assert_reads(server, {0: pattern(MI, 1), 2 * MI: bytes(MI)})
    assert_is_not_mixed_with_caches(server)
    assert_flushed_writes_survive(server)


def test_a_copy_leaves_the_log_to_the_original(used, make_server, log_content):
    copy, before = copy_of(used.volume, "copy"), log_content()
    server = make_server(copy, **used.parameters)
    text = refused(server)
    assert "of which this one is a copy" in text and "hypernbd wal replay" in text, text
    replayed = copy.cli("wal", "replay", copy.url)
    assert replayed.returncode == 0, replayed.stderr
    plain = make_server(copy)
    assert_reads(plain, {0: IS_THERE, IN_LOG: IS_FLUSHED})
    label, original = stored_label(copy), stored_label(used.volume)["volume_id"]
    assert label["volume_id"] != original and label["parent"] == original
    # The same caches, and another history.
    publish(make_server(copy, cache_dir=used.parameters["cache_dir"]), 7)
    deleted = copy.cli("delete", copy.url, "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert log_content() == before
    assert_reads(used, {0: IS_THERE, IN_LOG: IS_FLUSHED})


def test_a_copy_that_nobody_opened_is_deleted_without_the_originals_log(used, log_content):
    copy, before = copy_of(used.volume, "copy"), log_content()
    deleted = copy.cli("delete", copy.url, "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert not objects_of(copy).names() if copy.store.kind == "s3" else not Path(copy.url[7:]).exists()
    assert log_content() == before
    assert_reads(used, {0: IS_THERE, IN_LOG: IS_FLUSHED})


def test_a_moved_volume_keeps_its_log_when_that_is_said(used, make_server):
    volume, own = used.volume, stored_label(used.volume)["volume_id"]
    moved = copy_of(volume, "moved")
    objects_of(volume).remove(objects_of(volume).names())
    server = make_server(moved, **used.parameters)
    assert "adopt=yes" in refused(server)
    assert_reads(make_server(moved, adopt="yes", **used.parameters), {0: IS_THERE, IN_LOG: IS_FLUSHED})
    assert stored_label(moved)["volume_id"] == own
    assert_flushed_writes_survive(server)


@pytest.mark.parametrize("volume_id", ["../../mine", "{tmp}/mine", ""])
def test_an_id_that_is_none_names_no_directory(make_volume, make_server, tmp_path, volume_id):
    """Whoever can write one object of a bucket chooses the label's words, and no directory of the server's."""
    volume = make_volume(SIZE)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    label = stored_label(volume) | {"volume_id": volume_id.format(tmp=tmp_path)}
    objects_of(volume).put(".meta/volume.json", json.dumps(label).encode())
    caches = {
        "cache_dir": str(tmp_path / "caches/pages"),
        "node_cache_config": f"LocalDisk,{tmp_path}/caches/nodes,64M,ReuseCache",
    }
    text = refused(make_server(volume, **caches))
    assert "label" in text, text
    assert [path.name for path in mine.iterdir()] == ["file"] and (mine / "file").read_text() == "mine"
    assert not [path for path in (tmp_path / "caches").rglob("*") if path.is_file() and path.stat().st_size > 4096]
