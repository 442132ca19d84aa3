"""Noise is not taken for a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench_cases import STEADY, record_of, scaled
from fdistill_ops.bench import __main__ as command_line
from fdistill_ops.bench import compare
from fdistill_ops.bench.cases import SHAPES, Case
from fdistill_ops.bench.figures import DOUBTS
from fdistill_ops.bench.measure import Plan
from fdistill_ops.bench.record import Record, Result, new_record

from fdistill_ops.trainer.interruption import Interrupted

pytestmark = pytest.mark.no_poison


SAME = compare.SAME


def verdict(old: dict[str, list[float]], new: dict[str, list[float]]) -> str:
    (change,) = compare.compare(record_of(old), record_of(new))
    return change.verdict


def test_compare_tells_a_change_from_noise() -> None:
    def now(rounds: list[float], before: list[float] = STEADY) -> str:
        return verdict({"cpu": before, "copy": STEADY}, {"cpu": rounds, "copy": STEADY})

    assert now(STEADY) == SAME
    assert now(scaled(1.03)) == SAME  # below what counts
    assert now(scaled(1.2)) == "slower"
    assert now(scaled(0.8)) == "faster"
    noisy = [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2]
    assert now(scaled(1.2, noisy), noisy) == SAME
    assert now(scaled(1.15, noisy)) == SAME
    assert now(scaled(2.0, noisy), noisy) == "slower"
    assert now(scaled(0.5, noisy), noisy) == "faster"


def test_nothing_is_said_without_a_control() -> None:
    assert verdict({"cpu": STEADY}, {"cpu": scaled(2.0)}) == SAME
    assert verdict({"cpu": STEADY, "copy": STEADY}, {"cpu": scaled(2.0)}) == SAME


def test_compare_takes_out_what_the_machine_did() -> None:
    """A change has to show by the clock, and by every control."""
    old = {"cpu": STEADY, "eager": STEADY, "copy": STEADY}
    for factor in (0.5, 1.5):
        assert verdict(old, {name: scaled(factor) for name in old}) == SAME
        assert verdict(old, old | {name: scaled(factor) for name in ("eager", "copy")}) == SAME
        assert verdict(old, old | {"cpu": scaled(factor), "copy": scaled(factor)}) == SAME
    assert verdict(old, {"cpu": scaled(2.0), "eager": scaled(1.5), "copy": scaled(1.5)}) == "slower"
    assert verdict(old, {"cpu": scaled(0.4), "eager": scaled(0.8), "copy": scaled(0.8)}) == "faster"


def test_the_controls_say_how_large_the_noise_is() -> None:
    """Their code is the same in both: 1.1 between them is 1.1 that may be between anything, and more
    where there are few cases to tell it from."""
    old = {"cpu": STEADY, "eager": STEADY, "copy": STEADY}
    moved = {"eager": STEADY, "copy": scaled(1.1)}
    assert verdict(old, moved | {"cpu": scaled(1.3)}) == SAME
    (change,) = compare.compare(record_of(old), record_of(moved | {"cpu": scaled(2.0)}))
    assert change.verdict == "slower"
    assert change.factor == pytest.approx(2.0 / 1.1)
    assert change.floor == pytest.approx(1.1**6)
    cases = [Case("f_distill", (8, size)) for size in (1, 2, 3)]
    before, after = (Record({}, {}) for _ in range(2))
    for case, copy in zip(cases, (1.0, 1.04, 1.5), strict=True):
        before.results += record_of(old, case).results
        after.results += record_of({"cpu": STEADY, "eager": STEADY, "copy": scaled(copy)}, case).results
    floors = [change.floor for change in compare.compare(before, after)]
    assert floors == pytest.approx([1.04**4, 1.04**4, 1.5])


def test_compare_reports_what_broke_and_what_is_missing() -> None:
    old, new = record_of({"cpu": STEADY, "copy": STEADY}), record_of({"cpu": [], "copy": STEADY}, cpu="wrong result")
    (change,) = compare.compare(old, new)
    assert change.verdict == "broken"
    assert "broken  cpu f_distill forward+backward cifar10 float32: wrong result" in compare.report([change], old, new)
    other = record_of({"cpu": STEADY}, Case("f_distill", SHAPES["sd15"]))
    with pytest.raises(ValueError, match="no case in common"):
        compare.compare(old, other)
    lost = record_of({"cpu": STEADY, "cuda": STEADY, "copy": STEADY})
    cpu, cuda = compare.compare(lost, record_of({"cpu": STEADY, "copy": STEADY}))
    assert (cpu.verdict, cuda.verdict, cuda.broken) == (SAME, "broken", "it was not measured")
    chosen = replace(record_of({"cpu": STEADY, "copy": STEADY}), command=["--contender=cpu,copy"])
    assert len(compare.compare(lost, chosen)) == 1
    with pytest.raises(ValueError, match="fewer than 6 rounds"):
        compare.compare(record_of({"cpu": [1.0] * 5}), new)
    without_kernels = record_of({"reference": STEADY}, Case("to_x0", SHAPES["sd15"]))
    assert len(compare.compare(without_kernels, without_kernels)) == 1
    new.machine["processor"] = "b"
    assert "warning: other machines: a before, b now" in compare.report([change], old, new)


def test_nothing_is_said_from_worthless_figures() -> None:
    old = record_of({"cpu": STEADY, "copy": STEADY})
    unsteady = scaled(9.0, [1.0, 1.5, 1.0, 1.5, 1.0, 1.5, 1.0])
    for new, doubt in (
        (record_of({"cpu": scaled(9.0), "copy": STEADY}, load=3.0), "load"),
        (record_of({"cpu": unsteady, "copy": STEADY}), "spread"),
        (record_of({"cpu": scaled(9.0)[:5], "copy": STEADY}), "rounds"),  # of an interruption
    ):
        lines = compare.report(compare.compare(old, new), old, new).splitlines()
        assert lines == [
            "1 compared with abc of 2026-01-31: 0 broken, 0 slower, 0 faster, 1 no difference seen",
            f"1 from figures that are worthless: {DOUBTS[doubt]}",
        ]


def test_reports() -> None:
    old, new = record_of({"cpu": STEADY, "copy": STEADY}), record_of({"cpu": scaled(2.0), "copy": STEADY})
    assert compare.report(compare.compare(old, new), old, new).splitlines() == [
        "slower  cpu f_distill forward+backward cifar10 float32: 2.00 times as long (1.96 to 2.04; noise: up to 1.05)",
        "1 compared with abc of 2026-01-31: 0 broken, 1 slower, 0 faster, 0 no difference seen",
    ]


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_the_same_code_is_rarely_said_to_have_changed(drift: float) -> None:
    """Rounds of a busy machine: skewed, with bursts that last several of them, and, with a drift, between two records
    something else for every contender."""
    draw = np.random.default_rng(7)

    def rounds(count: int) -> dict[str, list[float]]:
        burst = np.repeat(draw.random(5) < 0.3, 3) * 0.2 * draw.random(15)
        return {
            name: ((1 + 0.05 * draw.exponential(1.0, count) + burst) * np.exp(drift * draw.normal())).tolist()
            for name in ("cpu", "eager", "copy")
        }

    verdicts = [verdict(rounds(15), rounds(15)) for _ in range(500)]
    assert sum(found != SAME for found in verdicts) <= compare.RATE * len(verdicts)
    assert verdict(rounds(15), rounds(15) | {"cpu": scaled(6.0, rounds(15)["cpu"])}) == "slower"


@pytest.mark.parametrize(
    ("factor", "status", "word"), [(2.0, 1, "slower"), (0.5, 0, "faster"), (1.01, 0, "1 no difference seen")]
)
def test_exit_status_of_compare(
    factor: float,
    status: int,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "old.json"
    arguments = ["--op", "f_weights", "--shape", "4,4", "--device", "cpu"]
    monkeypatch.setattr(
        command_line,
        "measure",
        lambda case, plan: record_of({"cpu": scaled(factor), "eager": STEADY, "copy": STEADY}, case).results,
    )
    (case,) = command_line.parse(arguments).cases
    record_of({"cpu": STEADY, "eager": STEADY, "copy": STEADY}, case).write(path)
    assert command_line.main([*arguments, "--compare", str(path)]) == status
    output = capsys.readouterr()
    assert word in output.out
    assert ("measured again" in output.err) == (factor != 1.01)


def test_an_interrupted_second_measurement_confirms_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Case] = []

    def fake(case: Case, plan: Plan) -> list[Result]:
        if seen:
            raise Interrupted(15)
        seen.append(case)
        return record_of({"cpu": scaled(2.0), "copy": STEADY}, case).results

    path = tmp_path / "old.json"
    arguments = ["--op", "f_weights", "--shape", "4,4", "--device", "cpu"]
    monkeypatch.setattr(command_line, "measure", fake)
    record_of({"cpu": STEADY, "copy": STEADY}, command_line.parse(arguments).cases[0]).write(path)
    assert command_line.main([*arguments, "--compare", str(path)]) == 143
    assert "0 slower, 0 faster, 1 no difference seen" in capsys.readouterr().out


def test_what_seems_slower_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "old.json"
    arguments = ["--op", "f_distill", "--mode", "forward", "--device", "cpu", "--no-compile", "--compare", str(path)]
    seen: list[str] = []

    def fake(case: Case, plan: Plan) -> list[Result]:
        """cifar10 is slow the first time, sd15 always."""
        slow = case.name == "sd15" or (case.name == "cifar10" and "cifar10" not in seen)
        seen.append(case.name)
        return record_of({"cpu": scaled(2.0 if slow else 1.0), "copy": STEADY}, case).results

    cases = command_line.parse([*arguments[:-2]]).cases
    old = new_record("cpu", [])
    old.results = [r for case in cases for r in record_of({"cpu": STEADY, "copy": STEADY}, case).results]
    old.write(path)
    monkeypatch.setattr(command_line, "measure", fake)
    assert command_line.main(arguments) == 1
    output = capsys.readouterr()
    assert seen == [*SHAPES, "cifar10", "sd15"]
    assert "measured again" in output.err
    assert "slower  cpu f_distill forward sd15" in output.out
    assert "cifar10 float32: " not in output.out
    assert f"{len(SHAPES)} compared with" in output.out
