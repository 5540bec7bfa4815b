"""A server that could never write is refused at the start, by its cause; one that only reads is not."""

import json
import os
import re

import pytest

from support.model import pattern
from support.process import check, run, wait_for
from support.server import KI, MI
from support.stores import BUCKET, FileStore

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
NAMES_OF_CODE = r"PermissionDenied|ReadOnlyFilesystem|Unauthenticated|Kind\b|Os \{|Error\("
"""What a message of ours must not have; AccessDenied is S3's own word."""


def refused(server, changes_nothing: bool = True) -> str:
    """The sentence of a server that does not even start."""
    before = server.volume.store.objects()
    server.spawn()
    wait_for(lambda: server.socket.exists() or not server.is_running(), "nbdkit to listen or to end")
    assert not server.socket.exists(), "it serves"
    assert server.wait() != 0
    assert not changes_nothing or server.volume.store.objects() == before
    (line,) = [line for line in server.log_text().splitlines() if "error:" in line]
    assert not re.search(NAMES_OF_CODE, line), line
    return line


def written(make_volume, make_server, **parameters):
    """A volume that a server has had, which has written something to it."""
    volume = make_volume(**parameters)
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
    assert server.terminate() == 0
    return volume


def assert_is_read(server) -> None:
    """It serves, and what was written is read."""
    with server.start().connect() as client:
        assert client.is_read_only()
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
    assert server.terminate() == 0


# What may be put, of what lies in the volume and beside it, and the object that is told.
PERMITTED = {
    "nothing": ([], r"(\.meta/|volume-1/permission)"),
    "the data alone": (["PREFIX/*"], r"\.meta/"),
    "what is beside it alone": (["PREFIX.meta/*"], "volume-1/permission"),
    "all but the lease": (["PREFIX/*", "PREFIX.meta/checkpoints/*", "PREFIX.meta/probe*", "PREFIX.meta/pins/*"], r"\.meta/lease"),
}


def policy(volume, names: list[str]) -> str:
    """Everything of the volume may be read, and the objects with these names written."""
    prefix = volume.url.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    reads = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": ["arn:aws:s3:::*"]}
    resources = [f"arn:aws:s3:::{BUCKET}/{name.replace('PREFIX', prefix)}" for name in names]
    actions = ["s3:PutObject", "s3:AbortMultipartUpload", "s3:DeleteObject"]
    writes = [{"Effect": "Allow", "Action": actions, "Resource": resources}] if resources else []
    return json.dumps({"Version": "2012-10-17", "Statement": [reads, *writes]})


@pytest.mark.s3_only
@pytest.mark.parametrize("is_probed", [True, False], ids=["probed", "not probed"])
@pytest.mark.parametrize("permitted", PERMITTED)
def test_keys_that_may_not_write(make_volume, make_server, minio, permitted, is_probed):
    """Also where the store was probed earlier, so that nothing need be written at the start."""
    volume = written(make_volume, make_server)
    if not is_probed:
        (probe,) = [key for key in volume.store.objects() if key.endswith(".meta/probe")]
        minio.client().delete_object(Bucket=BUCKET, Key=probe)
    names, told = PERMITTED[permitted]
    env = minio.credentials_with(policy(volume, names))
    if not is_probed and permitted != "nothing" and "probe*" not in "".join(names) and "meta/*" not in "".join(names):
        told = r"\.meta/probe-"
    server = make_server(volume, env=env)
    # The probe itself may write: what it remembers is no part of the volume.
    line = refused(server, changes_nothing=is_probed or permitted in ("nothing", "the data alone"))
    assert re.search(f"cannot write s3://{BUCKET}/\\S*{told}", line), line
    for part in ("AccessDenied", "s3:PutObject", "docs/security.md", "-r"):
        assert part in line, line
    assert_is_read(make_server(volume, env=env, nbdkit_options=["-r"]))


@pytest.mark.s3_only
def test_a_log_elsewhere_that_may_not_be_written(make_volume, make_server, minio):
    volume = written(make_volume, make_server)
    env = minio.credentials_with(policy(volume, ["PREFIX/*", "PREFIX.meta/*"]))
    line = refused(make_server(volume, env=env, backend_wal_url=volume.store.url("log")))
    assert "/log/permission" in line and "s3:PutObject" in line, line
    server = make_server(volume, env=env).start()
    with server.connect() as client:
        client.pwrite(b"x", 0)
        client.flush()
    assert server.terminate() == 0


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, which `read_only()` mounts read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    check("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", path)
    yield path
    run("umount", "--lazy", path)


def read_only(disk) -> None:
    check("mount", "-o", "remount,ro", disk)


@needs_root
@pytest.mark.file_only
def test_a_volume_on_a_read_only_mount(disk, make_volume, make_server):
    volume = written(make_volume, make_server, in_store=FileStore(disk))
    read_only(disk)
    line = refused(make_server(volume))
    for part in (volume.url, "Read-only file system", "mount it for writing", "-r"):
        assert part in line, line
    resized = volume.cli("resize", volume.url, "--size", "128M")
    assert resized.returncode != 0 and "Read-only file system" in resized.stderr, resized.stderr
    assert_is_read(make_server(volume, nbdkit_options=["-r"]))


@needs_root
@pytest.mark.file_only
@pytest.mark.parametrize("state", ["absent", "empty", "used"])
@pytest.mark.parametrize("key", ["backend_wal_url", "write_buffer_dir"])
def test_directories_of_the_server_on_a_read_only_mount(disk, make_volume, make_server, key, state):
    """A journal and a write buffer's file are no caches: without them the server would not do what it was told."""
    volume = make_volume()
    directory = disk / "own"
    value = f"file://{directory}/" if key == "backend_wal_url" else str(directory)
    parameters = {key: value, "write_buffer": "16M"}
    if state == "empty":
        directory.mkdir(mode=0o700)
    if state == "used":
        server = make_server(volume, **parameters).start()
        with server.connect() as client:
            client.pwrite(pattern(8 * KI, 1), 0)
            client.flush()
        assert server.terminate() == 0
    read_only(disk)
    line = refused(make_server(volume, **parameters))
    assert str(directory) in line and "Read-only file system" in line, line


@needs_root
@pytest.mark.parametrize("state", ["absent", "used"])
def test_caches_on_a_read_only_mount_are_kept_in_memory(disk, make_volume, make_server, state):
    volume = make_volume(4 * MI, 4 * KI)
    parameters = {
        "cache_dir": str(disk / "data"),
        "cache_disk": "64M",
        "node_cache_config": f"LocalDisk,{disk}/nodes,32M,ReuseCache",
    }
    if state == "used":
        server = make_server(volume, **parameters).start()
        with server.connect() as client:
            client.pwrite(pattern(4 * MI, 1), 0)
            client.flush()
        assert server.terminate() == 0
    read_only(disk)
    server = make_server(volume, **parameters).start()
    with server.connect() as client:
        client.pwrite(pattern(4 * MI, 2), 0)
        client.flush()
        assert client.pread(4 * MI, 0) == pattern(4 * MI, 2)
    assert server.terminate() == 0
    lines = [line for line in server.log_text().splitlines() if "in memory only" in line]
    assert len(lines) == 2 and all("Read-only file system" in line for line in lines), server.log_text()
