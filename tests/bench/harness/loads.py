"""Loads and what they measure: fio's nbd engine, nbdcopy, raw S3 requests."""

import json
import os
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import programs

MIB = 1 << 20
GIB = 1 << 30
LIMIT_S = 1800  # of any one load: far above the longest, so that a server that hangs ends the run


class LoadFailed(Exception):
    """A load ended with an error; the message holds what it said."""


@dataclass(frozen=True)
class Sample:
    """One measured figure, with the latencies of the requests behind it where they are known."""

    value: float
    unit: str
    p50_ms: float | None = None
    p99_ms: float | None = None
    worst_ms: float | None = None

    def p50(self) -> "Sample":
        """The same sample with the median latency as its figure."""
        return self.of(self.p50_ms)

    def p99(self) -> "Sample":
        """The same sample with the 99th percentile of the latency as its figure."""
        return self.of(self.p99_ms)

    def worst(self) -> "Sample":
        """The same sample with the worst latency as its figure."""
        return self.of(self.worst_ms)

    def of(self, value: float, unit: str = "ms") -> "Sample":
        """Another figure with the same latencies."""
        return Sample(value, unit, self.p50_ms, self.p99_ms, self.worst_ms)


def of_latencies(values_ms: list[float]) -> Sample:
    """The median of latencies as the figure, by nearest rank."""
    ordered = sorted(values_ms)
    p50, p99 = (ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in (50, 99))
    return Sample(p50, "ms", p50, p99, ordered[-1])


@dataclass(frozen=True)
class Series:
    """A figure over time: (seconds since the start, value)."""

    name: str
    unit: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Fio:
    """Result of one fio job. Throughput counts the last flush where the job has `end_fsync`."""

    read: dict
    write: dict
    sync: dict

    @property
    def user_bytes(self) -> int:
        """Bytes read and written."""
        return self.read["io_bytes"] + self.write["io_bytes"]

    def mb_per_s(self) -> Sample:
        """Bytes read and written per second, in 1,000,000 bytes."""
        return self._sample((self.read["bw_bytes"] + self.write["bw_bytes"]) / 1e6, "MB/s")

    def iops(self) -> Sample:
        """Reads and writes per second."""
        return self._sample(self.read["iops"] + self.write["iops"], "iops")

    def write_and_flush(self) -> Sample:
        """Latency of a write and the flush after it: the sum of the two, percentile by percentile."""
        write, flush = _latencies(self.write["clat_ns"]), _latencies(self.sync["lat_ns"])
        both = [one + other for one, other in zip(write, flush)]
        return Sample(both[0], "ms", *both)

    def elapsed_s(self) -> float:
        """How long the job took, the last flush included."""
        return self.user_bytes / (self.read["bw_bytes"] + self.write["bw_bytes"])

    def _sample(self, value: float, unit: str) -> Sample:
        sides = [_latencies(side["clat_ns"]) for side in (self.read, self.write) if side["total_ios"]]
        return Sample(value, unit, *(max(pair) for pair in zip(*sides)))


def fio(uri: str, **options) -> Fio:
    """Runs one fio job on the nbd engine; option names and values are fio's own."""
    return _fio(ioengine="nbd", uri=uri, **options)


def fio_file(path: Path, more_env: dict | None = None, **options) -> Fio:
    """Runs one fio job on a file of this machine; option names and values are fio's own."""
    return _fio(more_env, ioengine="psync", filename=path, **options)


def _fio(more_env: dict | None = None, **options) -> Fio:
    command = [programs.system("fio"), "--name=bench", "--output-format=json", "--group_reporting"]
    command += [f"--{name}={value}" for name, value in options.items()]
    env = os.environ | (more_env or {})
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=env)
    start = result.stdout.find("{")  # the engine writes a line of its own first
    if result.returncode or start < 0:
        raise LoadFailed(f"fio failed: {result.stderr[-2000:] or result.stdout[-2000:]}")
    job = json.loads(result.stdout[start:])["jobs"][0]
    if job["error"]:
        raise LoadFailed(f"fio: error {job['error']}: {result.stderr[-2000:]}")
    return Fio(job["read"], job["write"], job["sync"])


