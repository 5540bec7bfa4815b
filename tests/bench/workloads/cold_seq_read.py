"""Sequential reads by a fresh server process, beside parallel range GETs: deep, one at a time, and by nbdcopy.

The first row keeps 16 MiB in flight and asks the most of the line. The second asks for 128 KiB and waits for it, as a
kernel without read-ahead of its own does: what it reaches beyond one GET after the other is the server's read-ahead.
"""

from harness.bench import figure
from harness.loads import GIB, MIB, fill, fio, nbdcopy
from harness.report import Row, Target

SMALL = 128 * 1024
COPY_REQUEST = 256 * 1024  # nbdcopy's own size and number of requests
COPY_DEPTH = 64


def run(bench):
    size = bench.size(GIB)

    def deep(server):
        return fio(server.uri, rw="read", bs="1M", iodepth=16, size=size)

    def single(server):
        job = dict(rw="read", bs=SMALL, iodepth=1, size=size, runtime=bench.seconds(8))
        return fio(server.uri, **job)

    def copy(server):
        return nbdcopy(server.uri, "null:", size)

    def ceilings(server):
        fill(server.uri, size)
        return deep(server).mb_per_s(), single(server).mb_per_s(), copy(server)

    memory = bench.memory_ceiling("cold_seq_read", size, ceilings)
    with bench.filled_volume(size) as volume:
        with volume.serve() as server:
            deep_read, deep_cost = bench.measure(server, deep)
        with volume.serve() as server:
            single_read, single_cost = bench.measure(server, single)
        with volume.serve() as server:
            copied, copy_cost = bench.measure(server, copy, user_bytes=size)
    target = Target("raw", at_least=0.85)

    def row(measure, measured, ceiling, size_bytes, concurrency, cost, target=None):
        raw = figure(bench.raw("get", size_bytes=size_bytes, concurrency=concurrency), "mb_per_s")
        return Row(measure, measured, ceiling, raw, target, cost)

    return [
        row("1M reads, depth 16", deep_read.mb_per_s(), memory[0], MIB, 16, deep_cost, target),
        row("128K reads, one at a time", single_read.mb_per_s(), memory[1], SMALL, 1, single_cost),
        row("nbdcopy out", copied, memory[2], COPY_REQUEST, COPY_DEPTH, copy_cost, target),
    ]
