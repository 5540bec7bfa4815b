"""Random 4 KiB writes over a full volume at default settings, for longer than the buffer lasts.

Every block is mapped, so a block larger than 4 KiB has to be completed from the store. The time includes the last
flush. The second row is what the store received for each byte written.
"""

from harness.bench import figure
from harness.loads import GIB, Sample, fill, fio
from harness.report import Row


def run(bench):
    size = bench.size(GIB)
    seconds = bench.seconds(16)

    def load(server):
        job = dict(rw="randwrite", bs="4k", iodepth=16, size=size, end_fsync=1)
        return fio(server.uri, **job, time_based=1, runtime=seconds)

    memory = bench.memory_ceiling("rand_write", size, lambda server: load(server).iops())
    raw = bench.raw("put", size_bytes=4096, concurrency=16)
    with bench.volume(size) as volume:
        with volume.serve() as server:
            fill(server.uri, size)
        before = volume.stored_bytes()
        with volume.serve() as server:
            measured = load(server)
        stored = volume.stored_bytes() - before
    amplification = Sample(stored / measured.write["io_bytes"], "x")
    return [
        Row("4K random writes, depth 16, last flush", measured.iops(), memory, figure(raw, "iops")),
        Row("bytes stored for each byte written", amplification),
    ]
