"""The verbs that change a volume, killed, refused or not answered in time at their requests, one after another.

Every second request, each in one of these ways; all of them in all ways with HYPERNBD_EVERY_REQUEST=1.

What is left is nothing, or what the same verb, given again, finishes; never something that looks whole and is not.
"""

import json
import re

import nbd
import pytest

from support.interrupted import HOW, again, interrupted, requests, some_requests
from support.lives import SIZE, assert_reads, publish
from support.model import pattern
from support.others import objects_of
from support.server import KI, MI, Volume, create_volume

pytestmark = pytest.mark.s3_only

LARGER = 2 * SIZE


@pytest.mark.parametrize("how", HOW)
def test_create(store, proxy, make_server, tmp_path, how):
    for number in requests(how):
        volume = Volume(store.url(f"created-{number}"), store, SIZE, 64 * KI)
        words = ["create", volume.url, "--size", str(SIZE), "--block-size", "64K"]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        looked = volume.cli("info", volume.url)
        if looked.returncode == 0:
            # The interruption came after the last step: it is whole.
            assert f"({SIZE} bytes)" in looked.stdout, at
        else:
            assert "no volume" in looked.stderr, (at, looked.stderr)
            once_more = volume.cli(*words)
            if once_more.returncode:
                # The way that the refusal names.
                assert f"hypernbd delete {volume.url}" in once_more.stderr, (at, once_more.stderr)
                again(volume, "delete", volume.url, "--yes")
                again(volume, *words)
        publish(make_server(volume), 5)
        again(volume, "delete", volume.url, "--yes")
        assert not [key for key in store.objects() if f"created-{number}" in key], at
    assert number > 5, "the verb was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_delete(store, proxy, make_server, tmp_path, how):
    for number in requests(how):
        volume = create_volume(store, SIZE, 64 * KI, f"deleted-{number}")
        server = make_server(volume, backend_wal_url=store.url(f"log-{number}")).start()
        with server.connect() as client:
            client.pwrite(pattern(MI, 5), 0)
            client.flush()
        assert server.terminate() == 0
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", "delete", volume.url, "--yes")
        if at is None:
            break
        if volume.cli("info", volume.url).returncode == 0:
            # Nothing of it is gone.
            assert_reads(server, {0: pattern(MI, 5)})
        if [key for key in store.objects() if f"/deleted-{number}" in key]:
            again(volume, "delete", volume.url, "--yes")
        left = [key for key in store.objects() if f"/deleted-{number}" in key or f"/log-{number}/" in key]
        assert not left, (at, left)
    assert number > 10, "the verb was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_resize(store, proxy, make_server, tmp_path, how):
    volume = create_volume(store, SIZE, 64 * KI, "resized")
    server = make_server(volume)
    publish(server, 5)
    size = SIZE
    for number in requests(how):
        other = SIZE + LARGER - size
        words = ["resize", volume.url, "--size", str(other), "--allow-shrink"]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        told = again(volume, "info", volume.url)
        assert f"({size} bytes)" in told or f"({other} bytes)" in told, (at, told)
        assert_reads(server, {0: pattern(MI, 5)})
        again(volume, *words)
        assert f"({other} bytes)" in again(volume, "info", volume.url), at
        size = other
    assert number > 10, "the verb was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_rollback(store, proxy, make_server, tmp_path, how):
    """It reads as before or as it is to, and the snapshots of both read as they did."""
    volume = create_volume(store, SIZE, 64 * KI, "rolled-back")
    server = make_server(volume)
    for tag in (5, 6):
        publish(server, tag)
        again(volume, "snapshot", "create", volume.url, f"with-{tag}")
    now = 6
    for number in requests(how):
        other = 11 - now
        words = ["rollback", volume.url, f"@with-{other}", "--yes"]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        server.start()
        with server.connect() as client:
            found = client.pread(MI, 0)
            assert found in (pattern(MI, now), pattern(MI, other)), at
        for tag in (5, 6):
            past = nbd.NBD()
            past.set_export_name(f"@with-{tag}")
            past.connect_unix(str(server.socket))
            assert past.pread(MI, 0) == pattern(MI, tag), at
            past.shutdown()
        assert server.terminate() == 0, server.log_text()
        again(volume, *words)
        assert_reads(server, {0: pattern(MI, other)})
        now = other
    assert number > 10, "the verb was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_snapshot_create(store, proxy, make_server, tmp_path, how):
    """The name is there, or not; given again, the verb says which."""
    volume = create_volume(store, SIZE, 64 * KI, "named")
    publish(make_server(volume), 5)
    for number in requests(how, few=True):
        words = ["snapshot", "create", volume.url, f"name-{number}"]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        is_there = f"name-{number}" in again(volume, "snapshot", "list", volume.url)
        once_more = volume.cli(*words)
        assert (once_more.returncode != 0) == is_there, (at, once_more.stderr)
        assert f"name-{number}" in again(volume, "snapshot", "list", volume.url), at
    assert number > 2, "the verb was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_snapshot_delete(store, proxy, make_server, tmp_path, how):
    """The name is gone, or there and reads as it did."""
    volume = create_volume(store, SIZE, 64 * KI, "named")
    server = make_server(volume)
    publish(server, 5)
    for number in requests(how, few=True):
        again(volume, "snapshot", "create", volume.url, f"name-{number}")
        words = ["snapshot", "delete", volume.url, f"name-{number}"]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        is_there = f"name-{number}" in again(volume, "snapshot", "list", volume.url)
        if is_there:
            again(volume, *words)
        assert f"name-{number}" not in again(volume, "snapshot", "list", volume.url), at
    assert number > 1, "the verb was not interrupted where it matters"
    assert_reads(server, {0: pattern(MI, 5)})


