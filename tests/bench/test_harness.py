"""What the benchmarks compute from what they measure, and how they choose what to run."""

import argparse
import random
import socket
import threading
from types import SimpleNamespace

import pytest

import run
import workloads
from harness.bench import Bench, Options
from harness.cost import Cost, Traffic, read_traffic
from harness.loads import Fio, Raw, Sample, fio_series, of_latencies
from harness.processes import Nbdkit
from harness.source_tree import write_files
from workloads import open_time


def side(count=0, iops=0.0, bw_bytes=0, ms=(0, 0, 0), io_bytes=0):
    p50, p99, worst = (value * 1_000_000 for value in ms)
    latencies = {"percentile": {"50.000000": p50, "99.000000": p99}, "max": worst}
    sizes = {"io_bytes": io_bytes, "bw_bytes": bw_bytes}
    return sizes | {"total_ios": count, "iops": iops, "clat_ns": latencies, "lat_ns": latencies}


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


def test_a_percentile_is_never_above_the_worst():
    result = Fio(side(5, 1.0, 1, (1, 31, 30)), side(), side())
    assert result.iops() == Sample(1.0, "iops", 1, 30, 30)


def test_a_job_knows_its_bytes_and_its_time():
    result = Fio(side(1, 1.0, 10, io_bytes=30), side(1, 1.0, 20, io_bytes=60), side())
    assert (result.user_bytes, result.elapsed_s()) == (90, 3.0)


def test_latencies_are_summed_up_by_nearest_rank():
    values = list(range(1, 201))
    random.Random(0).shuffle(values)
    assert of_latencies(values) == Sample(100, "ms", 100, 198, 200)
    assert of_latencies([7.0]) == Sample(7.0, "ms", 7.0, 7.0, 7.0)


def test_a_sample_can_show_another_of_its_figures():
    sample = Sample(5.0, "iops", 1.0, 2.0, 3.0)
    assert [one.value for one in (sample.p50(), sample.p99(), sample.worst())] == [1.0, 2.0, 3.0]
    assert sample.p99().unit == "ms"


@pytest.mark.parametrize("kind, value, expected", [("bw", 1000, 1.024), ("clat", 2_500_000, 2.5)])
def test_fio_logs_are_read_in_seconds_and_in_the_units_of_the_report(tmp_path, kind, value, expected):
    (tmp_path / f"fio_{kind}.log").write_text(f"250, {value}, 1, 0, 0\n1500, 0, 1, 0, 0\n")
    assert fio_series(tmp_path, kind, "x").points == [(0.25, pytest.approx(expected)), (1.5, 0)]


def test_raw_figures_carry_their_latencies():
    latency = {"p50_ms": 20.0, "p99_ms": 30.0, "worst_ms": 40.0}
    raw = Raw({"mb_per_s": 200.0, "requests_per_s": 25.0, "latency": latency})
    assert raw.mb_per_s() == Sample(200.0, "MB/s", 20.0, 30.0, 40.0)
    assert raw.iops().value == 25.0
    assert raw.p50() == Sample(20.0, "ms", 20.0, 30.0, 40.0)
    assert (raw.p99().value, raw.worst().value) == (30.0, 40.0)


def test_traffic_is_the_difference_of_two_counts():
    earlier, later = Traffic({"get": 3, "put": 1}, 100, 10), Traffic({"get": 5, "put": 1, "list": 2}, 400, 60)
    passed = later.since(earlier)
    assert passed == Traffic({"get": 2, "list": 2}, 300, 50)
    assert (passed.count(), passed.size_bytes()) == (4, 350)


def test_costs_are_a_share_of_what_the_client_moved():
    cost = Cost(2_000_000, 0, Traffic({"get": 3, "put": 1}, 1_000_000, 2_000_000))
    assert (cost.requests_per_mb(), cost.bytes_per_user_byte()) == (2.0, 1.5)
    for nothing in (Cost(2_000_000, 0), Cost(0, 0, cost.traffic)):
        assert nothing.requests_per_mb() is None and nothing.bytes_per_user_byte() is None


def test_a_load_that_sends_data_has_published():
    assert Cost(1, 0, Traffic({"part": 1}, 8_000_000, 0)).published()
    assert not Cost(1, 0, Traffic({"put": 1}, 5_000, 0)).published()
    assert not Cost(1, 0).published()


