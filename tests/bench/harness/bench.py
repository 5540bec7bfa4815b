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
from .cost import Cost, Traffic, read_traffic
from .loads import MIB, LoadFailed, Raw, Sample, fill, raw_s3
from .processes import Minio, Nbdkit, Proxy
from .report import Target

BUCKET = "bench"
REGION = "us-east-1"
OPEN_LINE_MB_PER_S = 1000  # what a line without a limit is taken to carry, for the room on the disk
SLOW_SYNC_US = 1000
SLOW_JOURNAL = "journal, syncs 1 ms slower"
QUICK = 16  # a quick run divides sizes and times by this


@dataclass(frozen=True)
class Options:
    """How to measure. Sizes and times are those of a full run; `quick` cuts them to a smoke test's."""

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

    def serve(self, wait: bool = True, more_env: dict | None = None, **parameters) -> Nbdkit:
        """nbdkit with the plugin on this volume; parameters are the plugin's own."""
        bench = self._bench
        words = [f"backend_url={self.url}", *bench.store_parameters()]
        words += [f"{key}={value}" for key, value in parameters.items()]
        return Nbdkit(bench.nbdkit, bench.directory, bench.plugin, words, bench.env | (more_env or {}), wait)

    def stored_bytes(self) -> int:
        """Bytes of all objects of the volume, its catalogue included."""
        return self._bench.stored_bytes(self._prefix)


