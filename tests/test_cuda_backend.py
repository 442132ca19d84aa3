"""What only the CUDA kernels have, in the emulator: memory traffic, launches, the schemes of other devices."""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops import _native

emulator = _native.emulator()
pytestmark = pytest.mark.skipif(emulator is None, reason="the emulator is not built (FDISTILL_EMULATOR=1)")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXTURES = (  # of x, teacher, fake
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
)
ON_CHIP, SPLIT = (3, 4, 64, 64), (1, 16, 21, 60, 104)  # a sample in shared memory, and one that is too large for it
NO_CLUSTERS = {"max_cluster": 1, "shared_bytes": 163 << 10}  # sm_80


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with fd.use_backend("cuda-emulated"):
        yield


@contextlib.contextmanager
def device(**changes: int) -> Iterator[None]:
    """Another device than the default one."""
    names = ("processors", "blocks_per_processor", "max_cluster", "shared_bytes", "level2_bytes", "order")
    names += ("fitting_cluster", "code")
    before = emulator.settings()
    emulator.configure(*(dict(zip(names, before, strict=True)) | changes).values())
    try:
        yield
    finally:
        emulator.configure(*before)


def batch(shape: tuple[int, ...], dtype: torch.dtype, names: str = "x teacher fake") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name in names.split()}
    tensors["x"].requires_grad_()
    return tensors


