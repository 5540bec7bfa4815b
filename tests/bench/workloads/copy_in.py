"""nbdcopy of a disk image into a fresh volume, flushed at the end, beside parallel PUTs."""

from harness.bench import figure
from harness.loads import GIB, MIB, nbdcopy
from harness.report import Row


def run(bench):
    size = bench.size(GIB)
    image = bench.image(size)

    def load(server):
        return nbdcopy(str(image), server.uri, size)

    memory = bench.memory_ceiling("copy_in", size, load)
    raw = bench.raw("put", size_bytes=8 * MIB, concurrency=8)
    with bench.volume(size) as volume, volume.serve() as server:
        measured, cost = bench.measure(server, load, user_bytes=size)
    return [Row("nbdcopy in", measured, memory, figure(raw, "mb_per_s"), cost=cost)]
