"""Control groups with limits, of either version, for servers that are started in them."""

import contextlib
import itertools
import os
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
_numbers = itertools.count(1)
# Of each controller, by version: the file of the limit, and of what was in use at most.
FILES = {
    "memory": {1: ("memory.limit_in_bytes", "memory.max_usage_in_bytes"), 2: ("memory.max", "memory.peak")},
    "pids": {1: ("pids.max", None), 2: ("pids.max", "pids.peak")},
}


class Group:
    """A control group with one limit."""

    def __init__(self, controller: str, limit: int):
        own = ROOT / controller
        version, parent = (1, own) if own.is_dir() else (2, ROOT)
        most, self._peak = FILES[controller][version]
        self.path = parent / f"hypernbd-test-{os.getpid()}-{next(_numbers)}"
        self.path.mkdir()
        self.limit_file = self.path / most
        self.limit_file.write_text(str(limit))

    def entering(self, command: list[str]) -> list[str]:
        """The command, run in the group."""
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs; exec "$@"', "sh", *command]

    def peak(self) -> int:
        """The most that was in use."""
        return int((self.path / self._peak).read_text())

    def remove(self) -> None:
        """Once nothing runs in it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


@pytest.fixture
def make_group():
    """Makes groups: `make_group("memory", bytes)`. Skips the test where none can be made."""
    made = []

    def make(controller: str, limit: int) -> Group:
        try:
            made.append(Group(controller, limit))
        except OSError as error:
            pytest.skip(f"no control group can be made here: {error}")
        return made[-1]

    yield make
    for group in made:
        group.remove()