def mixture(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    """The same for each of x, teacher and fake a dtype."""
    tensors = batch(shape, torch.float32)
    return {
        name: tensor.detach().to(dtype).requires_grad_(name == "x")
        for (name, tensor), dtype in zip(tensors.items(), dtypes, strict=True)
    }


def traffic(call: Callable[[], Any]) -> tuple[int, int, int]:
    """Launches, bytes loaded, bytes stored."""
    return counted(call)[:3]


def counted(call: Callable[[], Any]) -> tuple[int, int, int, int]:
    """The same, and how many loads and stores were of several elements."""
    emulator.take_traffic()
    call()
    return emulator.take_traffic()[:4]


def prefetched(call: Callable[[], Any]) -> int:
    """Lines of 128 bytes."""
    emulator.take_traffic()
    call()
    return emulator.take_traffic()[4]


def within(got: int, budget: float, samples: int) -> bool:
    """No more than the budget and what goes with a sample and a chunk; and no less than the budget, which would mean
    that something was not counted."""
    return budget <= got <= 1.02 * budget + 4096 * samples


# ------------------------------------------------------------------------------------------------------------ traffic


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operand_is_read_once_on_chip(dtype: torch.dtype) -> None:
    """f_distill_loss: one launch, three reads, one write."""
    tensors = batch(ON_CHIP, dtype)
    size, B = tensors["x"].nbytes, ON_CHIP[0]
    histogram = fd.RatioHistogram(0.0, 1.0)
    t, logits = torch.rand(B), torch.randn(B)
    launches, loaded, stored, vectors = counted(
        lambda: fd.f_distill_loss(**tensors, logits=logits, t=t, histogram=histogram)
    )
    assert launches == 1
    assert within(loaded, 3 * size, B)
    assert within(stored, size, B)
    assert vectors == 4 * size / 16


@pytest.mark.parametrize("dtypes", MIXTURES)
def test_mixtures_of_dtypes_too(dtypes: tuple[torch.dtype, ...]) -> None:
    """Four elements at a time: 16 bytes, or 8."""
    tensors = mixture(ON_CHIP, dtypes)
    launches, loaded, stored, vectors = counted(lambda: fd.distribution_matching_loss(**tensors))
    assert launches == 1
    assert within(loaded, sum(tensor.nbytes for tensor in tensors.values()), ON_CHIP[0])
    assert within(stored, tensors["x"].nbytes, ON_CHIP[0])
    assert vectors == tensors["x"].numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_samples_read_the_teacher_twice(dtype: torch.dtype) -> None:
    """One launch still. The second read comes from the level 2 cache; float16 reads fake twice too, for its scale."""
    tensors = batch(SPLIT, dtype)
    size, chunks = tensors["x"].nbytes, tensors["x"].numel() / 8192
    launches, loaded, stored = traffic(lambda: fd.f_distill_loss(**tensors, logits=torch.zeros(1)))
    assert launches == 1
    assert within(loaded, (5 if dtype is torch.float16 else 4) * size, chunks)
    assert within(stored, size, chunks)


@pytest.mark.parametrize("shape", [ON_CHIP, SPLIT])
def test_without_a_normaliser_two_operands_are_read(shape: tuple[int, ...]) -> None:
    tensors = batch(shape, torch.float32)
    size, chunks = tensors["x"].nbytes, tensors["x"].numel() / 8192 + shape[0]
    launches, loaded, stored = traffic(lambda: fd.distribution_matching_loss(**tensors, normalizer=None))
    assert launches == 1
    assert within(loaded, 2 * size, chunks)
    assert within(stored, size, chunks)
    tensors["x"] = tensors["x"].detach()
    assert traffic(lambda: fd.distribution_matching_loss(**tensors, normalizer=None))[2] < 200 * chunks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_guidance_prediction_and_mask_add_themselves(dtype: torch.dtype) -> None:
    """Guidance and a prediction other than x0 one tensor each; a mask its bytes, once to be counted and once to be
    applied; one that repeats is counted from what is there."""
    tensors = batch(ON_CHIP, dtype, "x teacher fake teacher_uncond x_t")
    x_t, size, B = tensors.pop("x_t"), tensors["x"].nbytes, ON_CHIP[0]
    launches, loaded, _ = traffic(lambda: fd.distribution_matching_loss(**tensors, guidance_scale=3.0))
    assert (launches, within(loaded, 4 * size, B)) == (1, True)
    schedule = {"prediction": "v", "x_t": x_t, "alpha": 0.6, "sigma": 0.8}
    launches, loaded, _ = traffic(lambda: fd.distribution_matching_loss(**tensors, guidance_scale=3.0, **schedule))
    assert (launches, within(loaded, 5 * size, B)) == (1, True)
    mask = torch.rand(ON_CHIP) > 0.5
    launches, loaded, _ = traffic(lambda: fd.distribution_matching_loss(**tensors, guidance_scale=3.0, mask=mask))
    assert (launches, within(loaded, 4 * size + 2 * mask.numel(), B)) == (2, True)
    frames = (torch.rand(ON_CHIP[0], 4, 1, 1) > 0.5).expand(ON_CHIP)
    launches, loaded, _ = traffic(lambda: fd.distribution_matching_loss(**tensors, guidance_scale=3.0, mask=frames))
    assert (launches, within(loaded, 4 * size, B)) == (2, True)


def test_score_identity_reads_three_and_writes_three() -> None:
    tensors = batch(ON_CHIP, torch.float32)
    for tensor in tensors.values():
        tensor.requires_grad_()
    size, B = tensors["x"].nbytes, ON_CHIP[0]
    launches, loaded, stored = traffic(lambda: fd.score_identity_loss(**tensors))
    assert launches == 1
    assert within(loaded, 3 * size, B)
    assert within(stored, 3 * size, B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sample"])
def test_backward_moves_nothing_where_the_incoming_gradient_is_one(dtype: torch.dtype, reduction: str) -> None:
    tensors = batch(ON_CHIP, dtype)
    size, B = tensors["x"].nbytes, ON_CHIP[0]
    expected = {}
    for factor, moved in ((1.0, 0), (0.5, size)):
        tensors["x"].grad = None
        loss = fd.distribution_matching_loss(**tensors, reduction=reduction)
        address = loss.grad_fn.saved_tensors[1].data_ptr()
        upstream = torch.full_like(loss, factor)
        launches, loaded, stored = traffic(lambda loss=loss, upstream=upstream: loss.backward(upstream))
        assert launches == 1
        assert within(loaded, moved, B)
        assert stored == moved
        assert tensors["x"].grad.data_ptr() == address
        expected[factor] = tensors["x"].grad
    assert torch.equal(expected[1.0] * 0.5, expected[0.5])


def test_a_kept_graph_costs_a_copy() -> None:
    tensors = batch(ON_CHIP, torch.float32)
    loss = fd.distribution_matching_loss(**tensors)
    launches, loaded, stored = traffic(lambda: loss.backward(retain_graph=True))
    assert launches == 1
    assert within(loaded, tensors["x"].nbytes, 1)
    assert stored == tensors["x"].nbytes


# ------------------------------------------------------------------------------------------------------------ launches


def test_never_more_than_three_launches() -> None:
    B = 1100  # more logits than every block should read for itself
    tensors = batch((B, 40), torch.float32)
    logits, mask = torch.randn(B), torch.rand(B, 40) > 0.5
    assert traffic(lambda: fd.f_distill_loss(**tensors, logits=logits))[0] == 2
    assert traffic(lambda: fd.f_distill_loss(**tensors, logits=logits, mask=mask, return_stats=True))[0] == 3


@pytest.mark.parametrize("samples", [64, 65, 1024, 1025])
def test_weights_of_large_batches(samples: int) -> None:
    """By every block, by the first one and in a launch before the loss: the same loss and statistics as from f_weights
    alone."""
    tensors = batch((samples, 3), torch.float32)
    logits, t = torch.randn(samples, 2), torch.rand(samples)
    before, after = fd.RatioHistogram(0.0, 1.0), fd.RatioHistogram(0.0, 1.0)
    loss, stats = fd.f_distill_loss(**tensors, logits=logits, t=t, histogram=before, return_stats=True)
    weight = fd.f_weights(logits, t, histogram=after)
    want, want_stats = fd.distribution_matching_loss(**tensors, weight=weight, return_stats=True)
    assert torch.equal(loss, want)
    assert torch.equal(before.bins, after.bins)
    assert torch.equal(stats.vector[:9], want_stats.vector[:9])
    assert torch.equal(stats.effective_sample_size, want_stats.effective_sample_size)
    assert bool(stats.ratio_mean.isfinite())


@pytest.mark.parametrize("histogram", [False, True])
def test_weights_cost_a_sample_the_same_in_any_batch(histogram: bool) -> None:
    """Of a large batch one block reads the logits, for all."""

    def loaded(samples: int) -> float:
        """Bytes for a sample, its elements apart."""
        tensors = batch((samples, 8), torch.float32)
        logits, t = torch.randn(samples), torch.rand(samples) if histogram else None
        bins = fd.RatioHistogram(0.0, 1.0) if histogram else None
        call = lambda: fd.f_distill_loss(**tensors, logits=logits, t=t, histogram=bins)  # noqa: E731
        return traffic(call)[1] / samples - 3 * 8 * 4

    few, many = loaded(65), loaded(1000)
    assert 0 < many < 1.2 * few


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "heads"), [((70, 3, 5), 1), ((3, 20000), 200), ((2, 60000), 300)])
def test_weights_by_the_first_block(shape: tuple[int, ...], heads: int, dtype: torch.dtype) -> None:
    """Whichever block that is, of a cluster or of split samples too; also where one block runs at a time."""
    tensors = batch(shape, dtype)
    logits, t = torch.randn(shape[0], heads), torch.rand(shape[0])
    after = fd.RatioHistogram(0.0, 1.0)
    weight = fd.f_weights(logits, t, histogram=after)
    for kind in ({}, {"max_cluster": 1}, {"shared_bytes": 48 << 10}):
        for order, processors in ((0, 2), (1, 1), (2, 3)):
            with device(**kind, order=order, processors=processors, blocks_per_processor=1):
                before = fd.RatioHistogram(0.0, 1.0)
                loss, stats = fd.f_distill_loss(**tensors, logits=logits, t=t, histogram=before, return_stats=True)
                (gradient,) = torch.autograd.grad(loss, tensors["x"])
                want, want_stats = fd.distribution_matching_loss(**tensors, weight=weight, return_stats=True)
                assert torch.equal(loss, want)
                assert torch.equal(gradient, torch.autograd.grad(want, tensors["x"])[0])
                assert torch.equal(before.bins, after.bins)
                assert torch.equal(stats.vector[:9], want_stats.vector[:9])
                assert bool(stats.vector[9:12].isfinite().all())


