"""The two kinds of store a volume lives on, seen alike: fresh URLs, credentials, and what is stored."""

import contextlib
import itertools
import os
import random
import signal
import socket
from pathlib import Path

import boto3
import pytest
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError

from .process import spawn, wait_for
from .s3_servers import POLICIES, Start, server_of

BUCKET = "hypernbd-e2e"
REGION = "us-east-1"
MINIO_LIMIT_S = 6 * 3600


# Below those that Linux gives to whoever asks for any port, so that a port stays free until it is used, and while a server on it is
# down; and a slice for each of the processes that run tests at the same time.
_PORTS_EACH = 1000
_first_port = 12_000 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20 * _PORTS_EACH
_ports = itertools.cycle(random.SystemRandom().sample(range(_first_port, _first_port + _PORTS_EACH), _PORTS_EACH))


def free_port() -> int:
    """A TCP port on the loopback interface that is free now, and was not given lately."""
    for port in itertools.islice(_ports, _PORTS_EACH):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no port from {_first_port} on is free")


class Minio:
    """An S3 server, MinIO unless the program is another of `SERVERS`, with a data directory, a port and credentials of its own."""

    def __init__(self, program: str, directory: Path, more_env: dict[str, str] | None = None):
        self.more_env = more_env or {}
        self.program = program
        self.kind = server_of(program)
        self.directory = directory
        self.port = free_port()
        self.access_key = "e2e-user"
        self.secret_key = os.urandom(12).hex()
        self.log = directory / "minio.log"
        self.process = None
        self.front = None
        (directory / "data").mkdir(parents=True)

    @property
    def direct(self) -> str:
        """The server's own address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def endpoint(self) -> str:
        """Where volumes find the server: behind its `front`, a proxy, if it has one."""
        return self.front.endpoint if self.front else self.direct

    def client(self):
        """A boto3 client of this server, for a test's own looks and changes."""
        return boto3.client(
            "s3",
            endpoint_url=self.direct,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=60, retries={"max_attempts": 1}
            ),
        )

    def needs(self, what: str) -> None:
        """Skips a test that asks more of a store than this one has."""
        if what not in self.kind.has:
            pytest.skip(f"{self.kind.name} has no {what}")

    def credentials_with(self, policy: str) -> dict[str, str]:
        """Credentials of a session that may do what the policy says and no more."""
        self.needs(POLICIES)
        sts = boto3.client(
            "sts",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )
        session = sts.assume_role(RoleArn="arn:aws:iam::0:role/any", RoleSessionName="test", Policy=policy)
        credentials = session["Credentials"]
        return {
            "AWS_ACCESS_KEY_ID": credentials["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": credentials["SecretAccessKey"],
            "AWS_SESSION_TOKEN": credentials["SessionToken"],
        }

    def start(self) -> None:
        """Starts the server, again on the same port and data after a stop, and waits until it answers."""
        start = Start(self.program, self.port, self.access_key, self.secret_key, self.directory / "data", free_port)
        command, env = self.kind.command(start)
        env = {**env, "HOME": str(self.directory), **self.more_env}
        self.process = spawn(command, self.log, env=env, limit_s=MINIO_LIMIT_S)
        wait_for(self._answers, f"{self.kind.name} to answer", limit_s=240)
        existing = [bucket["Name"] for bucket in self.client().list_buckets()["Buckets"]]
        if BUCKET not in existing:
            self.client().create_bucket(Bucket=BUCKET)

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"{self.program} ended:\n{self.log.read_text()}"
        try:
            self.client().list_buckets()
            return True
        except (BotoCoreError, ClientError):
            return False

    def kill(self) -> None:
        """Stops the server at once; its data stays."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        if self.process:
            self.process.wait()
        self.process = None

    def pause(self) -> None:
        """Leaves the server connected but silent."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets a paused server go on."""
        self.process.send_signal(signal.SIGCONT)


def profile(directory, minio) -> dict[str, str]:
    """The environment with a profile `faraway` for another store."""
    config, keys = directory / "config", directory / "credentials"
    config.write_text(f"[profile faraway]\nregion = us-east-1\nendpoint_url = {minio.endpoint}\n")
    keys.write_text(f"[faraway]\naws_access_key_id = {minio.access_key}\naws_secret_access_key = {minio.secret_key}\n")
    return {"AWS_CONFIG_FILE": str(config), "AWS_SHARED_CREDENTIALS_FILE": str(keys)}


class S3Store:
    """Volumes in a bucket of a MinIO server."""

    kind = "s3"
    _names = itertools.count(1)

    def __init__(self, minio: Minio):
        self.minio = minio
        self.prefix = f"test-{next(self._names)}"
        self.parameters = {"endpoint_url": minio.endpoint, "region": REGION}
        self.env = {
            "AWS_ACCESS_KEY_ID": minio.access_key,
            "AWS_SECRET_ACCESS_KEY": minio.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }
        self.cli_options = ["--endpoint-url", minio.endpoint, "--region", REGION]

    def url(self, name: str) -> str:
        """The URL of the volume `name` of this test."""
        return f"s3://{BUCKET}/{self.prefix}/{name}/"

    def objects(self) -> dict[str, str]:
        """Every object of this test: key to a tag that changes when the object does."""
        pages = self.minio.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self.prefix + "/")
        return {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", [])}

    def objects_of_volumes(self) -> set[str]:
        """The keys of every object of every volume."""
        return set(self.objects())

    def clear(self) -> None:
        """Removes every object of this test."""
        client = self.minio.client()
        keys = [{"Key": key} for key in self.objects()]
        for start in range(0, len(keys), 1000):
            client.delete_objects(Bucket=BUCKET, Delete={"Objects": keys[start : start + 1000], "Quiet": True})


class FileStore:
    """Volumes in a local directory."""

    kind = "file"
    # The local store's own files, which stay in a directory when its volume is deleted.
    own_files = {"hypernbd-store", "lock"}
    parameters: dict[str, str] = {}
    env: dict[str, str] = {}
    cli_options: list[str] = []

    def __init__(self, directory: Path):
        self.directory = directory

    def url(self, name: str) -> str:
        """The URL of the volume `name` of this test."""
        return f"file://{self.directory}/{name}/"

    def objects(self) -> dict[str, str]:
        """Every file and directory of this test: path to a tag that changes when it does."""
        found = {}
        for path in sorted(self.directory.rglob("*")):
            try:
                status = path.stat()
            except FileNotFoundError:  # a temporary file of an upload, renamed meanwhile
                continue
            found[str(path.relative_to(self.directory))] = (
                "directory" if path.is_dir() else f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
            )
        return found

    def objects_of_volumes(self) -> set[str]:
        """The paths of every object of every volume."""
        return {
            path
            for path, tag in self.objects().items()
            if tag != "directory" and Path(path).name not in self.own_files
        }
