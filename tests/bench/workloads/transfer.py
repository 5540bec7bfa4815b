"""Whole volumes in and out: import, check --data, export and replicate, beside parallel PUTs and GETs.

Each is a process of the command line, its start, the opening of the volume and the verification at its end included. The replica
goes to a directory, so that each byte crosses the line once.
"""

from harness import verbs
from harness.bench import figure
from harness.loads import GIB, MIB, Sample
from harness.report import Row, Target


def run(bench):
    size = bench.size(2 * GIB)
    image = bench.image(size)
    scratch = bench.scratch()
    raw = {name: figure(bench.raw(name, size_bytes=8 * MIB, concurrency=8), "mb_per_s") for name in ("put", "get")}

    with bench.volume(size) as volume:
        ran = {
            "import": verbs.run(bench, "import", image, volume.url, "--overwrite", "--no-verify", user_bytes=size),
            "check --data": verbs.run(bench, "check", volume.url, "--data", user_bytes=size),
            "export": verbs.run(bench, "export", volume.url, scratch / "image", "--no-verify", user_bytes=size),
            "replicate": verbs.run(bench, "replicate", volume.url, f"file://{scratch}/replica/", user_bytes=size),
        }
    target = Target("raw", at_least=0.85)
    return [
        Row(name, Sample(size / 1e6 / done.taken_s, "MB/s"), raw=raw["put" if name == "import" else "get"], target=target, cost=done.cost)
        for name, done in ran.items()
    ]