# ------------------------------------------------------------------------------------------------------------- devices


def results(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    tensors = batch(shape, dtype)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    logits = torch.linspace(-2, 3, shape[0])
    found = []
    for more in ({}, {"mask": mask, "nonfinite": "zero"}, {"mask": mask, "reduction": "sample"}, {"normalizer": None}):
        loss, stats = fd.f_distill_loss(**tensors, logits=logits, **more, return_stats=True)
        plain = fd.f_distill_loss(**tensors, logits=logits, **more)
        found += [loss.detach(), stats.vector, plain.detach(), *torch.autograd.grad(plain.sum(), tensors["x"])]
    inputs = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    loss = fd.score_identity_loss(*inputs, alpha=1.2)
    return [*found, loss.detach(), *torch.autograd.grad(loss, inputs)]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(nan=-1.25), b.nan_to_num(nan=-1.25)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3, 16, 17), (3, 60000)])
@pytest.mark.parametrize("clusters", [True, False])
def test_the_order_of_the_blocks_changes_nothing(shape: tuple[int, ...], dtype: torch.dtype, clusters: bool) -> None:
    """On chip and split, in whatever order blocks start and however many run at once; also with one alone, which has
    to get along without the others."""
    kind = {} if clusters else NO_CLUSTERS
    with device(**kind, order=0):
        want = results(shape, dtype)
    for order, processors, level2 in ((1, 1, 50 << 20), (2, 3, 50 << 20), (3, 3, 1 << 10)):
        blocks = {"blocks_per_processor": 1, "processors": processors, "level2_bytes": level2}
        with device(**kind, **blocks, order=order):
            assert same(results(shape, dtype), want), (order, processors, level2)


