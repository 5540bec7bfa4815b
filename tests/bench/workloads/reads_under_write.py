"""Cold random 4 KiB reads while another client writes 100 MB/s to another part of the volume.

The ceiling is the same pair in plain requests: 4 KiB GETs while PUTs of 8 MiB keep the same rate. Latencies are shown
in round trips too. The writer must have kept its rate, or the reads were measured beside less than was promised.
"""

from concurrent.futures import ThreadPoolExecutor

from harness.bench import figure, settle
from harness.loads import GIB, MIB, fill, fio, fio_log, fio_meanwhile, fio_series
from harness.report import Row, Target

WRITE_MB_PER_S = 100
LEAD_S = 3  # the writer's start, until checkpoints are under way; not measured
RATE_KEPT = 0.95


def run(bench):
    size = bench.size(GIB)
    seconds, lead_s = bench.seconds(10), bench.seconds(LEAD_S)
    write_s = lead_s + seconds + 1
    written_area = int(WRITE_MB_PER_S * 1e6 * write_s) // MIB * MIB + MIB  # nothing is written twice: all is published

    def load(server, **log):
        writes = dict(rw="write", bs="1M", iodepth=16, offset=size, size=written_area, rate=int(WRITE_MB_PER_S * 1e6))
        reads = dict(rw="randread", bs="4k", iodepth=16, size=size, ramp_time=lead_s)
        with fio_meanwhile(server.uri, **writes, time_based=1, runtime=write_s) as writer:
            return fio(server.uri, **reads, time_based=1, runtime=seconds, **log), writer.result()

    def filled(server):
        fill(server.uri, size)
        return load(server)[0]

    memory = bench.memory_ceiling("reads_under_write", size + written_area, filled)
    raw = raw_pair(bench, write_s, seconds)
    directory = bench.scratch()
    with bench.filled_volume(size + written_area, filled_bytes=size) as volume, volume.serve() as server:
        before = bench.traffic()
        read, written = load(server, **fio_log(directory, "clat"))
        cost = bench.cost_since(before, server, read.user_bytes + written.user_bytes)
    series = [fio_series(directory, "clat", "slowest read")]
    iops, kept = read.iops(), written.mb_per_s()
    rows = [Row("4K random reads, depth 16", iops, memory.iops(), figure(raw, "iops"), cost=cost, series=series)]
    for name in ("p50", "p99", "worst"):
        ceilings = (getattr(memory.iops(), name)(), figure(raw, name))
        ceilings = [sample and bench.in_round_trips(sample) for sample in ceilings]
        target = bench.round_trips_at_most(3) if name == "p99" else None
        latency = bench.in_round_trips(getattr(iops, name)())
        rows.append(Row("their latency", latency, *ceilings, target, variant=name))
    rate = Target("value", at_least=WRITE_MB_PER_S * RATE_KEPT)
    rows.append(Row("the rate the writer kept", kept, target=rate))
    return rows


def raw_pair(bench, write_s, seconds):
    """GETs of 4 KiB while PUTs go on at the writer's rate; measured once a run."""

    def pair():
        settle()
        with ThreadPoolExecutor(1) as pool:
            puts = dict(size_bytes=8 * MIB, concurrency=8, mb_per_s=WRITE_MB_PER_S, prefix="raw-writer")
            writer = pool.submit(bench.raw_now, "put", seconds=write_s, **puts)
            gets = bench.raw_now("get", size_bytes=4096, concurrency=16, seconds=seconds)
            writer.result()
            return gets

    return bench.once("reads_under_write", pair)
