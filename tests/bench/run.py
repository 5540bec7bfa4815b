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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import workloads
from harness import programs, report, svg
from harness.bench import Bench, Options

RESULTS = Path(__file__).resolve().parent / "results"
SWEEP = "4K,64K,512K"
SWEEP_QUICK = "4K"
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
    results = Results()
    with tempfile.TemporaryDirectory(prefix="hypernbd-bench-") as directory:
        with Bench(options, Path(directory)) as bench:
            about = {"started": now(), "options": asdict(options), "machine": machine(bench.nbdkit)}
            if not programs.nbdkit_is_current(bench.nbdkit):
                say(f"{bench.nbdkit} is older than 1.34: one request of a connection at a time")
            for block_size in args.block_size:
                for name in workloads_for(args, block_size):
                    bench.block_size = block_size
                    measure(bench, name, results)
    directory = store(about | {"ended": now(), "load_average_at_end": os.getloadavg()}, results)
    print(results.text())
    say(f"results: {directory}")
    return 1 if results.failures else 0


@dataclass
class Results:
    """What a run has measured, could not measure, and could not try on this machine."""

    rows: list[report.Row] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    skipped: list[dict] = field(default_factory=list)

    def text(self) -> str:
        """The tables, the verdicts, and what is missing."""
        self.rows.sort(key=lambda row: workloads.NAMES.index(row.workload))
        parts = []
        if self.rows:
            parts = [report.table(self.rows), report.costs(self.rows)]
        if len({row.block_size for row in self.rows}) > 1:
            parts.append(report.matrix(self.rows))
        if self.rows:
            parts.append(report.verdicts(self.rows))
        lines = [f"SKIPPED {one['workload']}: {one['reason']}" for one in self.skipped]
        lines += [f"FAILED {one['workload']}: {(one['error'].splitlines() or ['?'])[0]}" for one in self.failures]
        return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])])


def workloads_for(args, block_size: int) -> list[str]:
    """The chosen workloads that run for a block size: all of them for the first one."""
    return [name for name in args.only if block_size == args.block_size[0] or name in workloads.SWEPT]


def measure(bench: Bench, name: str, results: Results) -> None:
    """Runs one workload; a failure is shown at once and kept for the end."""
    say(f"{name}, block {report.size_text(bench.block_size)}")
    about = {"workload": name, "block_size": bench.block_size}
    try:
        for row in load_workload(name).run(bench):
            row.workload, row.block_size = name, bench.block_size
            results.rows.append(row)
    except programs.Missing:
        raise
    except programs.Unavailable as error:
        results.skipped.append(about | {"reason": str(error)})
    except Exception as error:
        results.failures.append(about | {"error": str(error) or type(error).__name__})
        traceback.print_exc()


def store(about: dict, results: Results) -> Path:
    """Writes everything into a directory named after the time of the run: JSON, the tables, a picture a workload."""
    directory = RESULTS / about["started"].replace(":", "")
    directory.mkdir(parents=True, exist_ok=True)
    content = {"rows": [row.as_json() for row in results.rows]}
    content |= {"failures": results.failures, "skipped": results.skipped}
    (directory / "results.json").write_text(json.dumps(about | content, indent=1) + "\n")
    (directory / "results.txt").write_text(results.text() + "\n")
    for name in {row.workload for row in results.rows}:
        rows = [row for row in results.rows if row.workload == name]
        (directory / f"{name}.svg").write_text(svg.picture(name, rows))
    return directory


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
    add("--block-size", type=sizes, metavar="SIZE,…",
        help=f"block sizes (default {SWEEP}; with --quick {SWEEP_QUICK}); all workloads run with the first one, "
        "those where it matters with each")
    add("--delay-ms", type=float, default=10, help="delay each way between plugin and store (default 10)")
    add("--line", type=int, default=250, metavar="MB/S", help="rate of the line in all; 0: no limit (default 250)")
    add("--payload-signing", choices=["unsigned", "signed"], default="unsigned",
        help="for plugin and raw requests alike; unsigned is what TLS would use (default)")
    add("--quick", action="store_true", help="a sixteenth of the sizes and times: does everything run?")
    add("--long", action="store_true", help="memory_use runs for ten minutes")
    add("--no-build", action="store_true", help="measure what target/release holds, built or not from this source")
    add("--direct-file", action="store_true", help="a local directory as the store (file://), no MinIO, no proxy")
    args = parser.parse_args()
    args.block_size = args.block_size or sizes(SWEEP_QUICK if args.quick else SWEEP)
    return args


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
