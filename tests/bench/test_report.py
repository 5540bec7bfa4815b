"""Rows, verdicts, tables, pictures, and what a run leaves behind."""

import json
from xml.dom import minidom

import pytest

import run
from harness import programs, svg
from harness.cost import Cost, Traffic
from harness.loads import Sample, Series
from harness.report import Row, Target, costs, matrix, size_text, table, verdicts

BOUND = Target("raw", at_least=0.85)


@pytest.mark.parametrize(
    "target, value, met",
    [
        (BOUND, 170.0, True),
        (BOUND, 169.0, False),
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


def test_a_bound_is_shown_in_the_unit_of_the_figure():
    row = Row("a", Sample(1.0, "MB/s"), raw=Sample(200.0, "MB/s"))
    bounds = [(BOUND, 170.0), (Target("value", at_most=50), 50), (Target("memory", at_least=0.5), None), (None, None)]
    for row.target, bound in bounds:
        assert row.bound() == bound


def test_the_table_says_where_a_target_is_missed():
    row = Row("a", Sample(100.0, "MB/s"), raw=Sample(200.0, "MB/s"), target=BOUND)
    line = table([row]).splitlines()[1]
    assert "0.50" in line and line.endswith("MISS")
    row.target = Target("raw", at_least=0.5)
    assert table([row]).splitlines()[1].endswith("PASS")


def test_verdicts_are_counted_and_misses_named():
    missed = Row("a", Sample(100.0, "MB/s"), raw=Sample(200.0, "MB/s"), target=BOUND, variant="v", workload="w")
    kept = Row("b", Sample(1.0, "ms"), target=Target("value", at_most=50))
    lines = verdicts([missed, kept, Row("c", Sample(1.0, "x"))]).splitlines()
    assert lines == ["1 of 2 bounds kept", "MISS w, block default: a, v: 0.50, bound >= 0.85 of raw"]


def test_a_cost_shared_by_rows_is_shown_once_by_kind_most_first():
    cost = Cost(1_000_000, 3 << 20, Traffic({"put": 1, "get": 3}, 500_000, 0))
    rows = [Row("a", Sample(1.0, "x"), cost=cost), Row("b", Sample(1.0, "x"), cost=cost), Row("c", Sample(1.0, "x"))]
    lines = costs(rows).splitlines()
    assert len(lines) == 2
    assert lines[1].split()[-8:] == ["4", "4.00", "0.50", "3.00", "get", "3,", "put", "1"]
    assert costs(rows[2:]) == ""


def test_the_matrix_has_a_column_for_each_block_size():
    rows = [Row("a", Sample(value, "iops"), workload="w", block_size=size) for size, value in ((65536, 2), (4096, 1))]
    rows.append(Row("measured at one size only", Sample(1.0, "x"), workload="w", block_size=4096))
    head, _, line = matrix(rows).splitlines()
    assert head == "| workload | unit | 4K | 64K |"
    assert line == "| w: a | iops | 1.00 | 2.00 |"


def test_sizes_are_shown_with_suffixes():
    assert [size_text(size) for size in (4096, 1 << 20, 0)] == ["4K", "1M", "default"]


def row(value, size=4096, variant="", **more):
    return Row("a & <b>", Sample(value, "MB/s"), variant=variant, block_size=size, workload="w", **more)


def test_a_ceiling_has_one_bar_where_all_rows_share_it():
    raw = Sample(200.0, "MB/s")
    labels = [bar.label for bar in svg.bars([row(1.0, 4096, raw=raw), row(2.0, 65536, raw=raw)])]
    assert labels == ["block 4K", "block 64K", "raw S3"]
    other = Sample(100.0, "MB/s")
    labels = [bar.label for bar in svg.bars([row(1.0, 4096, raw=raw), row(2.0, 65536, raw=other)])]
    assert labels == ["block 4K", "block 64K", "raw S3, block 4K", "raw S3, block 64K"]
    labels = [bar.label for bar in svg.bars([row(1.0, variant="p50", raw=raw), row(2.0, variant="p99", raw=other)])]
    assert labels == ["p50", "p99", "raw S3, p50", "raw S3, p99"]


def test_a_bar_has_the_colour_of_its_verdict():
    colours = [
        svg.bars([row(value, raw=Sample(200.0, "MB/s"), target=target)])[0].colour
        for value, target in ((180.0, BOUND), (100.0, BOUND), (100.0, None))
    ]
    assert colours == [svg.COLOURS[name] for name in ("met", "missed", "plain")]


def test_only_a_ceiling_far_above_all_else_is_drawn_cut():
    raw, memory = Sample(200.0, "MB/s"), Sample(2000.0, "MB/s")
    assert svg.scale(svg.bars([row(100.0, raw=raw, memory=memory, target=BOUND)])) == 200.0
    assert svg.scale(svg.bars([row(1000.0, raw=raw, memory=memory)])) == 2000.0
    assert svg.scale(svg.bars([row(5000.0, raw=raw)])) == 5000.0
    assert svg.scale(svg.bars([row(10.0, target=Target("value", at_most=50))])) == 50
    assert svg.scale(svg.bars([row(0.0)])) == 1


def test_thinning_keeps_peaks_and_order():
    points = [(float(at), float(at == 777)) for at in range(1000)]
    thin = svg.thinned(points, most=100)
    assert len(thin) == 100 and (777.0, 1.0) in thin and thin == sorted(thin)
    assert svg.thinned(points[:50], most=100) == points[:50]
    assert svg.thinned([]) == []


def test_a_picture_is_xml_with_a_bar_for_each_figure_and_a_line_for_each_series():
    recorded = [Series("writes", "ms", [(0.0, 1.0), (1.0, 5.0)]), Series("none", "ms", [])]
    rows = [row(100.0, raw=Sample(200.0, "MB/s"), target=BOUND, series=recorded)]
    document = minidom.parseString(svg.picture("a title", rows))
    texts = [text.firstChild.data for text in document.getElementsByTagName("text")]
    assert "a title" in texts and "a & <b> (MB/s); bound >= 0.85 of raw" in texts
    assert len(document.getElementsByTagName("rect")) == 1 + 2  # the background, ours, the ceiling
    assert len(document.getElementsByTagName("polyline")) == 1


class Workload:
    """Stands for a workload's module."""

    def __init__(self, *outcome):
        self.outcome = outcome

    def run(self, _bench):
        if isinstance(self.outcome[0], Exception):
            raise self.outcome[0]
        return list(self.outcome)


class FakeBench:
    block_size = 4096


def test_a_run_keeps_what_worked_what_failed_and_what_could_not_be_tried(tmp_path, monkeypatch):
    modules = {
        "seq_write": Workload(Row("a", Sample(100.0, "MB/s"), raw=Sample(200.0, "MB/s"), target=BOUND)),
        "mixed": Workload(ValueError("it broke\nbadly")),
        "filesystem": Workload(programs.Unavailable("no root")),
    }
    monkeypatch.setattr(run, "load_workload", modules.get)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    results = run.Results()
    for name in modules:
        run.measure(FakeBench(), name, results)
    text = results.text()
    for line in ("0 of 1 bounds kept", "FAILED mixed: it broke", "SKIPPED filesystem: no root"):
        assert line in text.splitlines()
    directory = run.store({"started": "2026-11-22T10:00:00"}, results)
    stored = json.loads((directory / "results.json").read_text())
    assert stored["rows"][0]["ratio_raw"] == 0.5 and stored["rows"][0]["verdict"] == "MISS"
    assert [stored["failures"][0]["workload"], stored["skipped"][0]["workload"]] == ["mixed", "filesystem"]
    assert sorted(path.name for path in directory.iterdir()) == ["results.json", "results.txt", "seq_write.svg"]
    with pytest.raises(programs.Missing):
        modules["mixed"].outcome = (programs.Missing("no fio"),)
        run.measure(FakeBench(), "mixed", results)
