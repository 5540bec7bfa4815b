"""One 4 KiB write and its flush with a log, beside one PUT of 4 KiB (S3 log) or fio's own fdatasync (journal).

fio writes 4 KiB pieces of a file, each with fdatasync, on the disk the journal is on. As the journal's files the file is
written full and synced before, so that a sync changes no metadata. Where the disk syncs in a tenth of a millisecond, the
ratio tells of nbdkit's round trips and not of the journal; so both are measured with slower syncs, too.
"""

from harness.bench import figure
from harness.loads import MIB, fio, fio_file
from harness.report import Row, Target

AREA_BYTES = 64 * MIB
AT_MOST_PUTS = 1.15
AT_MOST_SYNCS = 1.5


def run(bench):
    job = dict(rw="randwrite", bs="4k", iodepth=1, size=AREA_BYTES, time_based=1, runtime=bench.seconds(8))

    def load(server):
        return fio(server.uri, **job, fsync=1)

    memory = bench.memory_ceiling("write_flush", AREA_BYTES, lambda server: load(server).write_and_flush())
    rows = []
    for kind, url, env in bench.flush_cases():
        with bench.volume(AREA_BYTES) as volume, volume.serve(more_env=env, backend_wal_url=url) as server:
            written, cost = bench.measure(server, load)
        if url.startswith("file:"):
            file = bench.scratch() / "file"
            fio_file(file, rw="write", bs="1M", size=AREA_BYTES, end_fsync=1)
            raw = fio_file(file, more_env=env, **job, fdatasync=1).write_and_flush()
            target = Target("raw", at_most=AT_MOST_SYNCS)
        else:
            raw = figure(bench.raw("put", size_bytes=4096, concurrency=1), "p50")
            target = Target("raw", at_most=AT_MOST_PUTS)
        measured = written.write_and_flush()
        rows.append(Row("4K write + flush, median", measured, memory, raw, target, cost, variant=kind))
    return rows
