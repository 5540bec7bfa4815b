"""ext4 on the volume: make it, unpack a source tree, sync, ask git for its status cold, remove the tree.

nbdfuse and a loop device make a disk of the served volume. Before `git status` the server is started afresh and the
file system mounted again, so that neither has anything in memory; the memory plugin, which would forget its contents,
is only mounted again.
"""

import time

from harness import blockdev, source_tree
from harness.loads import GIB, LoadFailed, Sample, command
from harness.report import Row

SIZE_BYTES = GIB
FILES = 3000
STEPS = ["mkfs.ext4", "unpack", "sync after it", "git status, cold", "rm", "sync and unmount"]


def run(bench):
    blockdev.check_available()
    archive = bench.once("source tree", lambda: source_tree.archive(bench.scratch(), bench.count(FILES)))

    def memory():
        steps = Steps()
        with bench.memory(SIZE_BYTES) as server:
            prepare(server, bench.scratch(), archive, steps)
            use(server, bench.scratch(), steps)
        return steps.taken_s

    ceilings = bench.once("file system in memory", memory)
    steps = Steps()
    with bench.volume(SIZE_BYTES) as volume:
        with volume.serve() as server:
            before = bench.traffic()
            prepare(server, bench.scratch(), archive, steps)
            unpacked = bench.cost_since(before, server, archive.stat().st_size)
        with volume.serve() as server:
            before = bench.traffic()
            use(server, bench.scratch(), steps)
            used = bench.cost_since(before, server, archive.stat().st_size)
    rows = [row(step, steps.taken_s[step], ceilings[step]) for step in STEPS]
    for step, cost in (("unpack", unpacked), ("git status, cold", used)):
        rows[STEPS.index(step)].cost = cost
    return rows + [row("all steps", sum(steps.taken_s.values()), sum(ceilings.values()))]


def row(step: str, taken_s: float, ceiling_s: float) -> Row:
    """One step beside the memory plugin's."""
    return Row("time", Sample(taken_s, "s"), Sample(ceiling_s, "s"), variant=step)


class Steps:
    """How long each step took."""

    def __init__(self):
        self.taken_s: dict[str, float] = {}

    def take(self, name: str, step) -> None:
        """Runs and times one step."""
        start = time.perf_counter()
        step()
        self.taken_s[name] = time.perf_counter() - start


def prepare(server, directory, archive, steps: Steps) -> None:
    """Makes the file system and fills it."""
    with blockdev.Disk(server.uri, directory) as disk:
        steps.take("mkfs.ext4", lambda: command(["mkfs.ext4", "-q", disk.device]))
        with disk.mounted() as root:
            steps.take("unpack", lambda: command(["tar", "-xf", archive, "-C", root]))
            steps.take("sync after it", lambda: command(["sync", "-f", root]))


def use(server, directory, steps: Steps) -> None:
    """Finds the tree whole, and removes it."""
    with blockdev.Disk(server.uri, directory) as disk:
        with disk.mounted() as root:
            steps.take("git status, cold", lambda: check_clean(root / "tree"))
            steps.take("rm", lambda: command(["rm", "-rf", root / "tree"]))
            start = time.perf_counter()
        steps.taken_s["sync and unmount"] = time.perf_counter() - start


def check_clean(tree) -> None:
    """Has git read and compare every file."""
    changed = source_tree.git(tree, "status", "--porcelain")
    if changed:
        raise LoadFailed(f"git status in the unpacked tree: {changed[:500]}")
