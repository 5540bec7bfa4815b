"""Which S3 server the tests run on, and that the document tells of each that they can start."""

import re

import pytest

from support.s3_servers import SERVERS, program_to_test, server_of
from support.server import PROJECT

DOCUMENT = PROJECT / "docs" / "s3-compatibility.md"


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A directory in PATH with a program of each name, and no variable that names one."""
    for server in SERVERS:
        (tmp_path / server.program).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("MINIO", "HYPERNBD_TEST_STORE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_minio_is_tested_unless_another_store_is_asked_for(installed, monkeypatch):
    assert server_of(program_to_test()).name == "MinIO"
    monkeypatch.setenv("MINIO", "/elsewhere/minio-RELEASE.2025")
    assert program_to_test() == "/elsewhere/minio-RELEASE.2025"
    assert server_of(program_to_test()).name == "MinIO"
    for server in SERVERS:
        for given in (server.program, str(installed / server.program)):
            monkeypatch.setenv("HYPERNBD_TEST_STORE", given)
            assert server_of(program_to_test()) is server


def test_a_store_that_cannot_be_started_is_named(installed, monkeypatch):
    """And no other one is taken in its place."""
    monkeypatch.setenv("HYPERNBD_TEST_STORE", "no-such-store")
    with pytest.raises(AssertionError, match="no-such-store"):
        program_to_test()
    with pytest.raises(AssertionError, match="/bin/cat .*minio"):
        server_of("/bin/cat")


def test_the_document_tells_of_each_store_that_can_be_started():
    text = DOCUMENT.read_text()
    for server in SERVERS:
        assert re.search(rf"{server.name} v?\d", text), f"the document does not say what came of {server.name}"
