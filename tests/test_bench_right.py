"""What the benchmark times is right, and what is wrong gets no time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import BRIEF, SHAPE, by_name, few_sets, fused  # noqa: F401
from fdistill_ops.bench import __main__ as command_line
from fdistill_ops.bench import baselines, check, measure, ops
from fdistill_ops.bench.cases import Case
from fdistill_ops.bench.measure import Plan
from fdistill_ops.bench.record import Record

import fdistill_ops as fd

pytestmark = pytest.mark.no_poison


ALL_CASES = [
    Case(op, SHAPE, mode=mode, dtype=dtype)
    for op in ops.OPS
    for mode in ops.OPS[op].modes()
    for dtype in ("float32", "bfloat16", "float16", "float64")
]


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: f"{case.op}-{case.mode}-{case.dtype}")
def test_every_contender_of_every_operation_is_right(case: Case) -> None:
    results = by_name(measure.measure(case, BRIEF))
    wanted = {"reference", "eager", "copy"} | set(fd.available_backends() if ops.OPS[case.op].fused else ())
    assert {"copy", "eager", "reference"} <= set(results) <= wanted
    for result in results.values():
        assert result.error is None, (result.contender, result.error)
        assert len(result.rounds) == 2
        assert min(result.rounds) > 0


@pytest.mark.parametrize("name", [*fd.DIVERGENCES, "alpha:0.3"])
def test_eager_weights_of_every_divergence(name: str) -> None:
    if fd.get_divergence(name).kind is None:  # registered by another test
        pytest.skip("not a built-in one")
    for histogram in (False, True):
        case = Case("f_distill", SHAPE, divergence=name, histogram=histogram)
        assert all(result.error is None for result in measure.measure(case, BRIEF))


@pytest.mark.parametrize("op", ["f_distill", "distribution_matching", "score_difference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_options(op: str, dtype: str) -> None:
    for options in ({"guidance": 7.5}, {"mask": True}, {"guidance": 2.0, "mask": True}):
        case = Case(op, SHAPE, mode=ops.OPS[op].modes()[-1], dtype=dtype, **options)
        for result in measure.measure(case, BRIEF):
            assert result.error is None, (options, result.contender, result.error)


def test_expected_results_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ops.OPS:
        for mask in (False, True) if op in ops.MATCHING else (False,):
            case = Case(op, SHAPE, mode=ops.OPS[op].modes()[-1], mask=mask)
            inputs = ops.make_inputs(case, 0)
            monkeypatch.setattr(check, "_CHUNK", 1 << 22)
            whole = check.expected(case, inputs)
            monkeypatch.setattr(check, "_CHUNK", 2 * 240)
            for a, b in zip(whole, check.expected(case, inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_compiled_formulas_are_right() -> None:
    plan = Plan(rounds=1, seconds=0.0, contenders=frozenset({"compile"}), costs=False)
    (result,) = measure.measure(Case("gan_generator", SHAPE), plan)
    assert result.error is None
    assert result.first_call is not None
    assert result.first_call > 10 * max(result.rounds)


def wrong_backend(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """The C++ back end with something changed in what it returns."""
    from fdistill_ops.backends.cpu import backend as cpu

    original = cpu.loss

    def loss(*arguments: Any) -> Any:
        result = original(*arguments)
        loss, gradient = change(result.loss, result.gradients[0])
        return result._replace(loss=loss, gradients=(gradient, None, None))

    monkeypatch.setattr(cpu, "loss", loss)


def one_element(loss: torch.Tensor, gradient: torch.Tensor) -> Any:
    gradient.view(-1)[17] *= 1.01
    return loss, gradient


WRONG = {
    "loss": lambda loss, gradient: (loss * 1.0001, gradient),
    "gradient": lambda loss, gradient: (loss, gradient * 1.0001),
    "element": one_element,
    "nan": lambda loss, gradient: (loss, gradient.index_fill_(0, torch.tensor(1), float("nan"))),
}


@fused
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_gets_no_time(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong_backend(monkeypatch, WRONG[name])
    path = tmp_path / "record.json"
    arguments = ["--op", "f_distill", "--shape", "6,3,8,8", "--mode", "forward+backward", "--rounds", "2"]
    assert command_line.main([*arguments, "--no-compile", "--device", "cpu", "--json", str(path)]) == 1
    output = capsys.readouterr()
    (line,) = (line for line in output.out.splitlines() if re.search(r"\bcpu +wrong", line))
    assert re.search(r"cpu +wrong result: (value|gradient 1): off by \S+ of its size, 7\.6e-06 allowed$", line)
    assert "wrong result" in output.err
    results = by_name(Record.read(path).results)
    assert results["cpu"].rounds == []
    assert results["cpu"].extra_memory is None
    assert len(results["eager"].rounds) == 2


def test_a_contender_that_raises_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(baselines, "f_distill", broken)
    results = by_name(measure.measure(Case("f_distill", SHAPE), BRIEF))
    assert results["eager"].error == "RuntimeError: no such kernel"
    assert results["eager"].rounds == []
    assert len(results["reference"].rounds) == 2


def test_a_case_that_fails_does_not_lose_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = measure.make_inputs

    def no_memory(case: Case, seed: int) -> Any:
        if case.shape == (4, 5):
            raise RuntimeError("not enough memory\nat some place")
        return made(case, seed)

    monkeypatch.setattr(measure, "make_inputs", no_memory)
    path = tmp_path / "record.json"
    arguments = ["--op", "distribution_matching", "--mode", "forward", "--no-compile", "--rounds", "1"]
    shapes = ["--device", "cpu", "--shape", "4,4", "--shape", "4,5", "--shape", "4,6"]
    assert command_line.main([*arguments, *shapes, "--json", str(path)]) == 1
    assert "RuntimeError: not enough memory\n" in capsys.readouterr().out
    groups = Record.read(path).groups()
    assert [[bool(result.rounds) for result in group] for group in groups][1] == [False]
    assert all(result.rounds for group in groups[::2] for result in group)


def test_what_is_wrong_with_the_check_is_not_the_contenders_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(check, "expected", broken)
    (result,) = measure.measure(Case("f_distill", SHAPE), BRIEF)
    assert (result.kind, result.error) == ("failed", "ZeroDivisionError: float division by zero")


def test_masks_are_not_empty() -> None:
    for result in measure.measure(Case("f_distill", (3, 1), mask=True), BRIEF):
        assert result.error is None


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_an_operation_without_kernels_can_be_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.OPS["gan_generator"]
    wrong = {"reference": "ours", "eager": "eager"}[name]

    def call(case: Case, inputs: Any) -> Any:
        factor = 1.5 if inputs["fake"].dtype is torch.float32 else 1.0  # not the expected one, which is wide
        return lambda: factor * getattr(right, wrong)(case, inputs)()

    monkeypatch.setitem(ops.OPS, "gan_generator", replace(right, **{wrong: call}))
    arguments = ["--op", "gan_generator", "--shape", "4,4", "--rounds", "1", "--no-compile", "--device", "cpu"]
    assert command_line.main(arguments) == 1
    output = capsys.readouterr()
    assert output.out.count("wrong result") == 2  # both modes
    assert "error: wrong results or errors" in output.err


def test_differences_are_found() -> None:
    want = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    assert check.difference([want.float()], [want], 1e-6) is None
    assert check.difference([], [], 0.0) is None
    bad = want.clone()
    bad[999] += 1e-4
    assert "off by 6.3e-05" in str(check.difference([bad], [want], 1e-5))
    bad[999] = torch.inf
    assert "off by inf" in str(check.difference([bad], [want], 1e-5))
    assert "shape" in str(check.difference([want[:1]], [want], 1.0))
    assert "0 results, 1 expected" in str(check.difference([], [want], 1.0))
