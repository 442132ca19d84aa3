"""The self-check: right kernels pass, and whatever is wrong with one shows, with a command and a script to see it."""

from __future__ import annotations

import contextlib
import io
import shlex
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops import _selfcheck_cases as calls
from fdistill_ops import backends, selfcheck

pytestmark = pytest.mark.no_poison
needs_cpu = pytest.mark.skipif("cpu" not in fd.available_backends(), reason="there is no compiled module")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[calls.Case]:
    """Small cases of every operation, dtype and layout, not all of their combinations."""
    found = [case for case in calls.cases() if case.small or (case.layout == "contiguous" and case.dtype == "float32")]
    found = found[::2]
    monkeypatch.setattr(calls, "cases", lambda: iter(found))
    assert {case.operation for case in found} == set(calls.OPERATIONS)
    assert {case.dtype for case in found} == set(calls.DTYPES)
    return found


def run(*options: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = selfcheck.main(list(options))
    return status, printed.getvalue()


def test_right_kernels_pass(backend: Backend, few: list[calls.Case]) -> None:
    few[:] = few[:: 6 if backend.name == "triton" and backend.emulated else 1]
    report = selfcheck.run([backend.name], device=backend.device, seed=3)
    assert report.ok and not report.failures
    assert sum(row.cases for row in report.rows) == sum(case.small or not backend.emulated for case in few)
    assert all(0 < row.error <= 1 for row in report.rows)


@pytest.mark.slow
@needs_cpu
def test_every_call_passes_whatever_the_seed() -> None:
    assert selfcheck.run(seed=1).ok
    assert selfcheck.run(["cpu", "reference"], device="cpu", seed=selfcheck._MAX_SEED - 1).ok


def test_each_operation_dtype_and_layout() -> None:
    found = list(calls.cases())
    assert len({case.name for case in found}) == len(found)
    for part in ([case for case in found if case.first], found):
        assert {case.operation for case in part} == set(calls.OPERATIONS)
        assert {(case.operation, case.dtype) for case in part} == {(case.operation, case.dtype) for case in found}
        assert {case.layout for case in part} == {
            "contiguous",
            "channels_last",
            "sliced",
            "broadcast",
            "large",
            "stepped",
        }


def test_arguments_are_laid_out_as_their_names_say() -> None:
    def operands(layout: str) -> tuple[Tensor, Tensor]:
        given = selfcheck.arguments(f"distribution_matching_loss bfloat16 {layout}")
        return given["x"], given["teacher"]

    assert operands("contiguous")[0].is_contiguous()
    for x in operands("channels_last"):
        assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    for x in operands("sliced"):
        assert x.stride(2) > x.shape[3] and x.stride(0) > x[0].numel()
    assert operands("broadcast")[1].stride(0) == 0
    mixed = selfcheck.arguments("f_distill_loss mixed sliced")
    assert len({mixed[name].dtype for name in ("x", "teacher", "fake")}) == 3
    again, other = (selfcheck.arguments("f_weights float32 stepped", seed=seed)["logits"] for seed in (0, 1))
    assert torch.equal(again, selfcheck.arguments("f_weights float32 stepped")["logits"])
    assert not torch.equal(again, other)


# ------------------------------------------------------------------------------------------------------ broken kernels


def wrong_gradient(gradients: Any, results: Any) -> None:
    """The largest element, by 3%: eight roundings of bfloat16."""
    for gradient in gradients:
        if gradient is not None and gradient.numel():
            place = np.unravel_index(int(gradient.nan_to_num(0.0).abs().argmax()), gradient.shape)
            gradient[place] *= 1 + 2.0**-5


def missing_element(gradients: Any, results: Any) -> None:
    for gradient in gradients:
        if gradient is not None:
            gradient[(0,) * gradient.ndim] = torch.nan


def wrong_loss(gradients: Any, results: Any) -> None:
    results.loss.mul_(1.001)


def other_scale(gradients: Any, results: Any) -> None:
    if results.scale is not None:
        results.scale.mul_(2.0)


LOSSES = set(calls.LOSSES)


@needs_cpu
@pytest.mark.parametrize(
    ("break_it", "operations"),
    [
        (wrong_gradient, LOSSES),
        (missing_element, LOSSES),
        (wrong_loss, LOSSES - {"score_difference"}),
        (other_scale, LOSSES - {"score_difference"}),
    ],
)
def test_a_broken_loss_kernel_shows(
    break_it: Callable[[Any, Any], None],
    operations: set[str],
    few: list[calls.Case],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fdistill_ops.backends.cpu import Cpu

    compute = Cpu.compute_loss

    def broken(self: Any, call: Any, gradients: Any, results: Any, *rest: Any) -> None:
        compute(self, call, gradients, results, *rest)
        break_it(gradients, results)

    monkeypatch.setattr(Cpu, "compute_loss", broken)
    status, printed = run("--backend", "cpu", "--backend", "reference", "--seed", "5")
    assert status == 1
    report = selfcheck.run(["cpu", "reference"], seed=5)
    assert {failure.backend for failure in report.failures} == {"cpu"}
    assert {failure.case.operation for failure in report.failures} == operations
    if break_it is not other_scale:  # of float16 alone
        assert len(report.failures) == sum(case.operation in operations for case in few)
    assert f"{len(report.failures)} of {2 * len(few)} calls are off" in printed
    # The first case once more, by what the report says.
    command = next(line for line in printed.splitlines() if line.startswith("    python -m"))
    words = shlex.split(command)[3:]
    status, printed_again = run(*words)
    assert status == 1
    assert report.failures[0].message in printed_again and report.failures[0].message in printed
    with contextlib.redirect_stdout(io.StringIO()) as value:
        exec(report.failures[0].script, {})
    assert "tensor" in value.getvalue()


@needs_cpu
def test_broken_weights_histogram_and_backward_show(few: list[calls.Case], monkeypatch: pytest.MonkeyPatch) -> None:
    from fdistill_ops.backends.cpu import backend as cpu

    weights, scale_gradient = cpu.f_weights, cpu.scale_gradient

    def failed() -> set[str]:
        return {failure.message.split(":")[0] for failure in selfcheck.run(["cpu"]).failures}

    assert failed() == set()
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "f_weights", lambda c: weights(c)._replace(weights=weights(c).weights * (1 + 1e-4)))
        assert failed() == {"value"}
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "f_weights", lambda c: weights(c)._replace(bins=c.bins))
        assert failed() == {"histogram"}
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "scale_gradient", lambda gradient, *rest: scale_gradient(gradient, *rest) * 1.02)
        assert failed() == {"gradient of x"}


