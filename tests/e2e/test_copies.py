"""Copies, moves and backups by the commands that docs/operations.md prints."""

import re
import shutil

import pytest

from support.lives import SIZE, assert_flushed_writes_survive, assert_reads, publish
from support.others import stored_label
from support.process import check
from support.server import KI, MI, PROJECT, Volume, create_volume
from support.stores import BUCKET, REGION
from support.model import pattern

OPERATIONS = PROJECT / "docs" / "operations.md"
FIRST, SECOND = {0: pattern(MI, 1)}, {0: pattern(MI, 2)}


@pytest.fixture
def run_commands(store):
    """Runs what the document prints below `# TITLE`, with the test's bucket, prefix and directory."""
    if store.kind == "s3" and not shutil.which("aws"):
        pytest.skip("the machine has no aws command")

    def run(title: str) -> None:
        (block,) = re.findall(r"```sh\n(# copy\n.*?)```", OPERATIONS.read_text(), re.DOTALL)
        (commands,) = re.findall(rf"^# {title}.*\n((?:[^#\n].*\n)+)", block, re.MULTILINE)
        chosen = [line for line in commands.splitlines() if line.startswith("aws ") == (store.kind == "s3")]
        assert chosen
        for line in chosen:
            if store.kind == "s3":
                line = line.replace("s3://bucket/", f"s3://{BUCKET}/{store.prefix}/")
                env = store.env | {"AWS_ENDPOINT_URL": store.minio.endpoint, "AWS_DEFAULT_REGION": REGION}
            else:
                line, env = line.replace("/srv/", f"{store.directory}/"), {}
            check("sh", "-ec", line, env=env)

    return run


@pytest.fixture
def made(store, make_server):
    """A server of a volume `vol` with a first state, and how to serve another one."""
    parameters = {"lease_duration": "2s"}
    server = make_server(create_volume(store, SIZE, 64 * KI, "vol"), **parameters)
    publish(server, 1)
    return server, lambda name, **more: make_server(Volume(store.url(name), store), **parameters, **more)


def test_a_copy(made, run_commands):
    server, serve = made
    run_commands("copy")
    copy = serve("copy")
    assert_reads(copy, FIRST)
    publish(copy, 2)
    assert stored_label(copy.volume)["parent"] == stored_label(server.volume)["volume_id"]
    assert_reads(server, FIRST)
    assert_flushed_writes_survive(server)


def test_a_move(made, run_commands):
    server, serve = made
    before = stored_label(server.volume)["volume_id"]
    run_commands("move")
    assert server.volume.cli("info", server.volume.url).returncode != 0
    assert_reads(serve("moved", adopt="yes"), FIRST)
    moved = serve("moved")
    assert stored_label(moved.volume)["volume_id"] == before
    assert_flushed_writes_survive(moved)


def test_a_backup_and_its_restoration(made, run_commands):
    server, _ = made
    before = stored_label(server.volume)
    run_commands("back up")
    publish(server, 2)
    assert_reads(server, SECOND)
    run_commands("restore")
    assert_reads(server, FIRST)
    assert stored_label(server.volume) == before
    assert_flushed_writes_survive(server)
