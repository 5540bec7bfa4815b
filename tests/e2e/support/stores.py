"""The two kinds of store a volume lives on, seen alike: fresh URLs, credentials, and what is stored."""

import itertools
import os
import signal
import socket
from pathlib import Path

import boto3
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError

from .process import spawn, wait_for

BUCKET = "hypernbd-e2e"
REGION = "us-east-1"
MINIO_LIMIT_S = 3600


def free_port() -> int:
    """A TCP port on the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Minio:
    """A MinIO server with a data directory, a port and credentials of its own."""

    def __init__(self, program: str, directory: Path, more_env: dict[str, str] | None = None):
        self.more_env = more_env or {}
        self.program = program
        self.directory = directory
        self.port = free_port()
        self.access_key = "e2e-user"
        self.secret_key = os.urandom(12).hex()
        self.log = directory / "minio.log"
        self.process = None
        (directory / "data").mkdir(parents=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self):
        """A boto3 client of this server."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(
                s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=20, retries={"max_attempts": 1}
            ),
        )

    def start(self) -> None:
        """Starts the server, again on the same port and data after a stop, and waits until it answers."""
        self.process = spawn(
            [self.program, "server", "--quiet", "--address", f"127.0.0.1:{self.port}", str(self.directory / "data")],
            self.log,
            env={
                "MINIO_ROOT_USER": self.access_key,
                "MINIO_ROOT_PASSWORD": self.secret_key,
                "MINIO_BROWSER": "off",
                "MINIO_UPDATE": "off",
                "HOME": str(self.directory),
                **self.more_env,
            },
            limit_s=MINIO_LIMIT_S,
        )
        wait_for(self._answers, "MinIO to answer")
        existing = [bucket["Name"] for bucket in self.client().list_buckets()["Buckets"]]
        if BUCKET not in existing:
            self.client().create_bucket(Bucket=BUCKET)

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"MinIO ended:\n{self.log.read_text()}"
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