@pytest.mark.parametrize("how", HOW)
def test_prune(store, proxy, make_server, tmp_path, how):
    """What is listed reads as it did, and the same verb finishes it."""
    volume = create_volume(store, SIZE, 64 * KI, "pruned")
    server = make_server(volume, checkpoint_interval="1h")
    again(volume, "retention", "set", volume.url, "--keep-last", "1")
    written: dict[int, bytes] = {}
    for number in requests(how):
        server.start()
        with server.connect() as client:
            # There is something to remove each time.
            for tag in range(2 if written else 20):
                client.pwrite(pattern(64 * KI, number + tag), 0)
                client.flush()
                # Each flush is a checkpoint, and the next number.
                written[len(written) + 1] = pattern(64 * KI, number + tag)
        assert server.terminate() == 0, server.log_text()
        words = ["prune", volume.url]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        listed = [one["cno"] for one in json.loads(again(volume, "checkpoints", volume.url, "--json"))]
        server.start()
        for one in (listed[0], listed[len(listed) // 2], listed[-1]):
            past = nbd.NBD()
            past.set_export_name(f"@{one}")
            past.connect_unix(str(server.socket))
            assert past.pread(64 * KI, 0) == written[one], (at, one)
            past.shutdown()
        assert server.terminate() == 0, server.log_text()
        again(volume, *words)
        assert len(json.loads(again(volume, "checkpoints", volume.url, "--json"))) <= 17, at
    assert number > 20, "the verb was not interrupted where it matters"


def is_whole(volume, make_server, expected: bytes) -> bool:
    """Whether there is a volume, which then reads as it should."""
    if volume.cli("info", volume.url).returncode:
        return False
    assert_reads(make_server(volume), {0: expected})
    return True


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["sharing", "full"])
def test_clone(store, proxy, make_server, tmp_path, how, kind):
    """There is the clone, or nothing that looks like a volume; and its parent can be deleted once it is gone."""
    for number in requests(how):
        volume = create_volume(store, SIZE, 64 * KI, f"parent-{number}")
        publish(make_server(volume), 5)
        child = Volume(store.url(f"clone-{number}"), store, SIZE, 64 * KI)
        words = ["clone", *(["--full"] if kind == "full" else []), volume.url, child.url]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        is_made = is_whole(child, make_server, pattern(MI, 5))
        if is_made and kind == "sharing":
            assert "clones share" in volume.cli("delete", volume.url, "--yes").stderr, at
        if not is_made and number % 2:
            # Nobody who is still at it can make it once the parent has gone: its place is taken.
            again(volume, "delete", volume.url, "--yes")
            assert not is_whole(child, make_server, b""), at
        if [key for key in store.objects() if re.search(rf"/clone-{number}[/.]", key)]:
            again(child, "delete", child.url, "--yes")
        if volume.cli("info", volume.url).returncode == 0:
            again(volume, "delete", volume.url, "--yes")
        # What was put there in its place.
        if [key for key in store.objects() if re.search(rf"/clone-{number}[/.]", key)]:
            again(child, "delete", child.url, "--yes")
        left = [key for key in store.objects() if re.search(rf"/(clone|parent)-{number}[/.]", key)]
        assert not left, (at, left)
    assert number > 8, "the verb was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_flatten(store, proxy, make_server, tmp_path, how):
    """The clone reads as before, and the same verb ends it; the parent goes when it is told, and not before."""
    for number in requests(how):
        volume = create_volume(store, SIZE, 64 * KI, f"parent-{number}")
        publish(make_server(volume), 5)
        child = Volume(store.url(f"clone-{number}"), store, SIZE, 64 * KI)
        again(volume, "clone", volume.url, child.url)
        publish(make_server(child), 6, offset=2 * MI)
        expected = {0: pattern(MI, 5), 2 * MI: pattern(MI, 6)}
        words = ["clone", "--flatten", child.url]
        at = interrupted(child, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        assert_reads(make_server(child), expected)
        if volume.cli("delete", volume.url, "--yes").returncode:
            again(child, *words)
            again(volume, "delete", volume.url, "--yes")
        assert_reads(make_server(child), expected)
        again(child, "delete", child.url, "--yes")
        left = [key for key in store.objects() if re.search(rf"/(clone|parent)-{number}[/.]", key)]
        assert not left, (at, left)
    assert number > 10, "the verb was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_compact(store, proxy, make_server, tmp_path, how):
    """Everything reads as it did, and the same verb finishes it."""
    volume = create_volume(store, SIZE, 64 * KI, "compacted")
    server = make_server(volume, checkpoint_interval="1h")
    again(volume, "retention", "set", volume.url, "--keep-last", "1")
    publish(server, 5)
    again(volume, "snapshot", "create", volume.url, "first")
    kept = pattern(MI, 5)
    for number in some_requests():
        server.start()
        with server.connect() as client:
            # More than is always kept, each of which leaves the one before mostly dead.
            for tag in range(18 if number == 1 else 2):
                client.pwrite(pattern(512 * KI, number + tag), tag % 8 * 192 * KI)
                client.flush()
            now = client.pread(2 * MI, 0)
        assert server.terminate() == 0, server.log_text()
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", "compact", volume.url)
        if at is None:
            break
        assert_reads(server, {0: now})
        again(volume, "compact", volume.url)
        assert_reads(server, {0: now})
        server.start()
        past = nbd.NBD()
        past.set_export_name("@first")
        past.connect_unix(str(server.socket))
        assert past.pread(MI, 0) == kept, at
        past.shutdown()
        assert server.terminate() == 0, server.log_text()
        problems = volume.cli("check", volume.url)
        assert problems.returncode == 0, (at, problems.stdout, problems.stderr)
    assert number > 20, "the verb was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_check_write(store, proxy, make_server, tmp_path, how):
    """An object has its own check values or none, and the same verb gives those that have none theirs."""
    volume = create_volume(store, SIZE, 64 * KI, "checked")
    server = make_server(volume, checkpoint_interval="1h")
    for tag in (5, 6, 7):
        publish(server, tag, offset=(tag - 5) * MI)
    objects = objects_of(volume)
    bodies = {name: objects.get(name) for name in objects.names() if re.fullmatch(r"\d{10}\.\d+", name)}
    words = ["check", volume.url, "--data", "--write"]

    def strip() -> None:
        """As other tools leave them, which know of no check values."""
        objects.remove(f".meta/sums/{name}" for name in bodies)
        for name, body in bodies.items():
            objects.put(name, body)

    def values() -> dict[str, bytes]:
        beside = [name for name in objects.names() if name.startswith(".meta/sums/")]
        return {name: objects.get(name) for name in beside}

    strip()
    assert values() == {}
    assert f"{len(bodies)} objects got check values" in again(volume, *words)
    right = values()
    assert len(right) == len(bodies) == 3
    for number in requests(how):
        strip()
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        told, left = (tmp_path / f"log-{number}").read_text(), values()
        assert left.items() <= right.items(), at
        assert left == right or "nothing is wrong" not in told, (at, told)
        again(volume, "check", volume.url, "--data")
        again(volume, *words)
        assert values() == right, at
        assert json.loads(again(volume, "check", volume.url, "--data", "--json"))["unverified_bytes"] == 0, at
    assert number > 20, "the verb was not interrupted where it matters"
    assert_reads(server, {(tag - 5) * MI: pattern(MI, tag) for tag in (5, 6, 7)})


@pytest.mark.parametrize("how", HOW)
def test_import(store, proxy, make_server, tmp_path, how):
    """There is no volume, or one that says that it is half made; the same verb finishes it."""
    image = tmp_path / "image"
    image.write_bytes(pattern(SIZE, 7))
    for number in some_requests():
        volume = Volume(store.url(f"imported-{number}"), store, SIZE, 64 * KI)
        words = ["import", str(image), volume.url]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        looked = volume.cli("info", volume.url, "--json")
        if looked.returncode == 0 and "import" not in json.loads(looked.stdout):
            # It says that it is whole.
            assert_reads(make_server(volume), {0: pattern(SIZE, 7)})
        elif (once_more := volume.cli(*words)).returncode:
            # The way that the refusal names.
            assert f"hypernbd delete {volume.url}" in once_more.stderr or "--overwrite" in once_more.stderr, (at, once_more.stderr)
            again(volume, "delete", volume.url, "--yes")
            again(volume, *words)
        assert_reads(make_server(volume), {0: pattern(SIZE, 7)})
        again(volume, "delete", volume.url, "--yes")
        assert not [key for key in store.objects() if re.search(rf"/imported-{number}[/.]", key)], at
    assert number > 10, "the verb was not interrupted where it matters"


@pytest.mark.parametrize("how", HOW)
def test_retention_set(store, proxy, make_server, tmp_path, how):
    """The rules are the old or the new ones; given again, the verb sets the new ones."""
    volume = create_volume(store, SIZE, 64 * KI, "ruled")
    publish(make_server(volume), 5)
    last = 100
    again(volume, "retention", "set", volume.url, "--keep-last", str(last))
    for number in some_requests():
        words = ["retention", "set", volume.url, "--keep-last", str(100 + number)]
        at = interrupted(volume, proxy, how, number, tmp_path / f"log-{number}", *words)
        if at is None:
            break
        shown = again(volume, "retention", "show", volume.url)
        assert str(last) in shown or str(100 + number) in shown, (at, shown)
        again(volume, *words)
        last = 100 + number
        assert str(last) in again(volume, "retention", "show", volume.url), at
    assert number > 1, "the verb was not interrupted where it matters"