@contextmanager
def fio_meanwhile(uri: str, **options):
    """Runs a fio job beside the `with` block, which gets its future; leaving the block waits for the job's end."""
    with ThreadPoolExecutor(1) as pool:
        job: Future[Fio] = pool.submit(fio, uri, **options)
        yield job


def fio_log(directory: Path, kind: str, interval_ms: int = 250) -> dict:
    """Options that make a fio job log `bw` or, the worst of each interval, `clat` in a directory."""
    options = {f"write_{'lat' if kind == 'clat' else kind}_log": directory / "fio", "per_job_logs": 0}
    return options | {"log_avg_msec": interval_ms, "log_max_value": int(kind == "clat")}


def fio_series(directory: Path, kind: str, name: str) -> Series:
    """What a job with `fio_log` logged: MB/s, or ms."""
    unit, scale = {"bw": ("MB/s", 1024 / 1e6), "clat": ("ms", 1e-6)}[kind]
    lines = (directory / f"fio_{kind}.log").read_text().splitlines()
    pairs = [line.split(",")[:2] for line in lines if line]
    return Series(name, unit, [(int(at_ms) / 1e3, int(value) * scale) for at_ms, value in pairs])


def fill(uri: str, size_bytes: int) -> Fio:
    """Writes every byte once, in order, and flushes."""
    return fio(uri, rw="write", bs="1M", iodepth=16, size=size_bytes, end_fsync=1)


def nbdcopy(source: str, destination: str, size_bytes: int) -> Sample:
    """Copies with nbdcopy, flushing at the end, and times the whole command."""
    start = time.monotonic()
    command([programs.system("nbdcopy"), "--flush", source, destination])
    return Sample(size_bytes / 1e6 / (time.monotonic() - start), "MB/s")


def connect(uri: str):
    """A libnbd connection."""
    handle = nbd().NBD()
    handle.connect_uri(uri)
    return handle


def nbd():
    """The libnbd module."""
    try:
        import nbd
    except ImportError:
        raise programs.Missing("python3-libnbd is not installed: run scripts/install-deps.sh") from None
    return nbd


def command(words: list, **options) -> str:
    """Runs a program that must succeed; returns what it printed. Options are those of `subprocess.run`."""
    words = [str(word) for word in words]
    result = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, **options)
    if result.returncode:
        raise LoadFailed(f"{' '.join(words)}: status {result.returncode}: {result.stderr[-2000:]}")
    return result.stdout


@dataclass(frozen=True)
class Raw:
    """Result of plain S3 requests."""

    report: dict

    def mb_per_s(self) -> Sample:
        """Bytes of payload per second, in 1,000,000 bytes."""
        return self._sample(self.report["mb_per_s"], "MB/s")

    def iops(self) -> Sample:
        """Requests per second."""
        return self._sample(self.report["requests_per_s"], "iops")

    def p50(self) -> Sample:
        """Median latency of a request."""
        return self._sample(self.report["latency"]["p50_ms"], "ms")

    def p99(self) -> Sample:
        """99th percentile of the latency of a request."""
        return self._sample(self.report["latency"]["p99_ms"], "ms")

    def worst(self) -> Sample:
        """Longest latency of a request."""
        return self._sample(self.report["latency"]["worst_ms"], "ms")

    def _sample(self, value: float, unit: str) -> Sample:
        latency = self.report["latency"]
        return Sample(value, unit, latency["p50_ms"], latency["p99_ms"], latency["worst_ms"])


def raw_s3(operation: str, env: dict, **options) -> Raw:
    """Runs the raw S3 load; options are those of `raw-s3`, with underscores."""
    words = [programs.built("raw-s3"), operation]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return Raw(json.loads(command(words, env=env)))


def _latencies(nanoseconds: dict) -> tuple[float, float, float]:
    percentile, worst = nanoseconds["percentile"], nanoseconds["max"]
    # fio rounds percentiles up to the next of its bins, which may lie above the worst.
    return tuple(min(value, worst) / 1e6 for value in (percentile["50.000000"], percentile["99.000000"], worst))
