"""The benchmark: what it times is right, what is wrong gets no time, and noise is not taken for a change."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fdistill_ops.bench import __main__ as command_line
from fdistill_ops.bench import baselines, check, clock, compare, cost, docs, measure, ops, plots, table
from fdistill_ops.bench.cases import MODES, SHAPES, Case, batch_sweep, shape_of, size_name, size_sweep
from fdistill_ops.bench.measure import Plan
from fdistill_ops.bench.overhead import measure_overhead
from fdistill_ops.bench.progress import Progress
from fdistill_ops.bench.record import Overhead, Record, Result, new_record

import fdistill_ops as fd

pytestmark = pytest.mark.no_poison

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (6, 3, 8, 10)
BRIEF = Plan(rounds=2, seconds=0.0, compile=False)
fused = pytest.mark.skipif("cpu" not in fd.available_backends(), reason="the compiled module is not built")


@pytest.fixture(autouse=True)
def few_sets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that no cache holds are for measuring."""
    if request.node.name != "test_inputs_rotate_beyond_the_caches":
        monkeypatch.setattr(measure, "_MOST_SETS", 3)


def by_name(results: list[Result]) -> dict[str, Result]:
    return {result.contender: result for result in results}


# ----------------------------------------------------------------------------------------------- what is timed is right

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
    plan = Plan(rounds=1, seconds=0.0, contenders=frozenset({"compile"}))
    (result,) = measure.measure(Case("distribution_matching", SHAPE), plan)
    assert result.error is None
    assert result.first_call is not None
    assert result.first_call > 10 * result.seconds.median


# --------------------------------------------------------------------------------------------- a wrong result, no time


