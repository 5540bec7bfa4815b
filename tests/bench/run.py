#!/usr/bin/python3
"""Benchmarks of Hypernbd as ratios to the ceilings of transport and store (docs/benchmarking.md)."""

import argparse
import datetime
import importlib
import json
import os
import platform
import signal
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

import workloads
from harness import programs, report
from harness.bench import Bench, Options

RESULTS = Path(__file__).resolve().parent / "results"
SUFFIXES = {"K": 1 << 10, "M": 1 << 20}


def main() -> int:
    args = arguments()
    if args.list:
        for name in workloads.NAMES:
            print(f"{name:18}{load_workload(name).__doc__.splitlines()[0]}")
        return 0
    # A termination unwinds the stack, so that every process is ended on the way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        if not args.no_build:
            programs.build()
        return run(args)
    except programs.Missing as error:
        sys.exit(str(error))


def run(args) -> int:
    """Measures, shows and stores; the exit status tells whether every workload could be measured."""
    options = Options(args.delay_ms, args.line, args.quick, args.long, args.direct_file, args.payload_signing)
    rows, failures = [], []
    with tempfile.TemporaryDirectory(prefix="hypernbd-bench-") as directory:
        with Bench(options, Path(directory)) as bench:
            about = {"started": now(), "options": asdict(options), "machine": machine(bench.nbdkit)}
            if not programs.nbdkit_is_current(bench.nbdkit):
                say(f"{bench.nbdkit} is older than 1.34: one request of a connection at a time")
            for block_size in args.block_size:
                for name in args.only:
                    bench.block_size = block_size
                    measure(bench, name, rows, failures)
    show(rows, failures, matrix=len(args.block_size) > 1)
    path = store(about | {"load_average_at_end": os.getloadavg()}, rows, failures)
    say(f"results: {path}")
    return 1 if failures else 0


def measure(bench: Bench, name: str, rows: list, failures: list) -> None:
    """Runs one workload; a failure is shown at once and kept for the end."""
    label = f"{name}, block {report.size_text(bench.block_size)}"
    say(label)
    try:
        for row in load_workload(name).run(bench):
            row.workload, row.block_size = name, bench.block_size
            rows.append(row)
    except programs.Missing:
        raise
    except Exception as error:
        failures.append({"workload": name, "block_size": bench.block_size, "error": str(error)})
        traceback.print_exc()


def show(rows: list, failures: list, matrix: bool) -> None:
    """Prints the tables and what could not be measured."""
    if rows:
        print(report.table(rows))
    if rows and matrix:
        print("\n" + report.matrix(rows))
    for failure in failures:
        print(f"FAILED: {failure['workload']}: {failure['error'].splitlines()[0]}")


def store(about: dict, rows: list, failures: list) -> Path:
    """Writes everything as JSON, named after the time of the run."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{about['started'].replace(':', '')}.json"
    content = about | {"rows": [row.as_json() for row in rows], "failures": failures}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def machine(nbdkit: Path) -> dict:
    """What a figure depends on besides the product."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpus": os.cpu_count(),
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.machine(),
        "kernel": platform.release(),
        "nbdkit": programs.version(nbdkit),
        "fio": programs.version(programs.system("fio")),
        "load_average_at_start": os.getloadavg(),
    }


def load_workload(name: str):
    """The module of a workload."""
    return importlib.import_module(f"workloads.{name}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--only", type=names, default=workloads.NAMES, metavar="NAME,…", help="only these workloads")
    add("--list", action="store_true", help="say what the workloads measure, and end")
    add("--block-size", type=sizes, default=[0], metavar="SIZE,…", help="block sizes, for example 4K,64K")
    add("--delay-ms", type=float, default=10, help="delay each way between plugin and store (default 10)")
    add("--line", type=int, default=250, metavar="MB/S", help="rate of the line in all; 0: no limit (default 250)")
    add("--payload-signing", choices=["unsigned", "signed"], default="unsigned",
        help="for plugin and raw requests alike; unsigned is what TLS would use (default)")
    add("--quick", action="store_true", help="a quarter of the sizes and times: for a first look")
    add("--long", action="store_true", help="memory_use runs for ten minutes")
    add("--no-build", action="store_true", help="measure what target/release holds, built or not from this source")
    add("--direct-file", action="store_true", help="a local directory as the store (file://), no MinIO, no proxy")
    return parser.parse_args()


def names(text: str) -> list[str]:
    chosen = text.replace("-", "_").split(",")
    unknown = [name for name in chosen if name not in workloads.NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no workload {', '.join(unknown)}; there are {', '.join(workloads.NAMES)}")
    return chosen


def sizes(text: str) -> list[int]:
    try:
        return [int(size.rstrip("KM")) * SUFFIXES.get(size[-1:], 1) for size in text.upper().split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give sizes as 4K,64K") from None


def now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")


def say(message: str) -> None:
    print(f"{now()} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
