"""Loads and what they measure: fio's nbd engine, nbdcopy, raw S3 requests."""

import json
import subprocess
import time
from dataclasses import dataclass

from . import programs

MIB = 1 << 20
GIB = 1 << 30


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
        return Sample(self.p50_ms, "ms", self.p50_ms, self.p99_ms, self.worst_ms)

    def worst(self) -> "Sample":
        """The same sample with the worst latency as its figure."""
        return Sample(self.worst_ms, "ms", self.p50_ms, self.p99_ms, self.worst_ms)


@dataclass(frozen=True)
class Fio:
    """Result of one fio job. Throughput counts the last flush where the job has `end_fsync`."""

    read: dict
    write: dict
    sync: dict

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

    def _sample(self, value: float, unit: str) -> Sample:
        sides = [_latencies(side["clat_ns"]) for side in (self.read, self.write) if side["total_ios"]]
        return Sample(value, unit, *(max(pair) for pair in zip(*sides)))


def fio(uri: str, **options) -> Fio:
    """Runs one fio job on the nbd engine; option names and values are fio's own."""
    command = [programs.system("fio"), "--name=bench", "--ioengine=nbd", f"--uri={uri}", "--output-format=json"]
    command += [f"--{name}={value}" for name, value in options.items()]
    result = subprocess.run(command, capture_output=True, text=True)
    start = result.stdout.find("{")  # the engine writes a line of its own first
    if result.returncode or start < 0:
        raise LoadFailed(f"fio failed: {result.stderr[-2000:] or result.stdout[-2000:]}")
    job = json.loads(result.stdout[start:])["jobs"][0]
    if job["error"]:
        raise LoadFailed(f"fio: error {job['error']}: {result.stderr[-2000:]}")
    return Fio(job["read"], job["write"], job["sync"])


def fill(uri: str, size_bytes: int) -> Fio:
    """Writes every byte once, in order, and flushes."""
    return fio(uri, rw="write", bs="1M", iodepth=16, size=size_bytes, end_fsync=1)


def nbdcopy(source: str, destination: str, size_bytes: int) -> Sample:
    """Copies with nbdcopy, flushing at the end, and times the whole command."""
    start = time.monotonic()
    command = [programs.system("nbdcopy"), "--flush", source, destination]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise LoadFailed(f"nbdcopy failed: {result.stderr[-2000:]}")
    return Sample(size_bytes / 1e6 / (time.monotonic() - start), "MB/s")


def connect(uri: str):
    """A libnbd connection."""
    try:
        import nbd
    except ImportError:
        raise programs.Missing("python3-libnbd is not installed: run scripts/install-deps.sh") from None
    handle = nbd.NBD()
    handle.connect_uri(uri)
    return handle


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

    def _sample(self, value: float, unit: str) -> Sample:
        latency = self.report["latency"]
        return Sample(value, unit, latency["p50_ms"], latency["p99_ms"], latency["worst_ms"])


def raw_s3(operation: str, env: dict, **options) -> Raw:
    """Runs the raw S3 load; options are those of `raw-s3`, with underscores."""
    command = [programs.built("raw-s3"), operation]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    if result.returncode:
        raise LoadFailed(f"raw-s3 failed: {result.stderr[:2000]}")
    return Raw(json.loads(result.stdout))


def _latencies(nanoseconds: dict) -> tuple[float, float, float]:
    percentile = nanoseconds["percentile"]
    chosen = (percentile["50.000000"], percentile["99.000000"], nanoseconds["max"])
    return tuple(value / 1e6 for value in chosen)
