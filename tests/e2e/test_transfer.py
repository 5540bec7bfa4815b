"""Images moved in and out of volumes: files, devices, pipes; interrupted, killed, and taken up again."""

import contextlib
import hashlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.model import pattern, read_all
from support.process import check, run, wait_for
from support.server import CLI, GI, KI, MI, PROJECT, Volume
from support.stores import FileStore

PIECE = 64 * KI
SIZE = 48 * MI
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="devices and mounts need root")


@pytest.fixture
def volume(store) -> Volume:
    """A volume that does not exist yet."""
    return Volume(store.url("moved"), store)


@pytest.fixture
def image(tmp_path, seed) -> Path:
    """A raw image with holes, data between them, and data that is zeros; its end is no sector's."""
    return sparse_image(tmp_path / "image.raw", SIZE + 1000, random.Random(seed))


def sparse_image(path: Path, size: int, rng: random.Random) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
        for _ in range(12):
            length = rng.randrange(1, 700 * KI)
            file.seek(rng.randrange(size - length))
            file.write(rng.randbytes(length))
        file.seek(rng.randrange(size // 2))
        file.write(bytes(MI))
        file.seek(size - 5)
        file.write(b"tail!")
    return path


def must(volume: Volume, *words: str | Path, **options) -> str:
    done = volume.cli(*words, **options)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def must_fail(volume: Volume, *words: str | Path, status: int = 1, **options) -> str:
    """A command that is refused: the store stays as it is, and stderr says why in one line."""
    before = volume.store.objects()
    done = volume.cli(*words, **options)
    assert done.returncode == status, f"{words}: {done.stdout}{done.stderr}"
    assert "panicked" not in done.stderr
    assert volume.store.objects() == before
    return done.stderr


def said(volume: Volume, *words: str | Path) -> dict:
    return json.loads(must(volume, *words, "--json"))


def info(volume: Volume) -> dict:
    return said(volume, "info", volume.url)


def command(volume: Volume, *words: str | Path) -> list[str]:
    return [str(CLI), *(str(word) for word in words), *volume.store.cli_options]


def begin(volume: Volume, *words: str | Path, **options) -> subprocess.Popen:
    """Starts a verb in the background."""
    environment = {**os.environ, **volume.store.env}
    return subprocess.Popen(
        command(volume, *words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Waits for a verb's end; returns its exit status and what it said on standard error."""
    out, error = process.communicate(timeout=120)
    assert "panicked" not in error
    return process.returncode, error


def checksum(data: bytes) -> str:
    """As docs/transfer.md says."""
    whole = hashlib.sha256()
    for offset in range(0, len(data), PIECE):
        piece = data[offset : offset + PIECE]
        if any(piece):
            whole.update(offset.to_bytes(8, "big"))
            whole.update(hashlib.sha256(piece.ljust(PIECE, b"\0")).digest())
    return f"sha256-64k:{whole.hexdigest()}"


def data_of(data: bytes, unit: int) -> int:
    """The bytes of the units that are not all zeros."""
    units = (data[offset : offset + unit] for offset in range(0, len(data), unit))
    return sum(len(unit) for unit in units if any(unit))


def same(path: Path, expected: bytes) -> None:
    """The file holds these bytes, then nothing but zeros."""
    data = path.read_bytes()
    assert data[: len(expected)] == expected
    assert not any(data[len(expected) :])


@pytest.mark.parametrize("block_bytes", [4 * KI, 64 * KI, 8 * MI])
def test_a_file_in_and_out(volume, image, tmp_path, block_bytes):
    data = image.read_bytes()
    done = volume.cli("import", image, volume.url, "--block-size", str(block_bytes), "--json")
    assert done.returncode == 0, done.stderr
    assert "no multiple of 512" in done.stderr
    facts = json.loads(done.stdout)
    rounded = SIZE + 1024
    assert facts["bytes"] == rounded == info(volume)["size_bytes"]
    assert info(volume)["block_size_bytes"] == block_bytes and "import" not in info(volume)
    assert facts["checksum"] == checksum(data)
    assert facts["is_verified"] and facts["seconds"] > 0 and facts["resumed_bytes"] == 0
    padded = data.ljust(rounded, b"\0")
    assert facts["data_bytes"] == data_of(padded, block_bytes)
    live = said(volume, "space", volume.url)["live_bytes"]
    # The last block is stored whole.
    most = facts["data_bytes"] + facts["data_bytes"] // 50 + 256 * KI + block_bytes
    assert live <= most, "holes and zeros take no space"

    copy = tmp_path / "copy.raw"
    facts = said(volume, "export", volume.url, copy)
    assert copy.stat().st_size == rounded == facts["bytes"]
    same(copy, data)
    assert facts["checksum"] == checksum(data) and facts["is_verified"]
    assert facts["data_bytes"] == data_of(padded, 4 * KI)
    assert copy.stat().st_blocks * 512 <= facts["data_bytes"] + 256 * KI, "holes stay holes"
    assert {path.name for path in tmp_path.iterdir()} <= {"image.raw", "copy.raw", "store"}


def test_a_volume_that_is_nearly_all_hole(volume, tmp_path):
    """It costs what is in it, not what it could hold."""
    image = tmp_path / "thin.raw"
    with open(image, "wb") as file:
        file.truncate(8 * 1024 * GI)
        file.seek(5 * 1024 * GI + 3)
        file.write(b"here")
    facts = said(volume, "import", image, volume.url)
    assert facts["bytes"] == 8 * 1024 * GI and facts["data_bytes"] == 4 * KI
    copy = tmp_path / "copy.raw"
    assert said(volume, "export", volume.url, copy)["checksum"] == facts["checksum"]
    assert copy.stat().st_blocks * 512 <= 256 * KI
    with open(copy, "rb") as file:
        file.seek(5 * 1024 * GI + 3)
        assert file.read(5) == b"here\0"


def test_pipes(volume, image, tmp_path):
    data = image.read_bytes()
    copy = tmp_path / "copy.raw"
    with open(image, "rb") as source:
        process = begin(volume, "import", "-", volume.url, "--size", str(SIZE + 8192), stdin=source)
        status, error = finish(process)
    assert status == 0, error
    environment = {**os.environ, **volume.store.env}
    done = subprocess.run(command(volume, "export", volume.url, "-", "--json"), env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == data.ljust(SIZE + 8192, b"\0")
    facts = json.loads(done.stderr)
    assert facts["checksum"] == checksum(data) and not facts["is_verified"]
    # From volume to volume, as the documentation shows.
    other = Volume(volume.store.url("other"), volume.store)
    out = begin(volume, "export", volume.url, "-")
    into = begin(other, "import", "-", other.url, "--size", str(SIZE + 8192), "--json", stdin=out.stdout)
    out.stdout.close()
    text, error = into.communicate(timeout=120)
    assert into.returncode == 0, error
    assert out.wait(timeout=60) == 0
    out.stderr.close()
    assert json.loads(text)["checksum"] == checksum(data)
    must(other, "export", other.url, copy)
    same(copy, data)


def test_a_reader_that_goes_ends_an_export(volume, image):
    must(volume, "import", image, volume.url)
    process = begin(volume, "export", volume.url, "-")
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1 and "has gone" in error


def test_over_a_volume_that_is_there(make_volume, make_server, image, tmp_path):
    """Everything in it is replaced: what the image has as holes, and what lies beyond its end, reads as zeros."""
    volume = make_volume(SIZE + 4 * MI, 64 * KI)
    server = make_server(volume).start()
    old = pattern(SIZE + 4 * MI, 1)
    with server.connect() as client:
        for offset in range(0, len(old), 4 * MI):
            client.pwrite(old[offset : offset + 4 * MI], offset)
        client.flush()
    assert server.terminate() == 0
    before = info(volume)["last_checkpoint"]
    assert "--overwrite" in must_fail(volume, "import", image, volume.url)
    facts = said(volume, "import", image, volume.url, "--overwrite")
    assert facts["bytes"] == SIZE + 4 * MI
    copy = tmp_path / "copy.raw"
    must(volume, "export", volume.url, copy)
    same(copy, image.read_bytes())
    assert copy.stat().st_blocks * 512 <= facts["data_bytes"] + 256 * KI, "zeros were not stored as data"
    # What was there before is a checkpoint like any other.
    must(volume, "export", volume.url, f"@{before}", copy, "--overwrite")
    assert copy.read_bytes() == old


@pytest.mark.file_only
def test_what_is_refused_leaves_nothing(volume, make_volume, image, tmp_path):
    small = make_volume(1 * MI)
    (tmp_path / "empty").touch()
    (tmp_path / "packed.gz").write_bytes(b"\x1f\x8b\x08" + bytes(100))
    (tmp_path / "directory").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    size = str(SIZE + 1000)
    for words, sentence in [
        ((tmp_path / "missing", volume.url), "No such file"),
        ((tmp_path / "empty", volume.url), "is empty"),
        ((tmp_path / "directory", volume.url), "neither a file nor a block device"),
        ((tmp_path / "packed.gz", volume.url), "gzip -dc"),
        ((image, volume.url, "--size", "1M"), size),
        ((image, volume.url, "--format", "qcow2"), "image.raw"),
        ((image, volume.url, "--block-size", "1000"), "1000"),
        (("-", volume.url), "--size"),
        (("-", volume.url, "--size", "1M", "--format", "vmdk"), "qemu-img"),
        ((image, small.url, "--overwrite"), f"resize {small.url} --size {SIZE + 1024}"),
        ((tmp_path / "packed.gz", small.url, "--overwrite", "--format", "raw", "--size", "2M"), "--size"),
        ((tmp_path / "packed.gz", small.url, "--overwrite", "--format", "raw", "--block-size", "4K"), "--block-size"),
    ]:
        error = must_fail(volume, "import", *words)
        assert sentence in error, f"{words}: {error}"
        assert len(error.splitlines()) == 1, error
    assert "possible values" in must_fail(volume, "import", image, volume.url, "--format", "vdi", status=2)
    for words, sentence, status in [
        ((volume.url, tmp_path / "new"), volume.url.rstrip("/"), 1),
        ((small.url, "@17", tmp_path / "new"), "has no checkpoint @17", 1),
        ((small.url, "@no-such-name", tmp_path / "new"), "has no checkpoint @no-such-name", 1),
        ((small.url, "17", tmp_path / "new"), "names no checkpoint", 2),
        ((small.url, image), "--overwrite", 1),
        ((small.url, tmp_path / "new.vdi"), "--format", 1),
        ((small.url, tmp_path / "nowhere" / "new"), "No such file", 1),
        ((small.url, tmp_path / "directory"), "directory", 1),
        ((small.url, "-", "--format", "qcow2"), "takes a file", 1),
    ]:
        error = must_fail(volume, "export", *words, status=status)
        assert sentence in error, f"{words}: {error}"
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert len(image.read_bytes()) == SIZE + 1000


def test_a_pipe_with_more_than_fits_leaves_nothing(volume):
    before = volume.store.objects_of_volumes()
    process = begin(volume, "import", "-", volume.url, "--size", "1M", stdin=subprocess.PIPE)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("x" * (2 * MI))
        process.stdin.close()
    process.stdin = None
    status, error = finish(process)
    assert status == 1 and "larger --size" in error and "was removed" in error
    assert volume.store.objects_of_volumes() == before


def test_beside_a_server(make_volume, make_server, image, tmp_path, seed):
    """An import is refused, and the server goes on; an earlier checkpoint is exported while it writes."""
    volume = make_volume(SIZE + 4 * MI, 4 * KI)
    server = make_server(volume, checkpoint_interval="100ms").start()
    rng = random.Random(seed)
    with server.connect() as client:
        for _ in range(30):
            client.pwrite(rng.randbytes(200 * KI), rng.randrange(SIZE))
        client.flush()
        kept = read_all(client, SIZE + 4 * MI)
        must(volume, "snapshot", "create", volume.url, "kept")
        error = must_fail_beside(volume, "import", image, volume.url, "--overwrite")
        assert "held by another server" in error
        over, has_flushed = threading.Event(), threading.Event()

        def write_on() -> None:
            tag = 0
            with server.connect() as writer:
                while not over.is_set():
                    tag += 1
                    writer.pwrite(pattern(1 * MI, tag), rng.randrange(SIZE))
                    writer.flush()
                    has_flushed.set()

        writer = threading.Thread(target=write_on)
        writer.start()
        try:
            copy = tmp_path / "copy.raw"
            facts = said(volume, "export", volume.url, "@kept", copy, "--limit-rate", "32M")
            assert has_flushed.wait(240), "there is no newer checkpoint to export"
            newest = said(volume, "export", volume.url, tmp_path / "newest.raw")
        finally:
            over.set()
            writer.join()
        assert copy.read_bytes() == kept
        assert facts["checksum"] == checksum(kept)
        assert newest["checkpoint"] > facts["checkpoint"]
        now = (tmp_path / "newest.raw").read_bytes()
        assert now != kept and newest["checksum"] == checksum(now)
        client.pwrite(b"still here", 0)
        client.flush()
        assert client.pread(10, 0) == b"still here"


def must_fail_beside(volume: Volume, *words: str | Path) -> str:
    """As `must_fail`, of a volume whose server renews its lease and publishes meanwhile."""
    done = volume.cli(*words)
    assert done.returncode == 1, f"{words}: {done.stdout}{done.stderr}"
    return done.stderr


def written(volume: Volume) -> int:
    """How far an import under way has noted that it is; 0 while there is no volume."""
    done = volume.cli("info", volume.url, "--json")
    return json.loads(done.stdout).get("import", {}).get("written_bytes", 0) if done.returncode == 0 else 0


def begin_slow_import(volume: Volume, image: Path, *words: str) -> subprocess.Popen:
    """An import that has noted that a part of the image is in the volume, and is not at its end."""
    process = begin(volume, "import", image, volume.url, "--limit-rate", "512K", *words)
    wait_for(lambda: process.poll() is not None or written(volume) > 0, "an import to get on")
    assert process.poll() is None, finish(process)
    return process


@pytest.fixture
def full_image(tmp_path, seed) -> Path:
    """An image that is all data: at 512 KiB a second it takes a minute and a half."""
    image = tmp_path / "full.raw"
    image.write_bytes(random.Random(seed).randbytes(SIZE))
    return image


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_import_goes_on_after_its_end(volume, full_image, tmp_path, end):
    process = begin_slow_import(volume, full_image)
    process.send_signal(end)
    status, error = finish(process)
    if end == signal.SIGKILL:
        assert status == -signal.SIGKILL
        if volume.store.kind == "s3":
            # What it had sent may be carried out after its end.
            volume.store.minio.front.settle()
    else:
        assert status == 128 + end and "run again, goes on after" in error
    noted = written(volume)
    assert 0 < noted < SIZE
    assert "not finished" in must(volume, "info", volume.url)
    # Nobody else's import takes its place, nor does one of what the file has become.
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(SIZE))
    assert "was not finished" in must_fail(volume, "import", other, volume.url)
    facts = said(volume, "import", full_image, volume.url)
    assert facts["resumed_bytes"] == noted
    assert facts["checksum"] == checksum(full_image.read_bytes()) and facts["is_verified"]
    assert "import" not in info(volume)
    copy = tmp_path / "copy.raw"
    must(volume, "export", volume.url, copy)
    assert copy.read_bytes() == full_image.read_bytes()


@pytest.mark.file_only
def test_an_import_does_not_go_on_where_anything_changed(volume, full_image, make_server):
    process = begin_slow_import(volume, full_image)
    process.send_signal(signal.SIGINT)
    finish(process)
    times = full_image.stat()
    os.utime(full_image, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert "file unchanged" in must_fail(volume, "import", full_image, volume.url)
    os.utime(full_image, ns=(times.st_atime_ns, times.st_mtime_ns))
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(b"a server's", 0)
        client.flush()
    assert server.terminate() == 0
    error = must_fail(volume, "import", full_image, volume.url)
    assert "somebody else had the volume" in error and "--overwrite" in error
    facts = said(volume, "import", full_image, volume.url, "--overwrite")
    assert facts["resumed_bytes"] == 0 and facts["checksum"] == checksum(full_image.read_bytes())


@pytest.mark.file_only
def test_an_import_over_a_volume_goes_on_too(make_volume, full_image, tmp_path):
    volume = make_volume(SIZE, 4 * KI)
    process = begin_slow_import(volume, full_image, "--overwrite")
    process.send_signal(signal.SIGTERM)
    status, error = finish(process)
    assert status == 128 + signal.SIGTERM and "half written" in error
    noted = written(volume)
    assert "--overwrite" in must_fail(volume, "import", full_image, volume.url)
    assert said(volume, "import", full_image, volume.url, "--overwrite")["resumed_bytes"] == noted > 0
    copy = tmp_path / "copy.raw"
    must(volume, "export", volume.url, copy)
    assert copy.read_bytes() == full_image.read_bytes()


@pytest.mark.file_only
def test_an_image_that_changes_under_its_import(volume, full_image):
    """What was read is no state that the file ever had, and none of it is kept."""
    process = begin(volume, "import", full_image, volume.url, "--limit-rate", "4M")
    wait_for(lambda: is_there(volume), "the import to begin")
    with open(full_image, "r+b") as file:
        file.write(b"changed")
    status, error = finish(process)
    assert status == 1 and "was changed while it was read" in error and "was removed" in error
    assert volume.store.objects_of_volumes() == set()


def is_there(volume: Volume) -> bool:
    done = volume.cli("info", volume.url, "--json")
    return done.returncode == 0 and "import" in json.loads(done.stdout)


def test_an_import_of_a_pipe_that_ends_early(volume, image):
    """Told to stop it leaves nothing; killed, what it leaves is taken up by the next one, from the start."""
    for end in (signal.SIGINT, signal.SIGKILL):
        process = begin(volume, "import", "-", volume.url, "--size", str(SIZE + 1024), stdin=subprocess.PIPE)
        process.stdin.write("x" * (9 * MI))
        process.stdin.flush()
        wait_for(lambda: is_there(volume), "the import to begin")
        process.send_signal(end)
        stdin, process.stdin = process.stdin, None
        status, error = finish(process)
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        if end == signal.SIGINT:
            assert status == 128 + end and "was removed" in error
            assert volume.store.objects_of_volumes() == set()
    assert status == -signal.SIGKILL and is_there(volume)
    with open(image, "rb") as source:
        process = begin(volume, "import", "-", volume.url, "--size", str(SIZE + 1024), "--json", stdin=source)
        text, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert json.loads(text)["checksum"] == checksum(image.read_bytes())


@pytest.mark.file_only
def test_what_is_missing_is_said(volume, full_image, make_server, tmp_path):
    """A pipe that ends before the volume does; half an import, cloned; a log whose flushed writes are not published."""
    piped = run(CLI, "import", "-", volume.url, "--size", "20M", "--json", stdin="x" * MI)
    assert piped.returncode == 0, piped.stderr
    assert json.loads(piped.stdout)["piped_bytes"] == MI
    assert f"ended after {MI} bytes" in piped.stderr, piped.stderr

    half = Volume(volume.store.url("half"), volume.store)
    importing = begin_slow_import(half, full_image)
    for words in (("clone", half.url), ("clone", "--full", half.url)):
        refused = half.cli(*words, half.store.url("clone"))
        assert refused.returncode != 0 and "is not finished" in refused.stderr, refused.stderr
    importing.kill()
    finish(importing)

    server = make_server(volume, backend_wal_url=f"file://{tmp_path}/journal/", checkpoint_interval="1h").start()
    with server.connect() as client:
        client.pwrite(pattern(64 * KI, 3), 0)
        client.flush()
        exported = volume.cli("export", volume.url, tmp_path / "copy")
        assert exported.returncode == 0 and "are not exported" in exported.stderr, exported.stderr
        must(volume, "snapshot", "create", volume.url, "now")
        exported = volume.cli("export", volume.url, "@now", tmp_path / "now")
        assert exported.returncode == 0 and "not exported" not in exported.stderr, exported.stderr
        assert (tmp_path / "now").read_bytes()[: 64 * KI] == pattern(64 * KI, 3)
    assert server.terminate() == 0


@pytest.mark.file_only
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("name", ["copy.raw", "copy.qcow2"])
def test_an_export_that_ends_early(volume, full_image, tmp_path, end, name):
    """There is no file before it is whole; what a killed one leaves is used by the next."""
    must(volume, "import", full_image, volume.url)
    copy = tmp_path / name
    part = tmp_path / f".{name}.hypernbd-part"
    copy.write_text("what was there")
    process = begin(volume, "export", volume.url, copy, "--overwrite", "--limit-rate", "512K")
    wait_for(lambda: process.poll() is not None or part.exists() and part.stat().st_blocks * 512 > MI, "a part of it")
    assert process.poll() is None, finish(process)
    assert "another process" in must_fail(volume, "export", volume.url, copy, "--overwrite")
    process.send_signal(end)
    status, _ = finish(process)
    assert copy.read_text() == "what was there"
    if end == signal.SIGINT:
        assert status == 128 + end and not part.exists()
    else:
        assert status == -end and part.exists()
    assert wait_for(lambda: not users_of(part), "qemu-nbd to end")
    must(volume, "export", volume.url, copy, "--overwrite")
    assert not part.exists()
    if name == "copy.raw":
        assert copy.read_bytes() == full_image.read_bytes()
    else:
        check("qemu-img", "compare", full_image, copy)


def users_of(path: Path) -> list[str]:
    """The processes that were given this path."""
    users = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # Bytes: words of other tests' processes need be no text.
            if os.fsencode(path) in (process / "cmdline").read_bytes():
                users.append(process.name)
    return users


@pytest.mark.file_only
@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vhdx"])
def test_images_that_are_not_raw(volume, image, tmp_path, format):
    packed = tmp_path / f"image.{format}"
    check("qemu-img", "convert", "-f", "raw", "-O", format, image, packed)
    # By its content, whatever it is called.
    unnamed = tmp_path / "unnamed"
    shutil.copy(packed, unnamed)
    facts = said(volume, "import", unnamed, volume.url)
    assert facts["checksum"] == checksum(image.read_bytes()) and facts["is_verified"]
    assert facts["data_bytes"] < SIZE // 2
    back = tmp_path / f"back.{format}"
    out = said(volume, "export", volume.url, back)
    assert out["checksum"] == facts["checksum"] and out["is_verified"]
    assert json.loads(check("qemu-img", "info", "--output=json", back))["format"] == format
    check("qemu-img", "compare", "-f", "raw", "-F", format, image, back)
    assert back.stat().st_blocks * 512 < facts["data_bytes"] + 16 * MI
    by_flag = tmp_path / "by-flag"
    must(volume, "export", volume.url, by_flag, "--format", format)
    check("qemu-img", "compare", "-f", "raw", "-F", format, image, by_flag)


@pytest.mark.file_only
def test_names_that_qemu_takes_for_something_else(volume, image, tmp_path, monkeypatch):
    """A word before a colon is a protocol to it, and a dash first an option."""
    monkeypatch.chdir(tmp_path)
    check("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, "./vm-10:00.qcow2")
    must(volume, "import", "vm-10:00.qcow2", volume.url)
    for name in ("back-10:00.qcow2", "-x.qcow2"):
        must(volume, "export", volume.url, "--", name)
        check("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, f"./{name}")


@pytest.mark.file_only
def test_a_qcow2_over_a_full_volume(make_volume, make_server, image, tmp_path):
    volume = make_volume(SIZE + 4 * MI)
    server = make_server(volume).start()
    with server.connect() as client:
        for offset in range(0, SIZE + 4 * MI, 4 * MI):
            client.pwrite(pattern(4 * MI, 3), offset)
        client.flush()
    assert server.terminate() == 0
    packed = tmp_path / "image.qcow2"
    check("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", image, packed)
    must(volume, "import", packed, volume.url, "--overwrite")
    copy = tmp_path / "copy.raw"
    must(volume, "export", volume.url, copy)
    same(copy, image.read_bytes())


@pytest.mark.file_only
def test_a_damaged_image_is_refused_with_qemus_words(volume, image, tmp_path):
    packed = tmp_path / "image.qcow2"
    packed.write_bytes(b"QFI\xfb" + bytes(1000))
    error = must_fail(volume, "import", packed, volume.url)
    assert "qemu-img says" in error and str(packed) in error
    # As bytes it is an image like any other.
    assert said(volume, "import", packed, volume.url, "--format", "raw")["data_bytes"] == 1024


@pytest.mark.file_only
@pytest.mark.parametrize("lacking, named", [("PATH", "qemu-utils"), ("TMPDIR", "set TMPDIR")], ids=["programs", "directory"])
def test_what_is_lacking_for_qemu_is_named(volume, image, tmp_path, lacking, named):
    """Images that are raw do without."""
    packed = tmp_path / "image.qcow2"
    check("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, packed)
    nothing = {lacking: str(tmp_path / "nothing")}
    assert named in must_fail(volume, "import", packed, volume.url, env=nothing)
    must(volume, "import", image, volume.url, env=nothing)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert named in must_fail(volume, "export", volume.url, tmp_path / "a.vmdk", env=nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.fixture
def device(tmp_path):
    """A block device of 56 MiB, full of data."""
    backing = tmp_path / "backing"
    backing.write_bytes(pattern(56 * MI, 9))
    done = run("losetup", "--show", "--find", backing)
    if done.returncode != 0:
        pytest.skip(f"no loop devices: {done.stderr}")
    path = Path(done.stdout.strip())
    yield path
    check("losetup", "--detach", path)


@needs_root
@pytest.mark.file_only
def test_block_devices(volume, image, device, tmp_path):
    must(volume, "import", image, volume.url)
    assert "--overwrite" in must_fail(volume, "export", volume.url, device)
    facts = said(volume, "export", volume.url, device, "--overwrite")
    assert facts["is_verified"]
    data = device.read_bytes()
    assert data[: SIZE + 1024] == image.read_bytes().ljust(SIZE + 1024, b"\0"), "holes are zeroed, too"
    assert data[SIZE + 1024 :] == pattern(56 * MI, 9)[SIZE + 1024 :], "what lies beyond stays"
    other = Volume(volume.store.url("other"), volume.store)
    assert said(other, "import", device, other.url)["checksum"] == checksum(data)
    large = Volume(volume.store.url("large"), volume.store)
    must(large, "create", large.url, "--size", "57M")
    assert "does not fit" in must_fail(large, "export", large.url, device, "--overwrite")
    assert device.read_bytes() == data
    check("mkfs.ext4", "-q", "-F", device)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    check("mount", device, mountpoint)
    try:
        assert "in use" in must_fail(volume, "export", volume.url, device, "--overwrite")
    finally:
        check("umount", mountpoint)


@needs_root
@pytest.mark.file_only
def test_no_room_for_an_export(volume, full_image, tmp_path):
    must(volume, "import", full_image, volume.url)
    small = tmp_path / "small-disk"
    small.mkdir()
    check("mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", small)
    try:
        error = must_fail(volume, "export", volume.url, small / "copy.raw")
        assert "No space left" in error and "make room" in error
        assert list(small.iterdir()) == []
    finally:
        check("umount", "--lazy", small)


@needs_root
@pytest.mark.file_only
def test_no_room_for_an_import(full_image, tmp_path):
    """The store of the volume is full: what the import made goes again."""
    small = tmp_path / "small-disk"
    small.mkdir()
    check("mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", small)
    try:
        store = FileStore(small)
        volume = Volume(store.url("moved"), store)
        status, error = finish(begin(volume, "import", full_image, volume.url))
        assert status == 1 and "No space left" in error and "was removed" in error, error
        assert volume.store.objects_of_volumes() == set()
    finally:
        check("umount", "--lazy", small)


@pytest.mark.file_only
def test_a_volume_that_nothing_was_written_to(make_volume, tmp_path):
    volume = make_volume(1 * GI)
    copy = tmp_path / "copy.raw"
    facts = said(volume, "export", volume.url, copy)
    assert facts["checkpoint"] is None and facts["data_bytes"] == 0 and facts["checksum"] == checksum(b"")
    assert copy.stat().st_size == GI and copy.stat().st_blocks == 0
    other = Volume(volume.store.url("other"), volume.store)
    assert said(other, "import", copy, other.url)["checksum"] == checksum(b"")
    assert info(other)["size_bytes"] == GI


@pytest.mark.file_only
def test_a_bar_on_a_terminal_alone(volume, full_image, tmp_path):
    done = volume.cli("import", full_image, volume.url)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert checksum(full_image.read_bytes()) in done.stdout
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command(volume, "export", volume.url, tmp_path / "copy.raw", "--limit-rate", "16M"),
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(controller, 4096):
            shown += piece
    os.close(controller)
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    text = shown.decode(errors="replace")
    assert "copying" in text and "/s" in text and "left" in text, text


@pytest.mark.file_only
def test_the_checksum_that_the_documentation_computes(volume, image, tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "transfer.md").read_text(), re.DOTALL)
    by_hand = check(sys.executable, "-c", program, image).strip()
    assert by_hand == checksum(image.read_bytes())
    assert by_hand in must(volume, "import", image, volume.url)
    assert f"{by_hand}, verified" in must(volume, "export", volume.url, tmp_path / "copy.raw")


@pytest.mark.file_only
def test_without_verification(volume, image, tmp_path):
    facts = said(volume, "import", image, volume.url, "--no-verify")
    assert not facts["is_verified"]
    facts = said(volume, "export", volume.url, tmp_path / "copy.raw", "--no-verify")
    assert not facts["is_verified"]
    same(tmp_path / "copy.raw", image.read_bytes())
