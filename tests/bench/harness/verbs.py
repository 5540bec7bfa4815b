"""The command line's verbs, as the benchmarks run them."""

import json
import subprocess
import time
from dataclasses import dataclass

from . import programs
from .cost import Cost


@dataclass(frozen=True)
class Ran:
    """A verb that has ended: how long it took, and what passed to and from the store meanwhile."""

    taken_s: float
    cost: Cost
    output: str

    def json(self):
        """What it printed, as JSON."""
        return json.loads(self.output)


def command(bench, *words) -> list[str]:
    """The line that runs a verb, with what it needs to reach the store."""
    options = [f"--{parameter.replace('_', '-')}" for parameter in bench.store_parameters()]
    return [str(word) for word in (programs.built("hypernbd"), *words, *options)]


def run(bench, *words, user_bytes: int = 0) -> Ran:
    """Runs a verb to its end; it must succeed."""
    before = bench.traffic()
    began = time.perf_counter()
    done = subprocess.run(command(bench, *words), check=True, env=bench.env, stdout=subprocess.PIPE, text=True)
    taken_s = time.perf_counter() - began
    traffic = bench.traffic().since(before) if before else None
    return Ran(taken_s, Cost(user_bytes, 0, traffic), done.stdout)
