"""The S3 servers that the end-to-end tests and `tests/compat/run.py` can start, by the names of their programs."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POLICIES = "keys that may do what a policy says and no more (AssumeRole)"
UNSIGNED = "buckets that take unsigned requests of every kind by their policy"
LIFECYCLE = "lifecycle rules"
ENCRYPTION = "encryption with a key of its own (SSE-S3, SSE-KMS)"
Command = tuple[list[str], dict[str, str]]


@dataclass(frozen=True)
class Start:
    """What a server is started with: its program, a port of the loopback interface, an access key and its secret, an empty directory
    that it may fill (again the same after a stop), and a way to get further free ports."""

    program: str
    port: int
    access_key: str
    secret_key: str
    data: Path
    free_port: Callable[[], int]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


def _minio(start: Start) -> Command:
    env = {"MINIO_ROOT_USER": start.access_key, "MINIO_ROOT_PASSWORD": start.secret_key}
    # It would close what was idle for half a minute; a proxy before it learns of that by a failed request.
    env |= {"MINIO_BROWSER": "off", "MINIO_UPDATE": "off", "MINIO_IDLE_TIMEOUT": "1h"}
    return [start.program, "server", "--quiet", "--address", start.address, str(start.data)], env


def _versitygw(start: Start) -> Command:
    keys = ["--access", start.access_key, "--secret", start.secret_key]
    objects, versions = start.data / "objects", start.data / "versions"
    for directory in (objects, versions):
        directory.mkdir(exist_ok=True)
    return [start.program, "--port", start.address, *keys, "--quiet", "posix", f"--versioning-dir={versions}", str(objects)], {}


def _seaweedfs(start: Start) -> Command:
    config = start.data / "s3.json"
    keys = [{"accessKey": start.access_key, "secretKey": start.secret_key}]
    config.write_text(json.dumps({"identities": [{"name": "tests", "credentials": keys, "actions": ["Admin"]}]}))
    # Each port has another one for gRPC, which would be 10,000 above it; what else it would serve has ports of its own, and is off.
    parts = [f"-{part}.port{kind}={start.free_port()}" for part in ("master", "volume", "filer") for kind in ("", ".grpc")]
    room = ["-master.volumeSizeLimitMB=1024", "-volume.max=64", "-master.telemetry=false"]
    s3 = ["-s3", f"-s3.port={start.port}", f"-s3.port.grpc={start.free_port()}", f"-s3.config={config}"]
    s3 += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    return [start.program, "server", "-ip=127.0.0.1", f"-dir={start.data}", *parts, *room, *s3], {}


def _s3s_fs(start: Start) -> Command:
    keys = ["--access-key", start.access_key, "--secret-key", start.secret_key]
    return [start.program, "--host", "127.0.0.1", "--port", str(start.port), *keys, str(start.data)], {}


def _moto(start: Start) -> Command:
    return [start.program, "-H", "127.0.0.1", "-p", str(start.port)], {}


def _gofakes3(start: Start) -> Command:
    return [start.program, "-backend", "memory", "-host", start.address], {}


@dataclass(frozen=True)
class S3Server:
    """An S3 server that can be started. `version` are the arguments by which it tells its version, if it does. Of what the tests
    can ask of a store beside S3's requests it has what `has` names."""

    name: str
    program: str
    command: Callable[[Start], Command]
    version: tuple[str, ...] | None = None
    has: frozenset[str] = frozenset()


SERVERS = [
    S3Server("MinIO", "minio", _minio, ("--version",), frozenset([POLICIES, ENCRYPTION, UNSIGNED, LIFECYCLE])),
    S3Server("Versity Gateway", "versitygw", _versitygw, ("--version",)),
    S3Server("SeaweedFS", "weed", _seaweedfs, ("version",), frozenset([LIFECYCLE])),
    S3Server("s3s-fs", "s3s-fs", _s3s_fs, ("--version",)),
    S3Server("Moto", "moto_server", _moto),
    S3Server("GoFakeS3", "gofakes3", _gofakes3),
]


def server_of(program: str) -> S3Server:
    """The server that a program is, by its file's name, which may go on with a release's."""
    name = Path(program).name
    for server in SERVERS:
        if name == server.program or name.startswith(f"{server.program}-"):
            return server
    known = ", ".join(server.program for server in SERVERS)
    raise AssertionError(f"{program} is none of the S3 servers that the tests can start: {known}")


def program_to_test() -> str:
    """The S3 server that the tests are to run on: $HYPERNBD_TEST_STORE, a program of `SERVERS` by its name or its path, or else
    MinIO, from $MINIO as `make e2e` sets it or from PATH."""
    if other := os.environ.get("HYPERNBD_TEST_STORE"):
        program = shutil.which(other)
        assert program, f"HYPERNBD_TEST_STORE={other} is no program"
        return program
    program = os.environ.get("MINIO") or shutil.which("minio")
    assert program, "name the MinIO server in MINIO, or run the tests by `make e2e`"
    return program