def test_counts_are_read_from_the_proxy_until_it_closes_the_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with listener.accept()[0] as connection:
                connection.sendall(b'{"requests": {"get": 7}, ')
                connection.sendall(b'"sent_bytes": 8, "received_bytes": 9}')

        thread = threading.Thread(target=answer)
        thread.start()
        traffic = read_traffic(f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert traffic == Traffic({"get": 7}, 8, 9)


def bench(**options) -> Bench:
    """A run that has started nothing."""
    made = Bench.__new__(Bench)
    made.options, made._known, made._kept = Options(**options), {"cache_memory"}, {}
    return made


def test_latencies_are_shown_in_round_trips_where_there_are_any():
    sample = Sample(60.0, "ms", 1.0, 60.0, 70.0)
    assert bench(delay_ms=10).in_round_trips(sample) == Sample(3.0, "RTT", 1.0, 60.0, 70.0)
    assert bench(delay_ms=10).round_trips_at_most(3).met(3.0)
    for without in (bench(delay_ms=0), bench(direct_file=True)):
        assert without.in_round_trips(sample) == sample
        assert without.round_trips_at_most(3) is None


def test_a_quick_run_is_a_sixteenth_and_never_nothing():
    quick, full = bench(quick=True), bench()
    assert (full.size(1 << 30), full.seconds(32), full.count(3)) == (1 << 30, 32, 3)
    assert (quick.size(1 << 30), quick.seconds(32), quick.count(64)) == (1 << 26, 2, 4)
    assert (quick.size(1 << 21), quick.seconds(3), quick.count(3)) == (1 << 20, 1, 1)


def test_only_parameters_the_plugin_lists_are_given_to_it():
    assert bench().parameters_if_known(cache_memory="256M", not_yet="1") == {"cache_memory": "256M"}


def test_a_ceiling_is_measured_once():
    measured, one = [], bench()
    for _ in range(2):
        assert one.once("a", lambda: measured.append(1) or 5) == 5
    assert measured == [1]


def test_a_listening_socket_is_seen_without_connecting(tmp_path):
    server = Nbdkit.__new__(Nbdkit)
    server.socket = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(server.socket))
        assert not server.listens()
        listener.listen()
        assert server.listens()
    assert not server.listens()


@pytest.mark.parametrize("size", open_time.SIZES.values())
def test_pieces_are_spread_over_the_whole_volume_without_overlap(size):
    places = open_time.spread(size, 64)
    assert len(places) == 64 and places[0] < size // 64 and places[-1] >= size - size // 64
    assert all(later - earlier >= open_time.PIECE_BYTES for earlier, later in zip(places, places[1:]))
    assert places[-1] + open_time.PIECE_BYTES <= size


def test_block_status_is_asked_again_from_where_the_answer_ended():
    asked = []

    def block_status(len_bytes, offset, answer):
        asked.append((offset, len_bytes))
        answer("base:allocation", offset, [min(len_bytes, 1 << 31), 3], 0)

    open_time.extents(SimpleNamespace(block_status=block_status), 0, 5 << 30)
    end = open_time.STATUS_BYTES
    assert asked == [(0, end), (1 << 31, end - (1 << 31))]


def test_the_source_tree_is_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        write_files(tmp_path / name, 50)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.rs")} for name in ("one", "two"))
    assert one == two and len(one) == 50
    assert max(map(len, one.values())) <= 65536


def test_sizes_are_read_with_suffixes():
    assert run.sizes("4k,64K,1M") == [4096, 65536, 1 << 20]
    with pytest.raises(argparse.ArgumentTypeError):
        run.sizes("4X")


def test_workloads_are_named_in_either_spelling_and_each_has_a_module():
    assert run.names("seq-write,mixed") == ["seq_write", "mixed"]
    with pytest.raises(argparse.ArgumentTypeError, match="nope"):
        run.names("nope")
    for name in workloads.NAMES:
        assert callable(run.load_workload(name).run)
        assert run.load_workload(name).__doc__
    assert workloads.SWEPT <= set(workloads.NAMES)


def test_only_workloads_where_it_matters_run_for_every_block_size():
    args = SimpleNamespace(only=["seq_write", "copy_in"], block_size=[4096, 65536])
    assert run.workloads_for(args, 4096) == ["seq_write", "copy_in"]
    assert run.workloads_for(args, 65536) == ["seq_write"]
