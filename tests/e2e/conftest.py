"""Fixtures: one S3 server a session, MinIO unless another one is asked for, a store of either kind, volumes and the servers on them."""

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

from support.faulty import FaultyProxy
from support.s3_servers import program_to_test
from support.server import CLI, KI, MI, PLUGIN, Server, create_volume, nbdkit_version
from support.stores import FileStore, Minio, S3Store
from support.strict import StrictProxy

OLD_NBDKIT_BELOW = (1, 34)


def pytest_generate_tests(metafunc):
    if "nbdkit" in metafunc.fixturenames:
        both = metafunc.definition.get_closest_marker("old_nbdkit_too")
        metafunc.parametrize("nbdkit", ["current", "system"] if both else ["current"], indirect=True)
    if "store" in metafunc.fixturenames:
        kinds = ["file", "s3"]
        if metafunc.definition.get_closest_marker("file_only"):
            kinds = ["file"]
        if metafunc.definition.get_closest_marker("s3_only"):
            kinds = ["s3"]
        metafunc.parametrize("store", kinds, indirect=True)


def pytest_configure(config):
    for path in (PLUGIN, CLI):
        if not path.exists():
            pytest.exit(f"{path} is missing: run the tests by `make e2e`, which builds it", 2)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows what its servers said."""
    report = (yield).get_result()
    if report.failed:
        item.failed = True
        for server in getattr(item, "servers", []):
            report.sections.append((f"nbdkit on {server.volume.url}", server.log_text()[-8000:]))


@pytest.fixture
def tmp_path(request, tmp_path):
    """The test's own directory, kept only when the test fails: together they would fill a disk."""
    yield tmp_path
    if not getattr(request.node, "failed", False):
        shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture(scope="session")
def minio_program() -> str:
    """The path of the S3 server to test with: MinIO, or the one that $HYPERNBD_TEST_STORE names."""
    return program_to_test()


@pytest.fixture(scope="session")
def minio(request, minio_program, tmp_path_factory):
    """The S3 server of the session, behind a proxy that refuses what AWS S3 does."""
    server = Minio(minio_program, tmp_path_factory.mktemp("minio"))
    server.start()
    request.config.s3_front = server.front = StrictProxy(server.direct)
    yield server
    server.front.close()
    server.kill()


@pytest.fixture(autouse=True)
def rules_of_s3(request):
    """No test sends S3 a request whose form AWS refuses."""
    yield
    if front := getattr(request.config, "s3_front", None):
        assert not front.take_broken()


@pytest.fixture
def own_minio(minio_program, tmp_path):
    """An S3 server of the test's own, to stop, pause and start again."""
    server = Minio(minio_program, tmp_path / "own-minio")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def nbdkit(request) -> str:
    """The path of the nbdkit to test with."""
    if request.param == "current":
        program = os.environ.get("NBDKIT") or shutil.which("nbdkit")
        assert program, "name nbdkit in NBDKIT, or run the tests by `make e2e`"
        return program
    program = shutil.which("nbdkit", path="/usr/bin:/usr/sbin")
    if not program or nbdkit_version(program) >= OLD_NBDKIT_BELOW:
        pytest.skip("the system's nbdkit is not an old one")
    return program


@pytest.fixture
def store(request, tmp_path):
    """An empty corner of a store of the kind asked for, gone with the test."""
    if request.param == "s3":
        corner = S3Store(request.getfixturevalue("minio"))
        yield corner
        corner.clear()
    else:
        directory = tmp_path / "store"
        directory.mkdir()
        yield FileStore(directory)


@pytest.fixture
def make_volume(store):
    """Makes volumes in the test's store: `make_volume(size_bytes, block_bytes)`."""
    made = []

    def make(size_bytes: int = 64 * MI, block_bytes: int = 64 * KI, in_store=None):
        volume = create_volume(in_store or store, size_bytes, block_bytes, f"volume-{len(made) + 1}")
        made.append(volume)
        return volume

    return make


@pytest.fixture
def make_server(request, nbdkit, tmp_path):
    """Makes servers that end with the test: `make_server(volume, parameter=value…)`, not yet started."""
    if "store" in request.fixturenames:
        request.getfixturevalue("store")  # which then outlives the servers
    servers = request.node.servers = []
    # Not under tmp_path: the path of a unix socket has 108 bytes at most.
    root = Path(tempfile.mkdtemp(prefix="hypernbd-"))

    def make(volume, nbdkit_options=(), env=None, **parameters) -> Server:
        directory = root / str(len(servers) + 1)
        server = Server(nbdkit, volume, directory, parameters, list(nbdkit_options), dict(env or {}))
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.dispose()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def proxy(minio):
    """A proxy before the session's MinIO, which fails what it is told to."""
    made = FaultyProxy(minio.endpoint)
    yield made
    made.close()


@pytest.fixture
def server(make_volume, make_server) -> Server:
    """A started server of a fresh 64 MiB volume with 64 KiB blocks."""
    return make_server(make_volume()).start()


@pytest.fixture
def seed() -> int:
    """The seed of a random test: new each run, printed with a failure, set by HYPERNBD_SEED to repeat one."""
    value = int(os.environ.get("HYPERNBD_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"HYPERNBD_SEED={value}")
    return value
