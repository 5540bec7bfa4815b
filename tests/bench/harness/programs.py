"""Finds the programs the benchmarks run; each failure says what to install or set."""

import os
import re
import shutil
import subprocess
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[3]
CACHE = Path(os.environ.get("HYPERNBD_CACHE") or Path.home() / ".cache" / "hypernbd")
TARGET = Path(os.environ.get("CARGO_TARGET_DIR") or PROJECT / "target") / "release"


class Missing(Exception):
    """A program or library is not there; the message says how to get it."""


class Unavailable(Exception):
    """This machine cannot run a workload; the message says why. The others run."""


def minio() -> Path:
    """The MinIO server: $MINIO, else the newest one in the cache, else the one in PATH."""
    return _find("MINIO", CACHE.glob("minio-*/minio"), "minio", "run scripts/build-minio.sh")


def nbdkit() -> Path:
    """nbdkit: $NBDKIT, else the newest build in the cache, else the one in PATH."""
    return _find("NBDKIT", CACHE.glob("nbdkit-*/sbin/nbdkit"), "nbdkit", "run scripts/build-nbdkit.sh")


def system(name: str) -> Path:
    """A program of the system, from PATH."""
    return _find(None, [], name, "run scripts/install-deps.sh")


def built(name: str) -> Path:
    """Something `cargo build --release --workspace` leaves in the target directory."""
    path = TARGET / name
    if not path.is_file():
        raise Missing(f"{path} is missing: run cargo build --release --workspace")
    return path


def compiled(source: str, directory: Path) -> Path:
    """A library made of a C file of `tests/bench/tools`, to be preloaded."""
    library = directory / source.replace(".c", ".so")
    flags = ["-O2", "-Wall", "-shared", "-fPIC"]
    command = [system("cc"), *flags, "-o", library, PROJECT / "tests" / "bench" / "tools" / source, "-ldl"]
    if subprocess.run([str(word) for word in command]).returncode:
        raise Missing(f"{source} could not be compiled")
    return library


def build() -> None:
    """Builds plugin, command line and benchmark tools; quick when they are up to date.

    All at once, because cargo then builds each dependency once, with the features of all of them.
    """
    command = ["cargo", "build", "--quiet", "--release", "--locked", "--workspace"]
    if subprocess.run(command, cwd=PROJECT).returncode:
        raise Missing("the build failed; --no-build measures what was built before")


def version(program: Path) -> str:
    """First line of what the program says about its version."""
    output = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return output.strip().splitlines()[0]


def plugin_parameters(program: Path, plugin: Path) -> set[str]:
    """The parameters a plugin lists in its help, as `name=`."""
    output = subprocess.run([program, plugin, "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^(\w+)=", output, re.MULTILINE))


def nbdkit_is_current(program: Path) -> bool:
    """True from nbdkit 1.34 on; an older one makes the plugin answer one request of a connection at a time."""
    numbers = version(program).split()[1].split(".")
    return (int(numbers[0]), int(numbers[1])) >= (1, 34)


def _find(variable: str | None, candidates, name: str, hint: str) -> Path:
    chosen = os.environ.get(variable) if variable else None
    if chosen:
        found = shutil.which(chosen)
        if not found:
            raise Missing(f"{variable}={chosen} is not a program")
        return Path(found)
    built_here = [path for path in candidates if os.access(path, os.X_OK)]
    if built_here:
        return max(built_here, key=lambda path: path.stat().st_mtime)
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        raise Missing(f"{name} is not installed: {hint}")
    return Path(found)