@needs_cpu
def test_a_call_that_raises_is_a_failure(few: list[calls.Case], monkeypatch: pytest.MonkeyPatch) -> None:
    from fdistill_ops.backends.cpu import backend as cpu

    def raises(*_: Any) -> None:
        raise MemoryError("nothing left")

    monkeypatch.setattr(cpu, "difference", raises)
    status, printed = run("--backend", "cpu")
    assert status == 1
    assert "MemoryError: nothing left" in printed and " inf " in printed
    n_off = sum(case.operation == "score_difference" for case in few)
    assert f"and {n_off - 10} more" in printed or n_off <= 10


def test_another_shape_or_dtype_is_an_error() -> None:
    expected = calls.Expected(torch.ones(2, 3).numpy(), torch.zeros(2, 3).numpy(), torch.bfloat16)
    assert expected.error(torch.ones(2, 3, dtype=torch.bfloat16))[0] == 0.0
    for wrong in (torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bfloat16)):
        share, message = expected.error(wrong)
        assert share == float("inf") and "expected torch.bfloat16 (2, 3)" in message


# ------------------------------------------------------------------------------------------------------------- options


def test_back_ends_that_are_not_there(few: list[calls.Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its reason; those in an interpreter only where they are named."""
    monkeypatch.setitem(backends._UNAVAILABLE, "cuda", lambda: "no such luck")
    monkeypatch.setattr(calls, "cases", lambda: iter(few[:1]))
    status, printed = run("--device", "cpu")
    assert status == 0
    assert "cuda: not checked: no such luck\n" in printed
    if "triton" in fd.available_backends() and backends.interprets("triton"):
        assert "triton: not checked: its kernels are interpreted here" in printed
    assert "triton  " not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "tritan"], "backends must be one of 'reference', 'cpu'"),
        (["--backend", "reference", "--device", "meta"], "'meta' does not"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["--device", "nowhere"], "device must be a device or its name, got 'nowhere'"),
        (["--seed", "-1"], "seed must be a whole number from 0 to 2147483647, got -1"),
        (["--seed", "x"], "invalid int value: 'x'"),
        (["--case", "f_weights int8 round"], "case must be an operation, a dtype and a layout"),
    ],
)
def test_wrong_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        selfcheck.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="backends must hold names of back ends, got 'cpu'"):
        selfcheck.run("cpu")
    with pytest.raises(TypeError, match="device must be a device or its name, got 3"):
        selfcheck.run(device=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be a whole number"):
        selfcheck.arguments("f_weights float32 contiguous", seed=True)


def test_a_back_end_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_not", lambda name: f"the back end {name!r} is not available: it is broken")
    with pytest.raises(RuntimeError, match="'triton' is not available: it is broken"):
        selfcheck.run(["triton"])


def test_a_back_end_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_not", lambda name: None)
    with pytest.raises(RuntimeError, match="the back end 'cuda' cannot serve cpu tensors"):
        selfcheck.run(["cuda"], device="cpu")


def test_compiling_back_ends_keep_to_a_minute(few: list[calls.Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the calls where nobody named them, and none after it."""
    monkeypatch.setattr(backends, "_why_not", lambda name: None if name in ("triton", "reference") else ": not here")
    monkeypatch.setattr(backends, "interprets", lambda name: False)
    monkeypatch.setattr(backends, "serves", lambda name, device_type: name in ("triton", "reference"))
    monkeypatch.setattr(fd, "use_backend", lambda name: backends.use_backend("reference"))

    def checked(**more: Any) -> tuple[int, str]:
        report = selfcheck.run(device="cpu", **more)
        return sum(row.cases for row in report.rows if row.backend == "triton"), str(report)

    n, printed = checked()
    assert n == sum(case.first for case in few) and "compiled on first use, so a part of the calls" in printed
    assert checked(backends=["triton"])[0] == len(few)
    monkeypatch.setattr(selfcheck, "_LONGEST", 0.0)
    n_first = sum(case.first for case in few)
    n, printed = checked()
    assert n == 0 and f"triton: {n_first} calls left out, a minute was over" in printed


def test_the_command() -> None:
    case = "gan_generator_loss float32 contiguous"
    command = [sys.executable, "-W", "error", "-m", "fdistill_ops.selfcheck", "--backend", "reference", "--case", case]
    result = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    head, row, *rest = result.stdout.splitlines()
    assert head.split()[-4:] == ["dtype", "calls", "error/tolerance", "seconds"]
    assert row.split()[:5] == ["reference", "cpu", "gan_generator_loss", "float32", "1"]
    assert rest[-1].startswith("all 1 calls are right; ")
