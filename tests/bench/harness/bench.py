"""The systems of one run: the store behind its proxy, volumes served by the plugin, and the two ceilings."""

import contextlib
import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import boto3

from . import programs
from .loads import MIB, Raw, Sample, raw_s3
from .processes import Minio, Nbdkit, Proxy

BUCKET = "bench"
REGION = "us-east-1"


@dataclass(frozen=True)
class Options:
    """How to measure. Sizes and times are those of a full run; `quick` quarters them."""

    delay_ms: float = 10
    line_mb_per_s: int = 250
    quick: bool = False
    long: bool = False
    direct_file: bool = False
    payload_signing: str = "unsigned"


class Volume:
    """A fresh volume of the store. Serving it again is a fresh server process: nothing is cached."""

    def __init__(self, bench: "Bench", url: str, prefix: str):
        self._bench = bench
        self.url = url
        self._prefix = prefix

    def serve(self, **parameters) -> Nbdkit:
        """nbdkit with the plugin on this volume; parameters are the plugin's own."""
        bench = self._bench
        words = [f"backend_url={self.url}", *bench.store_parameters()]
        words += [f"{key}={value}" for key, value in parameters.items()]
        return Nbdkit(bench.nbdkit, bench.directory, programs.built("libhypernbd.so"), words, bench.env)

    def stored_bytes(self) -> int:
        """Bytes of all objects of the volume, its catalogue included."""
        return self._bench.stored_bytes(self._prefix)


class Bench:
    """One run. Use it as a context manager: it starts the store and ends every process it started."""

    def __init__(self, options: Options, directory: Path):
        self.options = options
        self.directory = directory
        self.nbdkit = programs.nbdkit()
        self.block_size = 0
        self.env = dict(
            os.environ,
            AWS_ACCESS_KEY_ID="benchmark",
            AWS_SECRET_ACCESS_KEY="benchmark-secret",
            AWS_REGION=REGION,
            MINIO_ROOT_USER="benchmark",
            MINIO_ROOT_PASSWORD="benchmark-secret",
        )
        self.env.setdefault("RUST_LOG", "warn")
        self._numbers = itertools.count(1)
        self._kept: dict = {}
        self._stack = contextlib.ExitStack()
        self._s3 = None
        self._endpoint = ""

    def __enter__(self):
        if not self.options.direct_file:
            with contextlib.ExitStack() as stack:
                minio = stack.enter_context(Minio(programs.minio(), self.directory, self.env))
                proxy = Proxy(
                    programs.built("delay-proxy"),
                    self.directory,
                    minio.port,
                    self.options.delay_ms,
                    self.options.line_mb_per_s,
                )
                self._endpoint = stack.enter_context(proxy).endpoint
                self._s3 = boto3.client(
                    "s3",
                    endpoint_url=minio.endpoint,
                    region_name=REGION,
                    aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
                    aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
                )
                self._s3.create_bucket(Bucket=BUCKET)
                self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def size(self, full_bytes: int) -> int:
        """A size for this run: the full one, or a quarter of it in a quick run."""
        return full_bytes // 4 if self.options.quick else full_bytes

    def seconds(self, full_s: float) -> float:
        """A time for this run: the full one, or a quarter of it, at least 2 s, in a quick run."""
        return max(2, full_s / 4) if self.options.quick else full_s

    @contextlib.contextmanager
    def volume(self, size_bytes: int):
        """A new volume of the run's block size, removed at the end."""
        prefix = f"volume-{next(self._numbers)}"
        if self.options.direct_file:
            base = self.directory / prefix
            url = f"file://{base}/volume/"
            base.mkdir()
        else:
            url = f"s3://{BUCKET}/{prefix}/volume/"
        command = [programs.built("hypernbd"), "create", url, "--size", size_bytes]
        if self.block_size:
            command += ["--block-size", self.block_size]
        options = [f"--{parameter.replace('_', '-')}" for parameter in self.store_parameters()]
        subprocess.run([str(word) for word in command + options], check=True, env=self.env, stdout=subprocess.DEVNULL)
        try:
            yield Volume(self, url, prefix)
        finally:
            self._remove(prefix)

    def image(self, size_bytes: int) -> Path:
        """A file of random bytes, made once a run."""
        path = self.directory / f"image-{size_bytes}"
        if not path.exists():
            with open(path, "wb") as file:
                for _ in range(size_bytes // MIB):
                    file.write(os.urandom(MIB))
        return path

    def memory(self, size_bytes: int) -> Nbdkit:
        """nbdkit's memory plugin on the same nbdkit: the ceiling of the transport."""
        return Nbdkit(self.nbdkit, self.directory, "memory", [f"size={size_bytes}"])

    def memory_ceiling(self, name: str, size_bytes: int, load) -> object:
        """`load(server)` on the memory plugin, measured once a run for each name."""
        key = ("memory", name)
        if key not in self._kept:
            with self.memory(size_bytes) as server:
                self._kept[key] = load(server)
        return self._kept[key]

    def raw(self, operation: str, size_bytes: int, concurrency: int) -> Raw | None:
        """Plain S3 requests through the same proxy: the ceiling of the store. None without S3."""
        if self.options.direct_file:
            return None
        key = (operation, size_bytes, concurrency)
        if key not in self._kept:
            self._kept[key] = raw_s3(
                operation,
                self.env,
                endpoint=self._endpoint,
                bucket=BUCKET,
                prefix="raw",
                size_bytes=size_bytes,
                concurrency=concurrency,
                seconds=self.seconds(5),
                payload_signing=self.options.payload_signing,
            )
            self._remove("raw")
        return self._kept[key]

    def store_parameters(self) -> list[str]:
        """How the plugin and the command line reach the store, as key=value."""
        if self.options.direct_file:
            return []
        signing = {"signed": "always", "unsigned": "never"}[self.options.payload_signing]
        return [f"endpoint_url={self._endpoint}", "path_style=true", f"payload_signing={signing}"]

    def stored_bytes(self, prefix: str) -> int:
        """Bytes of all objects, or files, below a prefix."""
        if self._s3 is None:
            files = (self.directory / prefix).rglob("*")
            return sum(file.stat().st_size for file in files if file.is_file())
        return sum(entry["Size"] for entry in self._objects(prefix))

    def _objects(self, prefix: str):
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix + "/")
        for page in pages:
            yield from page.get("Contents", [])

    def _remove(self, prefix: str) -> None:
        if self._s3 is None:
            shutil.rmtree(self.directory / prefix, ignore_errors=True)
            return
        keys = [{"Key": entry["Key"]} for entry in self._objects(prefix)]
        for start in range(0, len(keys), 1000):
            self._s3.delete_objects(Bucket=BUCKET, Delete={"Objects": keys[start : start + 1000], "Quiet": True})


def figure(raw: Raw | None, name: str) -> Sample | None:
    """One figure of the raw ceiling, where there is one."""
    return None if raw is None else getattr(raw, name)()
