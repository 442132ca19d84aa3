"""Records, and the figures that they say."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_cases import BRIEF, SHAPE, STEADY, example, few_sets, record_of, scaled  # noqa: F401
from fdistill_ops.bench import __main__ as command_line
from fdistill_ops.bench import measure, table
from fdistill_ops.bench.cases import Case
from fdistill_ops.bench.clock import Spread
from fdistill_ops.bench.figures import DOUBTS, MOST_LOAD, Figure, explain, figures, of_overhead
from fdistill_ops.bench.overhead import measure_overhead
from fdistill_ops.bench.record import SCALE, Overhead, Record, Result, new_record

pytestmark = pytest.mark.no_poison


def test_records_survive_a_file(tmp_path: Path) -> None:
    record = new_record("cpu", ["--quick"])
    record.results = measure.measure(Case("f_distill", SHAPE, guidance=2.5), replace(BRIEF, costs=True))
    record.overhead = measure_overhead("cpu", rounds=1, calls=1)
    path = tmp_path / "record.json"
    record.write(path)
    assert Record.read(path) == record
    content = json.loads(path.read_text())
    assert set(content) == {
        "schema", "command", "started", "commit", "machine", "versions", "results", "overhead", "partial",
    }  # fmt: skip
    assert {"torch", "python", "fdistill_ops"} <= set(content["versions"])
    documented = re.findall(r'"(\w+)":', str(sys.modules[Record.__module__].__doc__))
    assert set(documented) >= set(content) | set(content["results"][0]) | set(content["overhead"][0])
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    for entry in content["results"]:
        of = {figure["name"]: figure for figure in entry["figures"]}
        assert of["time"]["low"] <= of["time"]["value"] <= of["time"]["high"]
        assert "rounds" in of["time"]["doubts"], "two are too few"
        assert ("memory" in of) == ("backward" in of) == (entry["contender"] != "copy")
    assert {"host forward", "host both"} <= {figure["name"] for figure in content["overhead"][0]["figures"]}


def test_older_records_are_read(tmp_path: Path) -> None:
    """Without the parts of a step, the load and the figures."""
    path = tmp_path / "record.json"
    record_of({"cpu": STEADY}).write(path)
    content = json.loads(path.read_text())
    del content["partial"]
    for name in ("forward", "backward", "load", "figures"):
        del content["results"][0][name]
    path.write_text(json.dumps(content))
    record = Record.read(path)
    assert record.results[0].rounds == STEADY
    assert record.results[0].load is None
    assert not record.partial


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "results": [{}]}'])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="no record"):
        Record.read(path)
    assert command_line.main(["--quick", "--device", "cpu", "--compare", str(path)]) == 2
    assert "no record" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"machine": None},
        {"versions": []},
        {"started": None},
        {"overhead": [{"op": "f_distill", "contender": "cpu", "device": "cpu", "forward": [None], "backward": []}]},
        *({"rounds": rounds} for rounds in (0.5, ["1"], [None], [0.0], [-1.0], [math.nan])),
        *({"case": {"op": "f_distill", "shape": shape}} for shape in (["4"], [0, 4], [[4]])),
        {"forward": [-1.0]},
        {"load": "high"},
        {"case": {"op": "another", "shape": [4, 4]}},
        {"case": {"op": "f_distill", "shape": [4, 4], "name": []}},
    ],
    ids=str,
)
def test_damaged_records_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record_of({"cpu": [1.0] * 3}).write(path)
    content = json.loads(path.read_text())
    (content if set(change) <= set(content) else content["results"][0]).update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is no record of schema 1: "):
        Record.read(path)


def test_ratios_are_taken_round_by_round() -> None:
    """The machine is twice as slow in some rounds: the ratio does not see it."""
    a = Result(Case("f_distill", SHAPE), "cpu", "fused", 8, [1.0, 2.0, 1.0, 2.0, 2.0, 1.0])
    b = Result(Case("f_distill", SHAPE), "eager", "eager", 8, [3.0, 6.0, 3.0, 6.0, 6.0, 3.0])
    found = figures(a, {"cpu": a, "eager": b})["eager/it"]
    assert (found.value, found.low, found.high, found.doubts) == (3.0, 3.0, 3.0, ())
    assert "eager/it" not in figures(a, {"cpu": a})
    assert "eager/it" not in figures(a, {"cpu": a, "eager": replace(b, rounds=[])})


# -------------------------------------------------------------------------------------------------------------- figures


def test_intervals_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for count in (6, 7, 8, 9, 15, 16, 100, 1000):
        values = np.random.default_rng(count).normal(10.0, 1.0, count).tolist()
        found, wanted = Spread.of(values), stats.quantile_test(values).confidence_interval(0.95)
        assert (found.low, found.high) == (wanted.low, wanted.high)
        assert found.relative == pytest.approx(stats.iqr(values) / np.median(values))
    assert Spread.of([2.0, 1.0, 3.0]) == Spread(2.0, 1.0, 3.0, 0.5)


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    """Also of a skewed distribution."""
    draw = np.random.default_rng(0)
    for count in (6, 9, 15):
        spreads = [Spread.of(draw.exponential(1.0, count).tolist()) for _ in range(2000)]
        assert np.mean([spread.low <= math.log(2) <= spread.high for spread in spreads]) >= 0.94


def doubts_of(rounds: list[float], load: float | None = None) -> tuple[str, ...]:
    return Figure.of("time", "s", rounds, load).doubts


def test_what_makes_a_figure_worthless() -> None:
    assert doubts_of(STEADY) == doubts_of(STEADY, MOST_LOAD) == ()
    assert doubts_of(STEADY, MOST_LOAD + 0.01) == ("load",)
    assert doubts_of(STEADY[:5]) == ("rounds",)
    wide = [0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5]
    assert doubts_of(wide) == ("spread",)
    assert doubts_of([1.0, 1.0, 1.0, 1.0, 1.0, 1.6]) == ("spread",)  # by the interval alone
    assert doubts_of([1.0, 3.0], 9.0) == ("rounds", "spread", "load")
    assert {doubt[0] for doubt in DOUBTS} == set("rslb")


def test_a_baseline_may_swallow_the_ratio() -> None:
    """Round by round both are three times as slow at times: 1.2 is what one of them varies by anyway."""
    rough = [1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0]
    a = Result(Case("f_distill", SHAPE), "cpu", "fused", 8, rough)
    for factor, there in ((1.2, ("baseline",)), (1 / 1.2, ("baseline",)), (5.0, ()), (0.2, ())):
        rounds = [factor * value * (1.0 + 0.01 * i) for i, value in enumerate(rough)]
        found = figures(a, {"copy": replace(a, contender="copy", rounds=rounds)})["copy/it"]
        assert found.value == pytest.approx(factor, rel=0.05)
        assert found.doubts == there


def test_marks_are_explained() -> None:
    assert explain("| 1.00 | 2.00±0.10 |") == ""
    assert explain("1.00!l  cpu") == f"! worthless; l: {DOUBTS['load']}"
    assert explain("1.00!rs 2!b") == "! worthless; " + ", ".join(
        f"{doubt[0]}: {DOUBTS[doubt]}" for doubt in ("rounds", "spread", "baseline")
    )


# --------------------------------------------------------------------------------------------------------------- tables


def test_table_figures() -> None:
    lines = table.tables(example()).splitlines()
    assert lines[0] == "f_distill, forward+backward, float32, cpu, 1 thread, js, histogram"
    header = re.split(r"\s{2,}", lines[1])
    columns = ["ms", "+-", "forward ms", "backward ms", "GB/s", "of copy", "eager/it", "compile/it", "first call"]
    assert header[1:] == columns
    cpu = ["cifar10", "cpu", "1.000", "0%", "0.7000", "0.3000", "0.004", "50%", "4.00", "2.00", "-"]
    assert lines[3].split() == cpu
    assert lines[5].split() == ["compile", "2.000", "0%", "-", "-", "0.002", "25%", "2.00", "-", "7.5", "s"]
    assert len({len(line) for line in lines[3:6]}) == 1  # aligned
    assert "\033" not in "".join(lines)
    assert "\033[1m" in table.tables(example(), colour=True)
    assert "!" not in "".join(lines)


def test_marks_stand_beside_figures() -> None:
    """A copy with a spread of 2,988% was once printed as a ratio."""
    copy = [1e-4, 1e-4, 1e-4, 3e-3, 3e-3, 3e-3, 1e-4, 3e-3, 1e-4]
    lines = table.tables(record_of({"cpu": scaled(1e-3), "eager": scaled(4e-3), "copy": copy})).splitlines()
    assert lines[3].split() == ["cifar10", "cpu", "1.000", "0%", "0.004", "10±145%!sb", "4.00"]
    assert lines[5].split() == ["copy", "0.1000!s", "1450%", "0.04!s", "-", "39.60±19.53!s"]
    assert lines[6].startswith(f"! worthless; s: {DOUBTS['spread']}, b: ")
    busy = table.tables(record_of({"cpu": scaled(1e-3)}, load=3.0)).splitlines()
    assert busy[3].split() == ["cifar10", "cpu", "1.000!l", "0%", "0.004!l"]
    assert busy[-1] == f"! worthless; l: {DOUBTS['load']}"


def overheads() -> Record:
    record = record_of({"cpu": STEADY})
    record.overhead = [
        Overhead("f_distill", "cpu", "cpu", [30e-6] * 6, [20e-6] * 6, 0.5),
        Overhead("f_weights", "cpu", "cpu", [10e-6] * 6, [], 0.5),
        Overhead(SCALE, "torch", "cpu", [10e-6] * 6, [15e-6] * 6, 0.5),
    ]
    return record


def test_host_overhead_is_a_ratio() -> None:
    """To mse_loss, whose microseconds stand in the heading alone."""
    lines = table.tables(overheads()).splitlines()[-6:]
    assert "mse_loss, forward and backward (25.0 us in this process)" in lines[0]
    assert [line.split()[-3:] for line in lines[3:]] == [
        ["1.20", "0.80", "2.00"],
        ["0.40", "-", "0.40"],
        ["0.40", "0.60", "1.00"],
    ]
    rough = Overhead(SCALE, "torch", "cpu", [1e-5, 4e-5] * 4, [1e-5] * 8)
    assert of_overhead(rough, rough)["host both"].doubts == ()  # 1 by definition
    assert "baseline" in of_overhead(replace(rough, forward=[1.1e-5, 4e-5] * 4), rough)["host both"].doubts
    alone = overheads()
    del alone.overhead[2]
    assert table.tables(alone).splitlines()[-1].split()[-3:] == ["-", "-", "-"]


def test_csv_has_a_row_for_every_figure() -> None:
    record = overheads()
    case = Case("f_distill", SHAPE, "a, b", "forward+backward", guidance=2.5)
    rounds = {"cpu": scaled(1e-3), "eager": scaled(3e-3), "copy": []}
    record.results = record_of(rounds, case, load=3.0, copy='wrong "result"').results
    record.results[0].forward, record.results[0].backward = scaled(6e-4), scaled(4e-4)
    record.results[0].extra_memory = 512
    record.partial = True
    rows = list(csv.DictReader(io.StringIO(table.to_csv(record))))
    of = {(row["op"], row["contender"], row["figure"]): row for row in rows}
    told = [figure for _, found in record.told() for figure in found.values()]
    assert len(of) == len(rows) == len(told) + 1
    time = of["f_distill", "cpu", "time"]
    assert (time["shape"], time["name"], time["guidance"]) == ("6x3x8x10", "a, b", "2.5")
    assert (time["time (s)"], time["low (as the figure)"], time["ratio (1)"]) == ("0.001", "0.00099", "")
    assert time["worthless"] == DOUBTS["load"]
    assert of["f_distill", "cpu", "forward"]["time (s)"] == "0.0006"
    assert of["f_distill", "cpu", "backward"]["time (s)"] == "0.0004"
    assert of["f_distill", "cpu", "eager/it"]["ratio (1)"] == "3.0"
    assert of["f_distill", "cpu", "memory"]["memory (B)"] == "512"
    assert of["f_distill", "copy", ""]["error"] == 'wrong "result"'
    assert of[SCALE, "torch", "host both"]["ratio (1)"] == "1.0"
    assert {row["partial"] for row in rows} == {"True"}