def wrong_backend(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """The C++ back end with something changed in what it returns."""
    from fdistill_ops.backends import cpu

    original = cpu.f_distill

    def f_distill(*arguments: Any) -> Any:
        loss, gradient, *rest = original(*arguments)
        return (*change(loss, gradient), *rest)

    monkeypatch.setattr(cpu, "f_distill", f_distill)


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
    arguments = [
        "--op",
        "distribution_matching",
        "--mode",
        "forward",
        "--no-compile",
        "--rounds",
        "1",
        "--device",
        "cpu",
    ]
    shapes = ["--shape", "4,4", "--shape", "4,5", "--shape", "4,6"]
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


def test_ctrl_c_in_a_compiler() -> None:
    """Which makes an error of its own of it."""

    def step(i: int) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                time.sleep(0.01)
        except KeyboardInterrupt:
            raise RuntimeError("the compiler died") from None

    measurement = measure.Measurement(Case("f_weights", SHAPE, mode="forward"), BRIEF)
    before = signal.getsignal(signal.SIGINT)
    with measure.interruptible(), pytest.raises(KeyboardInterrupt):
        measurement.is_right(measure.Contender("a", "compile", step, list))
    assert signal.getsignal(signal.SIGINT) is before


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


# ---------------------------------------------------------------------------------------------------- cases and traffic


def test_model_bytes() -> None:
    n = 6 * 3 * 8 * 10 * 4
    for options, bytes_ in (
        ({}, 4 * n),
        ({"guidance": 7.5}, 5 * n),
        ({"mask": True}, 4 * n + n // 4),
        ({"mode": "forward"}, 4 * n),
        ({"dtype": "bfloat16"}, 2 * n),
    ):
        assert ops.model_bytes(Case("f_distill", SHAPE, **options)) == bytes_
    assert ops.model_bytes(Case("dmd2", SHAPE)) == 6 * n
    assert ops.model_bytes(Case("score_identity", SHAPE)) == 6 * n
    assert ops.model_bytes(Case("to_x0", SHAPE, mode="forward")) == 3 * n
    assert ops.model_bytes(Case("gan_discriminator", SHAPE, mode="forward")) == 2 * 6 * 4 * 4


def test_shapes_by_name() -> None:
    assert shape_of("flux") == shape_of("sd3") == ("sd3/flux", (8, 16, 128, 128))
    assert shape_of("wan-video")[1] == (1, 16, 21, 60, 104)
    assert shape_of("3,4") == ("", (3, 4))
    for text in ("sd99", "3,x", "0,4", ""):
        with pytest.raises(ValueError, match="must be"):
            shape_of(text)


def test_sweeps() -> None:
    for itemsize in (2, 4, 8):
        sizes = size_sweep(1 << 30, itemsize)
        bytes_ = [b * n * itemsize for b, n in sizes.values()]
        assert bytes_ == [1024 * 4**k for k in range(11)]
        assert list(sizes) == [size_name(b) for b in bytes_]
    assert list(batch_sweep(4 << 20, 4)) == [f"batch {2**k}" for k in range(7)]


def test_inputs_rotate_beyond_the_caches() -> None:
    case = Case("f_distill", (64, 3, 64, 64))
    sets = measure._input_sets(case)
    bytes_ = sum(t.numel() * t.itemsize for inputs in sets for t in inputs.values())
    assert bytes_ >= 4 * clock.cache_bytes("cpu")
    addresses = {inputs["x"].data_ptr() for inputs in sets}
    assert len(addresses) == len(sets) > 1
    assert not torch.equal(sets[0]["x"], sets[1]["x"])
    assert len(measure._input_sets(replace(case, warm=True))) == 1


def test_calls_rotate_over_the_sets() -> None:
    measurement = measure.Measurement(Case("f_weights", SHAPE, mode="forward"), BRIEF)
    assert measurement.rotation(0, 5) == [0, 1, 2, 0, 1]
    assert measurement.rotation(2, 2) == [2, 0]


@pytest.mark.parametrize(("warm", "calls", "seen"), [(False, [1, 2], [1, 2, 0, 1, 2]), (True, [0, 0, 0], [0] * 6)])
def test_sets_settle_untimed(warm: bool, calls: list[int], seen: list[int]) -> None:
    """Every set has its turn before any is timed; a single one as many as are timed."""
    found: list[int] = []
    measurement = measure.Measurement(Case("f_weights", SHAPE, mode="forward", warm=warm), BRIEF)
    assert measurement.seconds(measure.Contender("a", "eager", found.append, list), calls) > 0
    assert found == seen


def test_rounds_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every round each contender is timed once, none always behind the same other."""
    order: list[str] = []
    timed = clock.seconds_per_call
    contenders = [measure.Contender(name, "eager", lambda i, name=name: order.append(name), list) for name in "abc"]
    measurement = measure.Measurement(Case("f_weights", SHAPE, mode="forward"), Plan(rounds=4, seconds=0.0))
    measurement.results = {name: Result(measurement.case, name, "eager", 1) for name in "abc"}
    measurement.time(contenders)
    assert timed is measure.seconds_per_call
    rounds = "".join(order)[-48:]  # on each of three sets untimed, on one timed
    shifted = ["aaaabbbbcccc", "bbbbccccaaaa", "ccccaaaabbbb", "aaaabbbbcccc"]
    assert [rounds[i : i + 12] for i in range(0, 48, 12)] == shifted
    assert [len(result.rounds) for result in measurement.results.values()] == [4, 4, 4]


def test_nobody_frees_the_gradients_of_another() -> None:
    """A call that is timed finds the gradient it has left itself on that set, as in a training loop."""
    measurement = measure.Measurement(Case("f_distill", SHAPE, mode="forward+backward"), replace(BRIEF, rounds=3))
    found: list[tuple[str, float | None]] = []

    def contender(name: str, value: float) -> measure.Contender:
        def step(i: int) -> None:
            leaf = measurement.leaves[i][0]
            found.append((name, None if leaf.grad is None else leaf.grad.flatten()[0].item()))
            leaf.grad = torch.full_like(leaf, value)

        return measure.Contender(name, "eager", step, list)

    measurement.results = {name: Result(measurement.case, name, "eager", 1) for name in "ab"}
    measurement.time([contender("a", 1.0), contender("b", 2.0)])
    assert {value for name, value in found if name == "a"} == {None, 1.0}
    assert {value for name, value in found if name == "b"} == {None, 2.0}


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    measure.measure(Case("f_weights", SHAPE, mode="forward", threads=before + 1), BRIEF)
    assert torch.get_num_threads() == before


# ------------------------------------------------------------------------------------------------------- what it costs


def test_memory_of_a_step() -> None:
    def step(i: int) -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(3000, dtype=torch.uint8)
        del first
        third = torch.empty(500, dtype=torch.uint8)
        del second, third

    assert cost.extra_memory(step, lambda: None, "cpu") == 4000


@fused
def test_memory_of_the_losses() -> None:
    """A gradient beside what there was: also where it comes from the pool, which PyTorch does not see."""
    for shape in ((4, 3, 16, 16), (8, 4, 256, 256)):
        case = Case("distribution_matching", shape)
        result = by_name(measure.measure(case, BRIEF))["cpu"]
        assert result.extra_memory is not None
        assert case.tensor_bytes <= result.extra_memory <= case.tensor_bytes + 64


def test_names_of_launches() -> None:
    counted = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
    for name in counted:
        assert cost._LAUNCH.match(name)
    for name in ("cudaMemcpyAsync", "cudaDeviceSynchronize", "aten::add", "void kernel<float>"):
        assert not cost._LAUNCH.match(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_costs() -> None:
    x = torch.ones(1000, device="cuda")
    assert cost.launches(lambda i: x + 1) == 1
    assert cost.host_synchronizations(lambda i: x + 1) == 0
    assert cost.host_synchronizations(lambda i: x.sum().item()) == 1
    assert cost.extra_memory(lambda i: x + 1, lambda: None, "cuda") >= 4000


def test_overhead() -> None:
    entries = measure_overhead("cpu", rounds=2, calls=3)
    assert {entry.op for entry in entries} == {*ops.OPS, "torch mse_loss"} - (
        set() if "cpu" in fd.available_backends() else {op for op in ops.OPS if ops.OPS[op].fused}
    )
    for entry in entries:
        assert len(entry.forward) == 2
        assert min(entry.forward) > 0
        differentiable = entry.op == "torch mse_loss" or bool(ops.OPS[entry.op].leaves)
        assert len(entry.backward) == (2 if differentiable else 0)


def test_no_gradient_stays_behind() -> None:
    measurement = measure.Measurement(Case("distribution_matching", SHAPE), BRIEF)
    measurement.run()
    measurement.release()
    assert all(leaf.grad is None for leaves in measurement.leaves for leaf in leaves)


# -------------------------------------------------------------------------------------------------------------- records


def record_of(times: dict[str, list[float]], case: Case | None = None, **errors: str) -> Record:
    kinds = {"cpu": "fused", "cuda": "fused"}
    case = case or Case("f_distill", SHAPES["cifar10"], "cifar10")
    results = [
        Result(case, name, kinds.get(name, name), 4000, rounds, error=errors.get(name))
        for name, rounds in times.items()
    ]
    return Record({"processor": "a"}, {}, results, started="2026-01-31T00:00:00+00:00")


def test_records_survive_a_file(tmp_path: Path) -> None:
    record = new_record("cpu", ["--quick"])
    record.results = measure.measure(Case("f_distill", SHAPE, guidance=2.5), BRIEF)
    record.overhead = measure_overhead("cpu", rounds=1, calls=1)
    path = tmp_path / "record.json"
    record.write(path)
    assert Record.read(path) == record
    content = json.loads(path.read_text())
    assert set(content) == {
        "schema", "command", "started", "commit", "machine", "versions", "results", "overhead",
    }  # fmt: skip
    assert {"torch", "python", "fdistill_ops"} <= set(content["versions"])
    documented = re.findall(r'"(\w+)":', str(sys.modules[Record.__module__].__doc__))
    assert set(documented) >= set(content) | set(content["results"][0]) | set(content["overhead"][0])
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


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
    a = Result(Case("f_distill", SHAPE), "cpu", "fused", 8, [1.0, 2.0, 1.0, 2.0, 2.0])
    b = Result(Case("f_distill", SHAPE), "eager", "eager", 8, [3.0, 6.0, 3.0, 6.0, 6.0])
    assert a.ratio(b) == 3.0
    assert a.ratio(None) is None
    assert a.ratio(replace(b, rounds=[])) is None


# -------------------------------------------------------------------------------------------------------------- compare

STEADY = [1.0, 1.01, 0.99, 1.0, 1.0]


def scaled(factor: float, rounds: list[float] | None = None) -> list[float]:
    return [factor * value for value in rounds or STEADY]


def verdict(old: dict[str, list[float]], new: dict[str, list[float]]) -> str:
    (change,) = compare.compare(record_of(old), record_of(new))
    return "slower" if change.slower else "faster" if change.faster else "same"


def test_compare_tells_a_change_from_noise() -> None:
    assert verdict({"cpu": STEADY}, {"cpu": STEADY}) == "same"
    assert verdict({"cpu": STEADY}, {"cpu": scaled(1.03)}) == "same"  # below what counts
    assert verdict({"cpu": STEADY}, {"cpu": scaled(1.2)}) == "slower"
    assert verdict({"cpu": STEADY}, {"cpu": scaled(0.8)}) == "faster"
    noisy = [0.8, 0.9, 1.0, 1.1, 1.2]
    assert verdict({"cpu": noisy}, {"cpu": scaled(1.2, noisy)}) == "same"
    assert verdict({"cpu": STEADY}, {"cpu": scaled(1.2, noisy)}) == "same"
    assert verdict({"cpu": noisy}, {"cpu": scaled(2.0, noisy)}) == "slower"


def test_compare_takes_out_what_the_machine_did() -> None:
    old = {"cpu": STEADY, "eager": STEADY, "copy": STEADY}
    assert verdict(old, {name: scaled(1.5) for name in old}) == "same"
    assert verdict(old, {"cpu": scaled(2.0), "eager": scaled(1.5), "copy": scaled(1.5)}) == "slower"
    assert verdict(old, {"cpu": scaled(1.5), "eager": STEADY, "copy": scaled(1.5)}) == "slower"
    assert verdict(old, {"cpu": STEADY, "eager": scaled(0.5), "copy": scaled(0.5)}) == "same"


def test_compare_reports_what_broke_and_what_is_missing() -> None:
    old, new = record_of({"cpu": STEADY, "copy": STEADY}), record_of({"cpu": [], "copy": STEADY}, cpu="wrong result")
    (change,) = compare.compare(old, new)
    assert change.slower
    assert not change.faster
    assert "broken  cpu f_distill forward+backward cifar10 float32: wrong result" in compare.report([change], old, new)
    other = record_of({"cpu": STEADY}, Case("f_distill", SHAPES["sd15"]))
    with pytest.raises(ValueError, match="no case in common"):
        compare.compare(old, other)
    lost = record_of({"cpu": STEADY, "cuda": STEADY, "copy": STEADY})
    cpu, cuda = compare.compare(lost, record_of({"cpu": STEADY, "copy": STEADY}))
    assert (cpu.slower, cuda.slower, cuda.broken) == (False, True, "it was not measured")
    chosen = replace(record_of({"cpu": STEADY, "copy": STEADY}), command=["--contender=cpu,copy"])
    assert len(compare.compare(lost, chosen)) == 1
    with pytest.raises(ValueError, match="fewer than 3 rounds"):
        compare.compare(record_of({"cpu": [1.0, 1.0]}), new)
    without_kernels = record_of({"reference": STEADY}, Case("to_x0", SHAPES["sd15"]))
    assert len(compare.compare(without_kernels, without_kernels)) == 1
    new.machine["processor"] = "b"
    assert "warning: other machines: a before, b now" in compare.report([change], old, new)


@fused
def test_exit_status_of_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--op", "f_weights", "--shape", "6,3,8,8", "--rounds", "3", "--no-compile", "--device", "cpu"]
    path = tmp_path / "old.json"
    assert command_line.main([*arguments, "--json", str(path)]) == 0
    old = Record.read(path)
    for factor, status, word in ((100.0, 0, "faster"), (0.01, 1, "slower")):
        changed = replace(
            old, results=[replace(result, rounds=scaled(factor, result.rounds)) for result in old.results]
        )
        for result in changed.results:  # the machine is as it was
            if result.kind != "fused":
                result.rounds = scaled(100.0, result.rounds)
        changed.write(path)
        assert command_line.main([*arguments, "--compare", str(path)]) == status
        assert f"{word}  cpu f_weights" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- tables and plots


def example() -> Record:
    record = record_of({"cpu": [1e-3] * 3, "eager": [4e-3] * 3, "compile": [2e-3] * 3, "copy": [5e-4] * 3})
    record.results[2].first_call = 7.5
    for name, shape in size_sweep(1 << 20, 4).items():
        times = {"cpu": [1e-4] * 3, "eager": [4e-4] * 3, "copy": [5e-5] * 3}
        record.results += record_of(times, Case("f_distill", shape, name)).results
    for name, shape in batch_sweep(1 << 20, 4).items():
        record.results += record_of({"cpu": [1e-4] * 3, "eager": []}, Case("f_distill", shape, name)).results
    return record


def test_table_figures() -> None:
    lines = table.tables(example()).splitlines()
    assert lines[0] == "f_distill, forward+backward, float32, cpu, 1 thread, js, histogram"
    header = re.split(r"\s{2,}", lines[1])
    assert header[-8:] == ["ms", "+-", "GB/s", "of copy", "eager/it", "compile/it", "first call", "memory"]
    assert lines[3].split() == ["cifar10", "cpu", "1.000", "0%", "0.004", "50%", "4.00", "2.00", "-", "-"]
    assert lines[5].split() == ["compile", "2.000", "0%", "0.002", "25%", "2.00", "-", "7.5", "s", "-"]
    assert len({len(line) for line in lines[3:6]}) == 1  # aligned
    assert "\033" not in "".join(lines)
    assert "\033[1m" in table.tables(example(), colour=True)


def test_markdown_tables() -> None:
    text = table.tables(example(), markdown=True)
    assert "| cifar10 | cpu | 1.000 | 0% | 0.004 | 50% | 4.00 | 2.00 | - | - |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    written = plots.plot(example(), tmp_path / "figures")
    assert sorted(path.name for path in written) == ["batch.png", "ratios.png", "roofline.png"]
    assert sorted(written) == sorted((tmp_path / "figures").iterdir())
    for path in written:
        assert imread(path).std() > 0.05
    assert plots.plot(record_of({"cpu": []}), tmp_path / "none") == []


# --------------------------------------------------------------------------------------------------------- command line


def test_interruption_shows_and_writes_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done: list[Case] = []

    def interrupted(case: Case, plan: Plan) -> list[Result]:
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return record_of({"cpu": STEADY, "eager": scaled(2.0)}, case).results

    monkeypatch.setattr(command_line, "measure", interrupted)
    path = tmp_path / "record.json"
    assert command_line.main(["--op", "f_distill", "--device", "cpu", "--json", str(path)]) == 130
    output = capsys.readouterr()
    assert "interrupted" in output.err
    assert "cifar10" in output.out
    assert "imagenet64" not in output.out
    assert len(Record.read(path).results) == 2


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


@pytest.mark.parametrize(
    "options",
    [
        ["--op", "score_difference", "--mode", "forward+backward"],
        ["--op", "f_weights,gan_generator", "--sweep", "size"],
        ["--contender", "compile", "--no-compile"],
        ["--sweep", "size", "--shape", "4,4"],
        ["--rounds", "2", "--compare", "old.json"],
    ],
    ids=" ".join,
)
def test_what_measures_nothing_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.parse(["--device", "cpu", *options])
    assert error.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_nobody_serves_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    arguments = ["--op", "to_x0", "--contender", "copy", "--shape", "4,4", "--device", "cpu", "--rounds", "1"]
    assert command_line.main([*arguments, "--json", str(path)]) == 0
    if "cpu" in fd.available_backends():
        path.unlink()
        arguments[3] = "cpu"
        assert command_line.main([*arguments, "--json", str(path)]) == 2
        assert not path.exists()
        assert "none of the contenders" in capsys.readouterr().err


def test_unwritable_files_are_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for option, path in (
        ("--json", tmp_path),
        ("--json", Path("/proc/x.json")),
        ("--plot", file),
        ("--plot", file / "a"),
    ):
        with pytest.raises(SystemExit) as error:
            command_line.parse([option, str(path)])
        assert error.value.code == 2
        assert f"argument {option}: " in capsys.readouterr().err
    assert command_line.parse(["--plot", str(tmp_path / "a" / "b")]).plot == tmp_path / "a" / "b"


def test_progress_stays_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    with Progress(2) as progress:
        progress.step("distribution_matching forward+backward sd3/flux bfloat16")
    lines = terminal.getvalue().split("\r\033[K")
    assert max(map(len, lines)) == 39


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "cifar"], "--shape"),
        (["--shape", "7"], "--shape"),
        (["--guidance", "nan"], "--guidance"),
        (["--guidance", "inf"], "--guidance"),
        (["--op", "nothing"], "--op"),
        (["--dtype", "int8"], "--dtype"),
        (["--divergence", "nothing"], "--divergence"),
        (["--contender", "cpuu"], "--contender"),
        (["--rounds", "0"], "--rounds"),
        (["--threads", "0"], "--threads"),
        (["--json", "/no/such/folder/x.json"], "--json"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.parse(arguments)
    assert error.value.code == 2
    assert f"argument {message}" in capsys.readouterr().err


def test_options_make_cases() -> None:
    def cases(*arguments: str) -> list[Case]:
        return command_line.parse(["--device", "cpu", *arguments]).cases

    every = cases()
    assert {case.op for case in every} == set(ops.OPS)
    assert {case.shape for case in every} == set(SHAPES.values())
    assert {case.mode for case in every} == set(MODES)
    assert len(set(every)) == len(every)
    (case,) = cases(
        *("--op", "f_distill", "--shape", "2,3,4", "--mode", "forward", "--dtype", "bfloat16", "--threads", "1"),
        *("--divergence", "fkl", "--guidance", "7.5", "--mask", "--no-histogram", "--warm"),
    )
    assert case == Case("f_distill", (2, 3, 4), "", "forward", "bfloat16", "cpu", 1, "fkl", 7.5, True, False, True)
    assert len(cases("--op", "dmd2", "--shape", "sd3", "--shape", "flux", "--shape", "sd3/flux")) == len(MODES)
    forward = cases("--op", "f_distill", "--sweep", "size", "--mode", "forward")
    assert {case.mode for case in forward} == {"forward"}
    sweep = cases("--sweep", "size", "--dtype", "float32,bfloat16")
    assert sweep[0].tensor_bytes == 1024
    assert {case.dtype for case in sweep} == {"float32", "bfloat16"}
    assert {case.op for case in sweep} == {"f_distill"}
    again = cases("--op", "dmd2", "--op", "f_weights,dmd2", "--mode", "forward", "--shape", "sdxl", "--shape", "2,3")
    assert [(case.op, case.shape) for case in again] == [
        *(("dmd2", shape) for shape in (SHAPES["sdxl"], (2, 3))),
        *(("f_weights", shape) for shape in (SHAPES["sdxl"], (2, 3))),
    ]


def test_quick_compiles_once_and_not_on_a_slow_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    seen: list[tuple[str, bool]] = []

    def measured(case: Case, plan: Plan) -> list[Result]:
        now[0] += seconds
        seen.append((case.label, plan.compile))
        return [Result(case, "cpu", "fused", 1)]

    monkeypatch.setattr(command_line, "measure", measured)
    monkeypatch.setattr(command_line, "measure_overhead", lambda *_: [])
    monkeypatch.setattr(command_line.time, "monotonic", lambda: now[0])
    seconds = 0.1
    assert command_line.main(["--quick", "--device", "cpu"]) == 0
    assert [label for label, compiles in seen if compiles] == ["cifar10"]
    assert len(seen) == 3 + 5 + 8
    assert capsys.readouterr().err == ""
    seen.clear()
    seconds = 4.0
    assert command_line.main(["--quick", "--device", "cpu"]) == 0
    assert not any(compiles for _, compiles in seen)
    assert len(seen) == 5  # what ends within 22 seconds
    assert "torch.compile is left out" in (error := capsys.readouterr().err)
    assert "out of time" in error


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    """Everything that --quick does but compiling, from the command line."""
    arguments = [
        "--quick",
        "--no-compile",
        "--shape",
        "8,3,16,16",
        "--device",
        "cpu",
        "--json",
        "record.json",
        "--plot",
        "figures",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "fdistill_ops.bench", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(fd.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "profiler" not in result.stderr
    assert "\033" not in result.stdout + result.stderr
    record = Record.read(tmp_path / "record.json")
    assert record.machine["cores"] == os.cpu_count()
    assert all(result.error is None for result in record.results)
    assert "host overhead" in result.stdout


@pytest.mark.slow
def test_pytest_benchmark_suite(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider", "bench"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
    assert re.search(r"\d+ passed", result.stdout)


# ---------------------------------------------------------------------------------------------------------------- pages


def test_pages_show_what_the_record_has() -> None:
    record = Record.read(ROOT / docs.RECORD)
    for name in docs.PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        assert docs.render(page, record) == page, f"{name}: python -m fdistill_ops.bench.docs --render"
        assert page.count("<!-- figures:") == page.count("<!-- end of figures -->") > 0
    assert all(result.error is None for result in record.results)


def test_figures_of_the_pages() -> None:
    record = example()
    page = "a\n<!-- figures: float32 -->\nold\n<!-- end of figures -->\nb\n"
    for result in record.results:
        result.case = replace(result.case, threads=2)
    rendered = docs.render(page, record)
    assert "| cifar10 | 1.000 | 4.000 | 2.000 | 0.5000 | 4.00 | 2.00 | 50% |" in rendered.splitlines()
    assert rendered.startswith("a\n<!-- figures: float32 -->\n| shape | ours |")
    assert rendered.endswith("|\n<!-- end of figures -->\nb\n")
    assert "batch" not in rendered
    assert docs.render(rendered, record) == rendered
    with pytest.raises(KeyError):
        docs.render(page.replace("float32", "no-such-table"), record)


def test_pages_are_not_written_from_wrong_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(arguments: Any, record: Record) -> int:
        record.results += record_of({"cpu": []}, cpu="wrong result: value").results
        return 0

    monkeypatch.setattr(docs, "measure_all", measured)
    monkeypatch.setattr(docs, "RECORD", tmp_path / "record.json")
    with pytest.raises(SystemExit) as error:
        docs.measure_pages()
    assert error.value.code == 1
    assert "f_distill cifar10 float32, cpu: wrong result: value" in capsys.readouterr().err


def test_budget() -> None:
    """1.15 copies, and below 64 MiB a tensor the host overhead."""
    record = record_of({"cpu": [1e-3] * 3, "copy": [5e-4] * 3}, Case("f_distill", (256, 3, 32, 32), "cifar10"))
    big = Case("f_distill", (8, 1 << 21), "64 MiB")
    record.results += record_of({"cpu": [5e-3] * 3, "copy": [5e-3] * 3}, big).results
    for result in record.results:
        result.case = replace(result.case, threads=2)
    assert "| cifar10 | - | - | - | - |" in docs.TABLES["budget"](record).splitlines()  # without the overhead
    record.overhead = [Overhead("f_distill", "cpu", "cpu", [30e-6] * 3, [20e-6] * 3)]
    lines = docs.TABLES["budget"](record).splitlines()
    assert f"| cifar10 | {1e-3 / (50e-6 + 1.15 * 5e-4):.2f} | - | - | - |" in lines
    assert f"| 64 MiB | {1 / 1.15:.2f} | - | - | - |" in lines
    assert docs.TABLES["large"](record).splitlines()[2:] == ["| 64 MiB | 5.000 | 5.000 | 100% |"]


def test_commands_of_the_pages_parse() -> None:
    for name in docs.PAGES:
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            found = re.match(r"    fdistill-bench( .*)?$", line)
            if found:
                command_line.parse(["--device", "cpu", *(found[1] or "").split()])
    for options in docs.RUNS:
        assert command_line.parse(["--device", "cpu", *options.split()]).cases
