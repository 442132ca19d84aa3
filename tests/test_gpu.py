"""What shows on a GPU alone: synchronisation, streams, CUDA graphs, launches, memory. Run by ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fdistill_ops as fd

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.no_poison,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]
ON_CHIP, IN_PARTS = (64, 3, 32, 32), (4, 16, 128, 128)
SHAPES = pytest.mark.parametrize("shape", [ON_CHIP, IN_PARTS, (1, 16, 21, 60, 104)], ids=str)


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in fd.available_backends():
        pytest.skip(fd.build_info()["unavailable"][request.param])
    with fd.use_backend(request.param):
        yield request.param


class Step:
    """A training step on fixed tensors, so that a graph can be captured of it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, **more: Any) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        self.x, self.teacher, self.fake = (
            torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(3)
        )
        self.x.requires_grad_()
        self.logits = torch.randn(shape[0], 2, generator=generator, device="cuda")
        self.t = torch.rand(shape[0], generator=generator, device="cuda")
        self.histogram = fd.RatioHistogram(0.0, 1.0, ema_rate=0.5).cuda()
        self.more = more

    def __call__(self, scale: float = 1.0) -> list[Tensor]:
        self.x.grad = None
        loss, stats = fd.f_distill_loss(
            self.x,
            self.teacher,
            self.fake,
            self.logits,
            self.t,
            histogram=self.histogram,
            return_stats=True,
            **self.more,
        )
        (loss * scale).backward()
        return [loss.detach(), self.x.grad, stats.vector]


@SHAPES
def test_no_synchronisation(shape: tuple[int, ...]) -> None:
    masked = {"mask": torch.ones(shape, dtype=torch.bool, device="cuda"), "nonfinite": "zero"}
    schedule = torch.rand(shape[0], device="cuda", dtype=torch.float64) + 0.1
    converted = {"prediction": "v", "x_t": torch.zeros(shape, device="cuda"), "alpha": schedule, "sigma": schedule}
    steps = [Step(shape), Step(shape, **masked), Step(shape, torch.float32, **converted)]
    found = Step(shape, torch.float16)
    others: list[Callable[[], Any]] = [
        lambda: fd.score_difference(found.x, found.teacher, found.fake),
        lambda: fd.score_identity_loss(found.x, found.teacher, found.fake).backward(),
        lambda: fd.f_weights(found.logits, found.t, histogram=found.histogram),
    ]
    for step in (*steps, *others):
        step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (*steps, *others):
            step()
        steps[0](scale=3.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@SHAPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_graph(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Captured once and run three times, on new inputs, gives what three calls give: histogram, gradient and all."""
    eager, captured = Step(shape, dtype), Step(shape, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in (eager, captured):
            step(scale=2.0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = captured(scale=2.0)
    captured.histogram.bins.copy_(eager.histogram.bins)
    for shift in range(3):
        with torch.no_grad():
            for step in (eager, captured):
                step.fake.add_(shift)
                step.logits.mul_(0.5)
        expected = eager(scale=2.0)
        graph.replay()
        for got, want in zip([*results, captured.histogram.bins], [*expected, eager.histogram.bins], strict=True):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


@SHAPES
def test_streams_do_not_share_what_they_count_with(shape: tuple[int, ...]) -> None:
    steps = [Step(shape) for _ in range(4)]
    expected = steps[0]()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    results = [[] for _ in steps]
    for _ in range(20):
        for i, (step, stream) in enumerate(zip(steps, streams, strict=True)):
            with torch.cuda.stream(stream):
                step.histogram.bins.fill_(1.0)
                results[i] = step()
    torch.cuda.synchronize()
    for result in results:
        for got, want in zip(result, expected, strict=True):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


@SHAPES
def test_launches(shape: tuple[int, ...]) -> None:
    """One where the samples fit on chip, three at most; one more in backward. Copies of the histogram apart."""
    step = Step(shape)
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        loss = fd.f_distill_loss(step.x, step.teacher, step.fake, step.logits, step.t, histogram=step.histogram.eval())
        torch.cuda.synchronize()
    assert loss.isfinite()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= (1 if shape == ON_CHIP else 3), [event.name for event in kernels]


@SHAPES
def test_extra_memory_is_the_gradient(shape: tuple[int, ...]) -> None:
    step = Step(shape)
    step()
    step.x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    bytes_ = step.x.numel() * step.x.itemsize
    assert torch.cuda.max_memory_allocated() - before <= bytes_ + 64 * 1024 + bytes_ // 64


def test_the_tensors_device_counts() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    step = Step(ON_CHIP, torch.float32)
    expected = fd.score_difference(step.x, step.teacher, step.fake)
    with torch.cuda.device(0):
        found = fd.score_difference(*(tensor.to("cuda:1") for tensor in (step.x, step.teacher, step.fake)))
    assert torch.equal(found.to("cuda:0"), expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    step = Step(IN_PARTS, torch.float32)
    compiled = torch.compile(
        lambda x: fd.distribution_matching_loss(x * 1.0, step.teacher, step.fake), fullgraph=True, mode=mode
    )
    for _ in range(3):
        loss = compiled(step.x)
        (gradient,) = torch.autograd.grad(loss, step.x)
    plain = fd.distribution_matching_loss(step.x, step.teacher, step.fake)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, step.x)[0])
