"""Directories on file systems that lack locks or syncs are found out at the start, by the real programs."""

from pathlib import Path

import pytest

from support.model import pattern
from support.process import check
from support.server import KI, MI, PROJECT
from support.stores import FileStore

LACKS = ["exclusion", "locks", "sync"]
SAID = {
    "exclusion": "gives the lock of a file to two at once",
    "locks": "does not lock files (No locks available",
    "sync": "on the disk (Invalid argument",
}


@pytest.fixture(scope="module")
def lacking(tmp_path_factory):
    """The environment in which a directory lacks something: `lacking("locks", directory)`."""
    library = tmp_path_factory.mktemp("lacking") / "lacking_fs.so"
    source = PROJECT / "tests" / "e2e" / "support" / "lacking_fs.c"
    check("cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl")

    def environment(lack: str, directory: Path) -> dict[str, str]:
        return {"LD_PRELOAD": str(library), "LACKING": lack, "LACKING_DIR": str(directory.resolve())}

    return environment


def tree(directory: Path) -> list[tuple[str, int]]:
    """The names below a directory, with the sizes of the files."""
    return sorted(
        (str(path.relative_to(directory)), path.stat().st_size if path.is_file() else -1)
        for path in directory.rglob("*")
    )


def assert_named(text: str, lack: str, directory: Path) -> None:
    """One sentence: where, what is lacking, what to do."""
    (line,) = {line[line.index("the file system of ") :] for line in text.splitlines() if "the file system of " in line}
    for part in (f"the file system of {directory}", SAID[lack], "name a directory of another file system"):
        assert part in line, text


def refused(server) -> str:
    """What a server says that does not even start."""
    server.spawn()
    assert server.wait() != 0
    return server.log_text()


@pytest.mark.file_only
@pytest.mark.parametrize("lack", LACKS)
def test_no_store_is_made_there(lack, lacking, make_volume, tmp_path):
    made = make_volume()
    place = tmp_path / "unfit"
    place.mkdir()
    done = made.cli("create", f"file://{place}/a/volume", "--size", "64M", env=lacking(lack, place))
    assert done.returncode != 0
    assert_named(done.stderr, lack, place)
    assert tree(place) == []


@pytest.mark.file_only
@pytest.mark.parametrize("lack", LACKS)
def test_a_store_that_is_there_is_read_and_not_served_for_writing(lack, lacking, make_volume, make_server):
    volume = make_volume()
    server = make_server(volume).start()
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
    assert server.terminate() == 0
    directory = Path(volume.url.removeprefix("file://"))
    before = tree(directory)
    env = lacking(lack, directory)
    assert_named(refused(make_server(volume, env=env)), lack, directory)
    resized = volume.cli("resize", volume.url, "--size", "128M", env=env)
    assert resized.returncode != 0
    assert_named(resized.stderr, lack, directory)
    with make_server(volume, nbdkit_options=["-r"], env=env).start().connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)
    assert tree(directory) == before
    with make_server(volume).start().connect() as client:
        assert client.pread(1 * MI, 0) == pattern(1 * MI, 1)


@pytest.mark.parametrize("lack", LACKS)
def test_no_journal_is_there(lack, lacking, make_volume, make_server, tmp_path):
    volume = make_volume()
    place = tmp_path / "unfit"
    place.mkdir()
    journal = {"backend_wal_url": f"file://{place}/journal/"}
    env = lacking(lack, place)
    assert_named(refused(make_server(volume, env=env, **journal)), lack, place)
    assert tree(place) == []
    # One that was made before, with a flushed write that no checkpoint holds.
    server = make_server(volume, **journal).start()
    with server.connect() as client:
        client.pwrite(pattern(8 * KI, 2), 0)
        client.flush()
        server.kill()
    before = tree(place)
    assert_named(refused(make_server(volume, env=env, **journal)), lack, place / "journal")
    assert tree(place) == before
    with make_server(volume, **journal).start().connect() as client:
        assert client.pread(8 * KI, 0) == pattern(8 * KI, 2)


@pytest.mark.parametrize("lack", ["exclusion", "locks"])
def test_caches_there_are_kept_in_memory(lack, lacking, make_volume, make_server, tmp_path):
    volume = make_volume(4 * MI, 4 * KI)
    place = tmp_path / "unfit"
    place.mkdir()
    parameters = {
        "cache_dir": str(place / "data"),
        "cache_disk": "64M",
        "node_cache_config": f"LocalDisk,{place}/nodes,32M,ReuseCache",
    }
    server = make_server(volume, env=lacking(lack, place), **parameters).start()
    with server.connect() as client:
        client.pwrite(pattern(4 * MI, 3), 0)
        client.flush()
    assert server.terminate() == 0
    with server.start().connect() as client:
        assert client.pread(4 * MI, 0) == pattern(4 * MI, 3)
    assert server.terminate() == 0
    lines = [line for line in server.log_text().splitlines() if SAID[lack] in line]
    assert len(lines) == 2 * 2 and all("in memory only" in line for line in lines), lines
    assert not any("foyer" in name for name, _ in tree(place)), tree(place)
    kept = make_server(volume, **parameters).start()
    with kept.connect() as client:
        assert client.pread(4 * MI, 0) == pattern(4 * MI, 3)
    assert kept.terminate() == 0
    assert any("foyer" in name for name, _ in tree(place)), "the test shows nothing"