@pytest.mark.parametrize("elements", [8000, 50000, 120000])
def test_code_compiled_for_an_older_device(elements: int) -> None:
    """It has neither clusters nor a wait for the launch before, whatever the device has: masks and all, the results of
    a device without clusters."""
    with device(max_cluster=1):
        want = results((2, elements), torch.float32)
    with device(code=80):
        assert same(results((2, elements), torch.float32), want)


@pytest.mark.parametrize("elements", [50000, 120000, 300000])
def test_clusters_that_there_is_no_room_for(elements: int) -> None:
    for room in (1, 2, 4):
        with device(max_cluster=room):
            want = results((2, elements), torch.float32)
        with device(fitting_cluster=room):
            assert same(results((2, elements), torch.float32), want)


@pytest.mark.parametrize("level2", [50 << 20, 1 << 20])
def test_what_is_announced_fits_the_cache(level2: int) -> None:
    """While the weights are computed, of x, teacher and fake alike; by all blocks that run at once no more than an
    eighth of the level 2 cache."""
    for tensors in (batch(ON_CHIP, torch.float32), mixture(ON_CHIP, MIXTURES[0])):
        logits = torch.zeros(ON_CHIP[0])
        with device(processors=4, level2_bytes=level2):
            lines = prefetched(lambda tensors=tensors, logits=logits: fd.f_distill_loss(**tensors, logits=logits))
            size = sum(tensor.nbytes for tensor in tensors.values()) // 128
            blocks, running = ON_CHIP[0], 4 * 2
            assert 0 < lines <= min(size, blocks * level2 // 8 // running // 128)
            assert lines == size or lines > 0.9 * blocks * level2 // 8 // running // 128
            assert prefetched(lambda tensors=tensors: fd.distribution_matching_loss(**tensors)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [8000, 50000, 120000])
def test_schemes_agree(dtype: torch.dtype, elements: int) -> None:
    """One block, clusters and split samples give the same gradients, up to the last bits of n_b."""
    tensors = batch((2, elements), dtype)
    found = []
    for kind in ({"max_cluster": 1, "shared_bytes": 227 << 10}, {"max_cluster": 8}, {"shared_bytes": 48 << 10}):
        with device(**kind):
            g = fd.score_difference(**tensors)
            found.append(g)
    for g in found[1:]:
        assert_ulps(g, found[0])


def assert_ulps(got: Tensor, want: Tensor) -> None:
    from fdistill_ops.testing import assert_close

    assert_close(got, want, ulps=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1001), (2, 3, 64, 64)])