class Bench:
    """One run. Use it as a context manager: it starts the store and ends every process it started."""

    def __init__(self, options: Options, directory: Path):
        self.options = options
        self.directory = directory
        self.nbdkit = programs.nbdkit()
        self.plugin = programs.built("libhypernbd.so")
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
        self._known = programs.plugin_parameters(self.nbdkit, self.plugin)
        self._numbers = itertools.count(1)
        self._kept: dict = {}
        self._stack = contextlib.ExitStack()
        self._s3 = None
        self._proxy: Proxy | None = None

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
                self._proxy = stack.enter_context(proxy)
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
        """A size for this run: the full one, or a sixteenth of it, in whole MiB, in a quick run."""
        return max(MIB, full_bytes // QUICK) // MIB * MIB if self.options.quick else full_bytes

    def seconds(self, full_s: float) -> float:
        """A time for this run: the full one, or a sixteenth of it, at least 1 s, in a quick run."""
        return max(1, full_s / QUICK) if self.options.quick else full_s

    def count(self, full: int) -> int:
        """A number of repetitions for this run: the full one, or a sixteenth of it, at least 1, in a quick run."""
        return max(1, full // QUICK) if self.options.quick else full

    def round_trip_ms(self) -> float | None:
        """The delay to the store and back; None where there is none."""
        return None if self.options.direct_file else 2 * self.options.delay_ms or None

    def in_round_trips(self, sample: Sample) -> Sample:
        """A sample in ms as a multiple of the round trip; as it is where there is none."""
        round_trip_ms = self.round_trip_ms()
        return sample.of(sample.value / round_trip_ms, "RTT") if round_trip_ms else sample

    def round_trips_at_most(self, number: float) -> Target | None:
        """A bound on a figure in round trips; None where there is none."""
        return Target("value", at_most=number) if self.round_trip_ms() else None

    def parameters_if_known(self, **parameters) -> dict:
        """Those of the parameters that the plugin lists in its help."""
        return {key: value for key, value in parameters.items() if key in self._known}

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
        settle()
        try:
            yield Volume(self, url, prefix)
        finally:
            self._remove(prefix)

    @contextlib.contextmanager
    def filled_volume(self, size_bytes: int, filled_bytes: int | None = None):
        """A new volume, its first `filled_bytes` (or all of it) written in order by a server that has ended."""
        with self.volume(size_bytes) as volume:
            with volume.serve() as server:
                fill(server.uri, filled_bytes or size_bytes)
            settle()
            yield volume

    def image(self, size_bytes: int) -> Path:
        """A file of random bytes, made once a run."""
        path = self.directory / f"image-{size_bytes}"
        if not path.exists():
            with open(path, "wb") as file:
                for _ in range(size_bytes // MIB):
                    file.write(os.urandom(MIB))
        return path

    def scratch(self) -> Path:
        """A new empty directory of the run."""
        path = self.directory / f"scratch-{next(self._numbers)}"
        path.mkdir()
        return path

    def wal_urls(self) -> dict[str, str]:
        """A place for a new log of each kind, by its name: in the store, where that is S3, and in a directory."""
        urls = {"journal": f"file://{self.scratch()}/journal/"}
        if self._proxy is not None:
            urls = {"S3 log": f"s3://{BUCKET}/log-{next(self._numbers)}/", **urls}
        return urls

    def flush_cases(self) -> list[tuple[str, str, dict]]:
        """Where a flush can go that is logged: name, URL of a new log, and what the environment needs.

        A journal twice: on this disk as it is, and as if it synced a millisecond slower.
        """
        cases = [(kind, url, {}) for kind, url in self.wal_urls().items()]
        slow = {"LD_PRELOAD": str(self.once("slow sync", self._slow_sync)), "SLOW_SYNC_US": str(SLOW_SYNC_US)}
        return [*cases, (SLOW_JOURNAL, self.wal_urls()["journal"], slow)]

    def _slow_sync(self) -> Path:
        return programs.compiled("slow_sync.c", self.directory)

    def memory(self, size_bytes: int, wait: bool = True) -> Nbdkit:
        """nbdkit's memory plugin on the same nbdkit: the ceiling of the transport."""
        return Nbdkit(self.nbdkit, self.directory, "memory", [f"size={size_bytes}"], wait=wait)

    def once(self, name: str, measure) -> object:
        """What `measure()` returns, called once a run for each name."""
        if name not in self._kept:
            self._kept[name] = measure()
        return self._kept[name]

    def memory_ceiling(self, name: str, size_bytes: int, load) -> object:
        """`load(server)` on the memory plugin, measured once a run for each name."""

        def measured():
            with self.memory(size_bytes) as server:
                return load(server)

        return self.once(f"memory {name}", measured)

    def raw(self, operation: str, size_bytes: int, concurrency: int) -> Raw | None:
        """Plain S3 requests through the same proxy: the ceiling of the store. None without S3."""

        def measured():
            settle()
            return self.raw_now(operation, size_bytes, concurrency, self.seconds(5))

        return self.once(f"raw {operation} {size_bytes} x {concurrency}", measured)

    def raw_now(
        self, operation: str, size_bytes: int, concurrency: int, seconds: float, prefix: str = "raw", **options
    ) -> Raw | None:
        """As `raw`, but measured in any case and at once; more options of `raw-s3` may follow."""
        if self._proxy is None:
            return None
        try:
            return raw_s3(
                operation,
                self.env,
                endpoint=self._proxy.endpoint,
                bucket=BUCKET,
                prefix=prefix,
                size_bytes=size_bytes,
                concurrency=concurrency,
                seconds=seconds,
                payload_signing=self.options.payload_signing,
                **options,
            )
        finally:
            self._remove(prefix)

    def traffic(self) -> Traffic | None:
        """What has passed the proxy so far; None without one."""
        return read_traffic(self._proxy.control) if self._proxy else None

    def measure(self, server: Nbdkit, load, user_bytes: int | None = None) -> tuple:
        """`load(server)` and what it cost. The bytes of the client are the result's own unless they are given."""
        before = self.traffic()
        result = load(server)
        return result, self.cost_since(before, server, result.user_bytes if user_bytes is None else user_bytes)

    def cost_since(self, before: Traffic | None, server: Nbdkit, user_bytes: int) -> Cost:
        """The cost of what a server did since `before`, an earlier `traffic()`."""
        traffic = self.traffic().since(before) if before else None
        return Cost(user_bytes, server.peak_rss_bytes(), traffic)

    def check_room(self, seconds: float, more_bytes: int = 0) -> None:
        """The store keeps every checkpoint: refuses a load that in its time could fill the disk through the line."""
        needed_bytes = (self.options.line_mb_per_s or OPEN_LINE_MB_PER_S) * 1e6 * seconds + more_bytes
        free_bytes = shutil.disk_usage(self.directory).free * 0.9
        if needed_bytes > free_bytes:
            raise LoadFailed(
                f"up to {needed_bytes / 1e9:.0f} GB could be stored, and the disk of {self.directory} has room for "
                f"{free_bytes / 1e9:.0f} GB: use a smaller --line, or set TMPDIR to a larger disk"
            )

    def store_parameters(self) -> list[str]:
        """How the plugin and the command line reach the store, as key=value."""
        if self._proxy is None:
            return []
        signing = {"signed": "always", "unsigned": "never"}[self.options.payload_signing]
        return [f"endpoint_url={self._proxy.endpoint}", "path_style=true", f"payload_signing={signing}"]

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


def settle() -> None:
    """Has the disk write what was left to it: whatever is measured next would pay for it."""
    os.sync()


def figure(raw: Raw | None, name: str) -> Sample | None:
    """One figure of the raw ceiling, where there is one."""
    return None if raw is None else getattr(raw, name)()
