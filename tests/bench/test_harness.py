"""What the benchmarks compute from what they measure."""

import argparse

import pytest

import run
import workloads
from harness.loads import Fio, Raw, Sample
from harness.report import Row, Target, matrix, size_text, table


def side(count=0, iops=0.0, bw_bytes=0, ms=(0, 0, 0)):
    p50, p99, worst = (value * 1_000_000 for value in ms)
    latencies = {"percentile": {"50.000000": p50, "99.000000": p99}, "max": worst}
    return {"total_ios": count, "iops": iops, "bw_bytes": bw_bytes, "clat_ns": latencies, "lat_ns": latencies}


def test_a_mixed_load_adds_throughput_and_takes_the_slower_latency():
    result = Fio(side(5, 10.0, 3_000_000, (1, 5, 9)), side(5, 20.0, 4_000_000, (2, 4, 8)), side())
    assert result.mb_per_s() == Sample(7.0, "MB/s", 2, 5, 9)
    assert result.iops() == Sample(30.0, "iops", 2, 5, 9)


def test_a_side_without_requests_has_no_say_in_the_latency():
    result = Fio(side(ms=(7, 8, 9)), side(5, 20.0, 4_000_000, (1, 2, 3)), side())
    assert result.iops() == Sample(20.0, "iops", 1, 2, 3)


def test_write_and_flush_is_the_sum_of_both():
    result = Fio(side(), side(5, 1.0, 1, (1, 2, 3)), side(5, 1.0, 0, (20, 30, 40)))
    assert result.write_and_flush() == Sample(21, "ms", 21, 32, 43)


def test_raw_figures_carry_their_latencies():
    latency = {"p50_ms": 20.0, "p99_ms": 30.0, "worst_ms": 40.0}
    raw = Raw({"mb_per_s": 200.0, "requests_per_s": 25.0, "latency": latency})
    assert raw.mb_per_s() == Sample(200.0, "MB/s", 20.0, 30.0, 40.0)
    assert raw.iops().value == 25.0
    assert raw.p50() == Sample(20.0, "ms", 20.0, 30.0, 40.0)


@pytest.mark.parametrize(
    "target, value, met",
    [
        (Target("raw", at_least=0.85), 170.0, True),
        (Target("raw", at_least=0.85), 169.0, False),
        (Target("raw", at_most=2.4), 480.0, True),
        (Target("raw", at_most=2.4), 481.0, False),
        (Target("value", at_most=50), 50.0, True),
        (Target("value", at_most=50), 50.1, False),
        (Target("memory", at_least=0.5), 1.0, None),
        (None, 1.0, None),
    ],
)
def test_verdicts(target, value, met):
    row = Row("measure", Sample(value, "MB/s"), raw=Sample(200.0, "MB/s"), target=target)
    assert row.met() is met


def test_the_table_says_where_a_target_is_missed():
    row = Row("a", Sample(100.0, "MB/s"), raw=Sample(200.0, "MB/s"), target=Target("raw", at_least=0.85))
    line = table([row]).splitlines()[1]
    assert "0.50" in line and line.endswith("NOT MET")


def test_the_matrix_has_a_column_for_each_block_size():
    rows = [Row("a", Sample(value, "iops"), workload="w", block_size=size) for size, value in ((65536, 2), (4096, 1))]
    head, _, line = matrix(rows).splitlines()
    assert head == "| workload | unit | 4K | 64K |"
    assert line == "| w: a | iops | 1.00 | 2.00 |"


def test_sizes_are_read_and_shown_with_suffixes():
    assert run.sizes("4k,64K,1M") == [4096, 65536, 1 << 20]
    assert [size_text(size) for size in (4096, 1 << 20, 0)] == ["4K", "1M", "default"]
    with pytest.raises(argparse.ArgumentTypeError):
        run.sizes("4X")


def test_workloads_are_named_in_either_spelling_and_each_has_a_module():
    assert run.names("seq-write,mixed") == ["seq_write", "mixed"]
    with pytest.raises(argparse.ArgumentTypeError, match="nope"):
        run.names("nope")
    for name in workloads.NAMES:
        assert callable(run.load_workload(name).run)
