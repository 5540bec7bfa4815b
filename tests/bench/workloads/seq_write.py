"""Sequential write of a fresh volume, the last flush included, beside parallel PUTs."""

from harness.bench import figure
from harness.loads import GIB, MIB, fill
from harness.report import Row, Target


def run(bench):
    size = bench.size(GIB)

    def load(server):
        return fill(server.uri, size)

    memory = bench.memory_ceiling("seq_write", size, lambda server: load(server).mb_per_s())
    raw = bench.raw("put", size_bytes=8 * MIB, concurrency=8)
    with bench.volume(size) as volume, volume.serve() as server:
        written, cost = bench.measure(server, load)
    target = Target("raw", at_least=0.9)
    measured = written.mb_per_s()
    return [Row("1M writes, depth 16, last flush", measured, memory, figure(raw, "mb_per_s"), target, cost)]