def test_elements_have_the_bits_of_the_cpu_back_end(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every operation on an element is rounded once, in the same order; sums are not in the way without a
    normaliser."""
    tensors = batch(shape, dtype, "x teacher fake teacher_uncond x_t") | {"normalizer": None, "guidance_scale": 1.7}
    schedule = {"prediction": "flow", "alpha": torch.linspace(0.1, 0.9, shape[0]), "sigma": 0.3}
    got = fd.score_difference(**tensors, **schedule)
    with fd.use_backend("cpu"):
        assert torch.equal(got, fd.score_difference(**tensors, **schedule))


@pytest.mark.parametrize("dtypes", MIXTURES)
@pytest.mark.parametrize("shape", [(3, 1001), (2, 3, 64, 64), (1, 300000), (3, 2, 50, 3)])
def test_a_mixture_has_the_bits_of_its_numbers_in_float32(
    shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Four elements at a time in both, in the same order, so that not even n_b differs."""
    mixed = mixture(shape, dtypes)
    wide = {name: tensor.detach().float().requires_grad_(name == "x") for name, tensor in mixed.items()}
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(shape, generator=generator) > 0.3
    rows = torch.rand(shape[:2] if len(shape) > 2 else shape[:1], generator=generator)
    x_t = torch.randn(shape, generator=generator).bfloat16()
    options: tuple[dict[str, Any], ...] = (
        {},
        {"mask": mask, "reduction": "sample"},
        {"teacher_uncond": x_t, "guidance_scale": 2.5, "weight": rows, "nonfinite": "zero"},
        {"prediction": "flow", "x_t": x_t, "alpha": rows + 0.1, "sigma": 0.4},
    )
    calls = [lambda tensors, more=more: [fd.distribution_matching_loss(**tensors, **more)] for more in options]
    calls.append(lambda tensors: fd.distribution_matching_loss(**tensors, return_stats=True))
    calls.append(lambda tensors: [fd.score_identity_loss(*(tensors[name] for name in tensors), alpha=1.2)])
    for call in calls:
        (got, *stats), (want, *wide_stats) = call(mixed), call(wide)
        assert torch.equal(got, want)
        assert not stats or torch.equal(stats[0].vector.nan_to_num(), wide_stats[0].vector.nan_to_num())
        (got_grad,), (want_grad,) = (
            torch.autograd.grad(loss.sum(), tensors["x"]) for loss, tensors in ((got, mixed), (want, wide))
        )
        want_grad = want_grad.to(dtypes[0])
        normal = want_grad.abs() >= torch.finfo(dtypes[0]).tiny  # float16 gradients are stored times 2^k
        assert torch.equal(got_grad[normal], want_grad[normal])


def test_memory_grows_with_the_calls() -> None:
    """Counters and scratch of a stream serve larger batches after smaller ones, and the other way round."""
    from fdistill_ops.backends import cuda_emulated

    cuda_emulated.backend.empty_cache()
    want = {}
    for B in (2, 3000, 5, 9000, 2, 3000):
        tensors = batch((B, 9), torch.float32)
        loss = fd.distribution_matching_loss(**tensors, reduction="sum", normalizer=None if B == 5 else "mean_abs")
        assert want.setdefault(B, float(loss)) == float(loss)


def test_an_error_leaves_the_next_call_alone() -> None:
    """A failed launch raises with the kernel's name."""
    tensors = batch((2, 100), torch.float32)
    want = float(fd.distribution_matching_loss(**tensors))
    with device(shared_bytes=100), pytest.raises(RuntimeError, match=r"loss .* shared memory"):
        fd.distribution_matching_loss(**tensors)
    assert float(fd.distribution_matching_loss(**tensors)) == want


def test_a_count_does_not_survive_a_launch_that_fails() -> None:
    """The mask is counted by the first launch, in memory that the second one would have cleared."""
    tensors, mask = batch((2, 100), torch.float32), torch.ones(2, 100, dtype=torch.bool)
    want = float(fd.distribution_matching_loss(**tensors, mask=mask))
    with device(shared_bytes=350), pytest.raises(RuntimeError, match=r"loss .* shared memory"):
        fd.distribution_matching_loss(**tensors, mask=mask)
    assert float(fd.distribution_matching_loss(**tensors, mask=mask)) == want


class Device:
    """Stands for what PyTorch knows of devices: notes what it is asked for."""

    def __init__(self, capturing: bool = False, fails: bool = False) -> None:
        self.current, self.calls, self._capturing, self._fails = 0, [], capturing, fails

    def loss(self, *arguments: Any) -> tuple[int, int] | None:
        self.calls.append(("launch", self.current))
        if self._fails:
            raise RuntimeError("a launch that fails")
        return (4, 16) if arguments[-2][1] < 4 else None

    f_weights = scale_gradient = loss
    operands = _native.emulator().operands if emulator else ()

    def stream_of(self, device: int) -> int:
        return 7 + device

    def capturing(self) -> bool:
        self.calls.append(("capturing", self.current))
        return self._capturing

    def exchange(self, device: int) -> int:
        before, self.current = self.current, device
        return before

    def restore(self, device: int) -> int:
        self.calls.append(("restore", device))
        return self.exchange(device)

    def back_end(self) -> Any:
        from fdistill_ops.backends._cuda import Cuda

        return Cuda("cuda", self, self.stream_of, self.capturing, self.exchange, self.restore)


@pytest.mark.parametrize("capturing", [False, True])
def test_everything_is_asked_of_the_tensors_device(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Capturing and launches; and it is PyTorch that restores the device before, which may have no context yet."""
    from fdistill_ops.backends import _cuda

    monkeypatch.setattr(
        _cuda, "_Memory", lambda counters, scratch, _: argparse.Namespace(record=(0, counters, 0, scratch))
    )
    monkeypatch.setattr(_cuda, "lasting", lambda allocate, _: allocate())
    here = Device(capturing)
    here.back_end().run_loss(torch.device("cuda:1"))
    assert here.calls == [("capturing", 1), ("launch", 1), ("launch", 1), ("restore", 0)]
    here = Device(capturing, fails=True)
    with pytest.raises(RuntimeError, match="a launch that fails"):
        here.back_end().run_loss(torch.device("cuda:1"))
    assert here.current == 0
    here.calls.clear()
    with pytest.raises(RuntimeError, match="a launch that fails"):
        here.back_end().run_loss(torch.device("cuda:0"))
    assert ("restore", 0) not in here.calls


def test_kept_memory_is_allocated_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stream in use: what this thread allocates may go to the pool of a graph that is being warmed up, which
    must not hold what is kept."""
    from fdistill_ops.backends import _cuda, _shared

    entered, allocated = [], []

    def stream(which: str) -> contextlib.AbstractContextManager[None]:
        entered.append((which, threading.get_ident()))
        return contextlib.nullcontext()

    def memory(counters: int, scratch: int, _: torch.device) -> argparse.Namespace:
        allocated.append(threading.get_ident())
        return argparse.Namespace(record=(0, counters, 0, scratch))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(_cuda, "_Memory", memory)
    back_end = Device().back_end()
    for _ in range(2):
        back_end.run_loss(torch.device("cuda:1"))
    assert len(allocated) == 1
    assert allocated[0] != threading.get_ident()
    assert entered == [("the stream of cuda:1", allocated[0])]
    assert _shared.lasting(threading.get_ident, torch.device("cpu")) == threading.get_ident()


def test_more_dimensions_than_a_kernel_takes() -> None:
    shape = (2,) * 12
    order = (0, *range(11, 0, -1))
    tensors = {name: value.detach().permute(order) for name, value in batch(shape, torch.float32).items()}
    tensors["fake"] = tensors["fake"].permute(0, 2, 1, *range(3, 12))
    weight = torch.rand(2, 2, 2, 2, 2).permute(0, 3, 1, 4, 2)
    mask = (torch.rand(2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1) > 0.4).expand(shape)
    x = tensors.pop("x").requires_grad_()
    loss = fd.distribution_matching_loss(x, **tensors, weight=weight, mask=mask)
    (gradient,) = torch.autograd.grad(loss, x)
    with fd.use_backend("reference"):
        want = fd.distribution_matching_loss(x, **tensors, weight=weight, mask=mask)
        (want_gradient,) = torch.autograd.grad(want, x)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, want_gradient)
