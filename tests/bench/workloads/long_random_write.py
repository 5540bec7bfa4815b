"""A minute of random 4 KiB writes over a full volume: the buffer is long full, and the store sets the pace.

Every block is mapped. With 4 KiB blocks nothing has to be read, and the ceiling is what parallel PUTs carry. A larger
block has to be completed from the store: the ceiling is one GET a block, at the concurrency of the client and at that
of the server, and the figure is the blocks the store received, so that a block written twice in one checkpoint counts
once. All times include the last flush.
"""

from harness.bench import figure
from harness.loads import GIB, MIB, Sample, fio, fio_log, fio_series
from harness.report import Row, Target

SECONDS = 60
DEPTH = 16
COMPLETIONS = 64  # blocks the server completes at once
SMALL = 4096
BOUNDS = {SMALL: 0.6, 64 * 1024: 0.7}


def run(bench):
    size, seconds = bench.size(2 * GIB), bench.seconds(SECONDS)
    bench.check_room(seconds, more_bytes=size)
    directory = bench.scratch()
    block_size = bench.block_size or SMALL

    def load(server, **log):
        job = dict(rw="randwrite", bs=SMALL, iodepth=DEPTH, size=size, end_fsync=1)
        return fio(server.uri, **job, time_based=1, runtime=seconds, **log)

    memory = bench.memory_ceiling("long_random_write", size, load)
    with bench.filled_volume(size) as volume:
        before_bytes = volume.stored_bytes()
        with volume.serve() as server:
            written, cost = bench.measure(server, lambda server: load(server, **fio_log(directory, "bw")))
            stored_bytes = volume.stored_bytes() - before_bytes
    series = [fio_series(directory, "bw", "accepted from the client")]
    bound = BOUNDS.get(block_size)
    target = Target("raw", at_least=bound) if bound else None
    rows = [Row(f"4K random writes, depth {DEPTH}", written.iops(), memory.iops(), cost=cost, series=series)]
    if block_size == SMALL:
        puts = figure(bench.raw("put", size_bytes=8 * MIB, concurrency=8), "mb_per_s")
        rows.append(Row("bytes written", written.mb_per_s(), memory.mb_per_s(), puts, target))
    else:
        blocks = Sample(stored_bytes / block_size / written.elapsed_s(), "blocks/s")
        for concurrency in (DEPTH, COMPLETIONS):
            gets = figure(bench.raw("get", size_bytes=block_size, concurrency=concurrency), "iops")
            rows.append(Row(f"blocks completed and stored, by {concurrency} GETs", blocks, raw=gets, target=target))
    amplification = Sample(stored_bytes / written.user_bytes, "x")
    return [*rows, Row("bytes stored for each byte written", amplification)]
