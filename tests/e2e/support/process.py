"""Running programs so that none outlives its test and none can hang it."""

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

COMMAND_LIMIT_S = 300

_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
# What gives itself these properties and becomes the program: between a fork and an exec of this process it would cost a copy of its
# page tables, which grow with the tests.
PREPARE = [
    *[shutil.which("prlimit"), f"--nofile={_files}:{_files}"],
    *[shutil.which("setpriv"), "--pdeathsig", "KILL"],
    # An alarm survives an exec.
    *[shutil.which("perl"), "-e", "alarm(shift); exec { $ARGV[0] } @ARGV or die qq($ARGV[0]: $!\\n)"],
]


def spawn(command: list[str], log: Path, *, env: dict[str, str], limit_s: int, cwd: Path | None = None):
    """Starts a background program with its output appended to `log`.

    It dies with this process, and by SIGALRM after `limit_s` seconds: a client waiting on a server that hangs
    sees the connection close, and its test fails instead of standing still. Call it from the main thread only
    (the kernel ties the parent's death to the thread that forked).
    """

    with open(log, "ab") as output:
        return subprocess.Popen(
            [*PREPARE, str(limit_s), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **env},
            cwd=cwd,
        )


def run(*command: str | Path, env: dict[str, str] | None = None, limit_s: int = COMMAND_LIMIT_S, stdin: str = ""):
    """Runs a program to its end and returns its `CompletedProcess`, whatever its status (output as text)."""
    return subprocess.run(
        [str(part) for part in command],
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
        timeout=limit_s,
    )


def check(*command: str | Path, **options) -> str:
    """Runs a program that must succeed (options as for `run`) and returns its standard output."""
    done = run(*command, **options)
    line = " ".join(str(part) for part in command)
    assert done.returncode == 0, f"`{line}` exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def wait_for(condition, what: str, limit_s: float = 120.0):
    """Polls until `condition()` is true and returns its value; fails naming `what` after a generous limit."""
    end = time.monotonic() + limit_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.02)
