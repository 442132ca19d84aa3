"""Cases, their inputs and traffic, rounds, and what a call costs beside time."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from bench_cases import BRIEF, SHAPE, by_name, few_sets, fused  # noqa: F401
from fdistill_ops.bench import clock, cost, measure, ops
from fdistill_ops.bench.cases import MODES, Case, batch_sweep, shape_of, size_name, size_sweep
from fdistill_ops.bench.measure import Plan
from fdistill_ops.bench.overhead import measure_overhead
from fdistill_ops.bench.record import Result

import fdistill_ops as fd

pytestmark = pytest.mark.no_poison


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


def test_inputs_rotate_beyond_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_MOST_SETS", 64)
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 20)
    case = Case("f_distill", (16, 3, 32, 32))
    sets = measure._input_sets(case)
    bytes_ = sum(t.numel() * t.itemsize for inputs in sets for t in inputs.values())
    assert bytes_ >= 4 << 20
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
    seconds, forward = measurement.seconds(measure.Contender("a", "eager", found.append, list), calls)
    assert seconds > 0
    assert forward is None
    assert found == seen


def test_forward_and_backward_are_timed_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward takes 3 s, backward 2, and whoever reads the clock nothing."""
    now = [0.0]
    done: list[tuple[str, Any]] = []

    def part(name: str, seconds: float) -> Any:
        def run(value: Any) -> Any:
            done.append((name, value))
            now[0] += seconds
            return f"value {value}"

        return run

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    forward, backward = part("forward", 3.0), part("backward", 2.0)
    assert clock.seconds_per_call(forward, backward, [0], [1, 0], "cpu") == (5.0, 3.0)
    assert done[-2:] == [("forward", 0), ("backward", "value 0")]
    assert clock.seconds_per_call(forward, None, [], [1, 0], "cpu") == (3.0, None)
    result = Result(Case("f_distill", SHAPE), "cpu", "fused", 1)
    result.add(5.0, 3.0)
    result.add(3.0, None)
    assert (result.rounds, result.forward, result.backward) == ([5.0, 3.0], [3.0], [2.0])


@fused
def test_who_has_parts() -> None:
    plan = replace(BRIEF, contenders=frozenset({"cpu", "eager", "copy"}))
    for mode in MODES:
        results = by_name(measure.measure(Case("f_distill", SHAPE, mode=mode), plan))
        for name in results:
            parts = 2 if mode == "forward+backward" and name != "copy" else 0
            assert (len(results[name].forward), len(results[name].backward)) == (parts, parts)


def test_the_load_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The higher of that before and that after, for each core."""
    loads = iter([3.0, 1.0, 1.0, 5.0])
    monkeypatch.setattr(clock.os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    monkeypatch.setattr(clock.os, "cpu_count", lambda: 2)
    for load in (1.5, 2.5):
        found = measure.measure(Case("f_weights", SHAPE, mode="forward"), BRIEF)
        assert {result.load for result in found} == {load}


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


def test_patience_ends_with_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes ten minutes."""
    now = [0.0]

    def forward(i: int) -> None:
        now[0] += 600.0

    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    contenders = [measure.Contender(name, "eager", forward, list) for name in "ab"]
    for patience, rounds in ((6.0, 1), (9e9, 7)):
        plan = replace(BRIEF, rounds=7, patience=patience)
        measurement = measure.Measurement(Case("f_weights", SHAPE, mode="forward"), plan)
        measurement.results = {name: Result(measurement.case, name, "eager", 1) for name in "ab"}
        measurement.time(contenders)
        assert [len(result.rounds) for result in measurement.results.values()] == [rounds] * 2


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


def test_threads_and_the_collector_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    before, frozen, within = torch.get_num_threads(), gc.get_freeze_count(), []
    monkeypatch.setattr(measure, "load_average", lambda *_: within.append(gc.get_freeze_count()))
    measure.measure(Case("f_weights", SHAPE, mode="forward", threads=before + 1), BRIEF)
    assert torch.get_num_threads() == before
    assert gc.get_freeze_count() == frozen
    assert min(within) > frozen


def test_memory_of_a_step() -> None:
    def call() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(3000, dtype=torch.uint8)
        del first
        third = torch.empty(500, dtype=torch.uint8)
        del second, third

    starts = mock.Mock(wraps=cost.profile)
    with mock.patch.object(cost, "profile", starts):
        assert cost.extra_memory([call, lambda: None, call], lambda: None, "cpu") == [4000, 0, 4000]
    assert starts.call_count == 1  # each takes a while


@fused
def test_memory_of_the_losses() -> None:
    """A gradient beside what there was: also where it comes from the pool, which PyTorch does not see."""
    plan = replace(BRIEF, costs=True, contenders=frozenset({"cpu"}))
    for shape in ((4, 3, 16, 16), (8, 4, 256, 256)):
        case = Case("distribution_matching", shape)
        result = by_name(measure.measure(case, plan))["cpu"]
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
    assert cost.launches(lambda: x + 1) == 1
    assert cost.host_synchronizations(lambda: x + 1) == 0
    assert cost.host_synchronizations(lambda: x.sum().item()) == 1
    assert cost.extra_memory([lambda: x + 1], lambda: None, "cuda")[0] >= 4000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_parts_on_a_gpu() -> None:
    x = torch.ones(1 << 24, device="cuda")
    seconds, forward = clock.seconds_per_call(
        lambda i: x + 1, lambda value: (value + 1, value + 2), [0], [0] * 9, "cuda"
    )
    assert forward is not None
    assert 0 < forward < seconds


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
        assert entry.load is not None


def test_no_gradient_stays_behind() -> None:
    measurement = measure.Measurement(Case("distribution_matching", SHAPE), BRIEF)
    measurement.run()
    measurement.release()
    assert all(leaf.grad is None for leaves in measurement.leaves for leaf in leaves)
