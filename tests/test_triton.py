"""What only the Triton back end has: its launches and what they read and write, samples in parts, counters, warmup."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GPU, check_identity, check_matching
from torch import Tensor

import fdistill_ops as fd

pytestmark = [
    pytest.mark.skipif("triton" not in fd.available_backends(), reason="Triton does not run here"),
    *([pytest.mark.gpu] if GPU else []),
]
interpreted = pytest.mark.skipif(GPU, reason="looks into Triton's interpreter")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICE = "cuda" if GPU else "cpu"
LARGE = (3, 5, 33, 37)  # no power of two, nor divisible by one; in parts where `in_parts` says so


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fd.use_backend("triton"):
        yield


def backend() -> Any:
    from fdistill_ops.backends import triton

    return triton


@contextlib.contextmanager
def in_parts(
    monkeypatch: pytest.MonkeyPatch, block: int = 256, parts: int = 8, cache: int = 50 << 20
) -> Iterator[None]:
    """Every sample is worked on by several programs, in ``parts`` chunks at most."""
    triton = backend()
    facts = triton.device_of(torch.device(DEVICE))
    with monkeypatch.context() as patch:
        patch.setattr(triton, "_sample_program", lambda *_: None)
        patch.setattr(triton, "_chunk_program", lambda *_: triton.Program(block, 128))
        patch.setattr(triton, "_PARTS", parts)
        patch.setattr(triton, "device_of", lambda _: facts._replace(cache_bytes=cache, processors=1))
        yield


@contextlib.contextmanager
def recorded_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """(kernel, programs) of every launch."""
    triton = backend()
    launch, found = triton.launch, []

    def record(kernel: Any, grid: int, *rest: Any, **constants: Any) -> None:
        found.append((kernel.__name__, grid))
        launch(kernel, grid, *rest, **constants)

    with monkeypatch.context() as patch:
        patch.setattr(triton, "launch", record)
        yield found


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def arguments(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    x, teacher, fake = (randn(*shape, dtype=dtype, seed=seed) for seed in range(3))
    return {"x": x.requires_grad_(), "teacher": teacher, "fake": fake}


def variants(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Further arguments of distribution_matching_loss."""
    rows = randn(*shape[:2], seed=4).abs() + 0.5
    schedule = {"x_t": randn(*shape, dtype=dtype, seed=5), "alpha": rows.double(), "sigma": rows[:, 0]}
    mask = (randn(shape[0], 1, *shape[2:], seed=6) > 0).expand(shape)
    guided = {"teacher_uncond": randn(*shape, dtype=dtype, seed=7), "guidance_scale": rows[:, 0] * 3}
    return {
        "plain": {},
        "weighted": {"weight": rows[:, 0]},
        "rows": {"weight": rows},
        "everywhere": {"weight": randn(*shape, seed=8)},
        "masked": {"mask": mask},
        "masked samples": {"mask": mask, "reduction": "sample"},
        "samples": {"reduction": "sample"},
        "sum": {"reduction": "sum"},
        "no normaliser": {"normalizer": None},
        "given normaliser": {"normalizer": rows[:, 0]},
        "guided": guided,
        "guided alike": {**guided, "guidance_scale": 2.5},
        "converted": {"prediction": "v", **schedule},
        "all": {"prediction": "eps", **schedule, **guided, "mask": mask, "weight": rows, "nonfinite": "zero"},
    }


# ----------------------------------------------------------------------------------------------------- samples in parts


@pytest.mark.parametrize("name", variants((1, 1), torch.float32))
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_in_parts(dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps to a chunk, a last chunk that is not full, several groups of samples."""
    more = variants(LARGE, dtype)[name]
    with in_parts(monkeypatch, cache=1), recorded_launches(monkeypatch) as launches:
        check_matching(arguments(LARGE, dtype) | more)
    name, programs = launches[0]
    turns = 1 if "normalizer" in more and dtype is not torch.float16 else 2
    assert name == "chunk_kernel" and programs == turns * LARGE[0] * 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_identity_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = arguments(LARGE, dtype)
    for name in ("teacher", "fake"):
        found[name].requires_grad_()
    mask = (randn(*LARGE, seed=6) > 0) if dtype is torch.float32 else None
    with in_parts(monkeypatch, cache=1):
        check_identity(found | {"mask": mask, "weight": randn(LARGE[0], seed=4).abs()}, alpha=1.2)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
def test_float16_gradients_fill_their_range(reduction: str, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved times a power of two that brings the sample's largest element on the mask into [2^14, 2^15)."""
    found = arguments(LARGE, torch.float16)
    found["fake"] += torch.tensor([1.0, 30.0, 900.0], device=DEVICE)[:, None, None, None]
    mask = randn(*LARGE, seed=6) > 0
    found["fake"].masked_fill_(~mask, 6e4)
    more: dict[str, Any] = {"mask": mask, "weight": torch.tensor([1e-6, 1.0, 1e-3], device=DEVICE)}
    with in_parts(monkeypatch) if parts else contextlib.nullcontext():
        loss = fd.distribution_matching_loss(**found, **more, reduction=reduction)
        for tensor in found.values():
            tensor.requires_grad_()
        identity = fd.score_identity_loss(**found, **more, reduction=reduction, alpha=-9.0)
    for node in (loss.grad_fn, identity.grad_fn):
        _, *gradients = node.saved_tensors
        most = torch.stack([gradient.float().abs().amax((1, 2, 3)) for gradient in gradients]).amax(0)
        assert bool(((most >= 2.0**14) & (most <= 2.0**15)).all()), most


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_and_whole_samples_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradient and statistics of f_distill_loss, histogram included."""
    logits, t = randn(LARGE[0], 4, seed=9), torch.rand(LARGE[0]).to(DEVICE)

    def results() -> list[Tensor]:
        histogram = fd.RatioHistogram(0.0, 1.0, ema_rate=0.5).to(DEVICE)
        found = arguments(LARGE, dtype)
        loss, stats = fd.f_distill_loss(**found, logits=logits, t=t, histogram=histogram, return_stats=True)
        loss.backward()
        return [loss.detach(), found["x"].grad, stats.vector, histogram.bins]

    whole = results()
    with in_parts(monkeypatch):
        parts = results()
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2 if one.dtype in DTYPES[2:] else 2e-6, atol=0.0)


@pytest.mark.parametrize("groups", ["one", "several"])
def test_same_bits_again(groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run after run, and whatever else is in the batch."""
    found = arguments((6, 3, 20, 20))
    with in_parts(monkeypatch, cache=1 if groups == "several" else 50 << 20):
        first = fd.score_difference(**found)
        assert torch.equal(fd.score_difference(**found), first)
        alone = fd.score_difference(**{name: tensor[2:3] for name, tensor in found.items()})
    assert torch.equal(alone[0], first[2])


def sizes_of_parts(
    B: int, N: int, itemsize: int, monkeypatch: pytest.MonkeyPatch, turns: int = 2, **facts: int
) -> tuple[int, int, int, int]:
    """Programs, chunks, samples of a group and groups of a launch that is not made, of a plain loss."""
    triton = backend()
    device = triton.device_of(torch.device("cpu"))._replace(**facts)
    program = triton._chunk_program(itemsize, torch.float32, False, False)
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(triton, "device_of", lambda _: device)
        patch.setattr(triton, "launch", lambda _kernel, grid, *rest, **_: found.append((grid, rest[-4], *rest[-2:])))
        triton._launch_parts(program, torch.device("cpu"), B, N, (), {}, itemsize, turns)
    return found[0]


@interpreted
def test_no_program_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a chunk to measure or to finish, in groups of whatever sizes."""
    flux = 16 * 128 * 128
    programs, chunks, group, groups = sizes_of_parts(16, flux, 2, monkeypatch)
    assert (programs, chunks, group, groups) == (2048, 64, 8, 2)
    for B in range(1, 40):
        for cache in (1 << 20, 5 << 20, 50 << 20):
            for processors in (1, 20):
                sizes = sizes_of_parts(B, flux, 2, monkeypatch, cache_bytes=cache, processors=processors)
                programs, chunks, group, groups = sizes
                assert programs == 2 * B * chunks
                assert (groups - 1) * group < B <= groups * group
    assert sizes_of_parts(0, flux, 2, monkeypatch)[0] == 1  # which gives the loss of nothing


@pytest.mark.parametrize("B", [1, 2, 3, 5, 7, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_groups_of_unequal_sizes(B: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk is measured and finished once, whatever the last group lacks."""
    shape = (B, 1, 20, 30)
    with in_parts(monkeypatch), recorded_launches(monkeypatch) as launches:
        expected = fd.score_difference(**arguments(shape, dtype))
    bytes_of_three = 3 * 8 * 600 * dtype.itemsize
    with in_parts(monkeypatch, cache=bytes_of_three), recorded_launches(monkeypatch) as launches:
        assert torch.equal(fd.score_difference(**arguments(shape, dtype)), expected)
        check_matching(arguments(shape, dtype))
    assert {programs for name, programs in launches if name == "chunk_kernel"} == {2 * B * 3}


@interpreted
def test_a_group_takes_every_program_that_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cache that holds less, too: those that finish would wait for those that measure."""
    for shape in ((64, 4 * 128 * 128), (64, 16 * 128 * 128), (9, 3 * 1024 * 1024)):
        for cache in (1 << 20, 4 << 20, 50 << 20):
            _, chunks, group, groups = sizes_of_parts(*shape, 4, monkeypatch, cache_bytes=cache)
            assert group * chunks >= 2 * 132 or groups == 1
    assert backend().Program(1024, 256, 128).resident == 2
    assert backend().Program(1024, 256, 64).resident == 4
    assert backend().Program(1024, 512, 255).resident == 1


def test_a_program_takes_several_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are more samples than programs that run at once."""
    triton = backend()
    facts = triton.device_of(torch.device(DEVICE))
    logits = randn(40, seed=9)
    expected = fd.f_distill_loss(**arguments((40, 5)), logits=logits, reduction="sample")
    monkeypatch.setattr(triton, "device_of", lambda _: facts._replace(processors=1))
    with recorded_launches(monkeypatch) as launches:
        found = arguments((40, 5))
        loss = fd.f_distill_loss(**found, logits=logits, reduction="sample")
        loss.sum().backward()
        check_matching(arguments((40, 5)))
    assert launches[0] == ("sample_kernel", 16)
    assert torch.equal(loss, expected)


# ------------------------------------------------------------------------------------------------------------- launches


def test_one_launch_where_a_sample_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and histogram, normaliser, loss, gradient, statistics; and one for the backward."""
    histogram = fd.RatioHistogram(0.0, 1.0).to(DEVICE)
    found = arguments((4, 3, 8, 8))
    with recorded_launches(monkeypatch) as launches:
        loss, _ = fd.f_distill_loss(**found, logits=randn(4, 2), t=randn(4), histogram=histogram, return_stats=True)
        assert launches == [("sample_kernel", 4)]
        loss.backward()
    assert launches[1:] == [("scale_kernel", 1)]


@pytest.mark.parametrize(("shape", "dtype"), [((2, 16, 64, 64), torch.float32), ((1, 4, 5, 32, 32), torch.bfloat16)])
def test_at_most_three_launches(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = arguments(shape, dtype)
    with recorded_launches(monkeypatch) as launches:
        fd.f_distill_loss(**found, logits=randn(shape[0]), return_stats=True)
    assert [name for name, _ in launches] == ["f_weights_kernel", "chunk_kernel"]


@pytest.mark.slow
def test_many_logits_get_a_launch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = arguments((2, 3, 4, 4))
    logits = randn(2, 4096)
    with recorded_launches(monkeypatch) as launches:
        loss = fd.f_distill_loss(**found, logits=logits)
    assert [name for name, _ in launches] == ["f_weights_kernel", "sample_kernel"]
    torch.testing.assert_close(loss, fd.f_distill_loss(**found, logits=logits.double().mean(1).float()))


@pytest.mark.parametrize("bins", [16, 17, 32, 33, 700])
def test_many_bins_get_a_launch_of_their_own(bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way with the same results, in several programs."""
    logits, t = randn(5, 2, seed=9), torch.rand(5).to(DEVICE)
    histogram, other = (fd.RatioHistogram(0.0, 1.0, bins=bins, ema_rate=0.3).to(DEVICE) for _ in range(2))
    found = arguments((5, 3, 4, 4))
    with recorded_launches(monkeypatch) as launches:
        loss = fd.f_distill_loss(**found, logits=logits, t=t, histogram=histogram)
    assert launches == [("f_weights_kernel", 1)] * (bins > 32) + [("sample_kernel", 5)]
    weight = fd.f_weights(logits, t, histogram=other)
    assert torch.equal(loss, fd.distribution_matching_loss(**found, weight=weight))
    assert torch.equal(histogram.bins, other.bins)


def test_sample_sizes_of_the_field_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for images of 3x32x32 and 3x64x64 and latents of 4x64x64."""
    for shape in ((1, 3, 32, 32), (1, 3, 64, 64), (1, 4, 64, 64)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with recorded_launches(monkeypatch) as launches:
                fd.f_distill_loss(**arguments(shape, dtype), logits=randn(1))
            assert launches == [("sample_kernel", 1)]


@interpreted
@pytest.mark.parametrize("parts", [False, True])
def test_counters_are_zero_again(parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next launch on the stream can use them, and a CUDA graph can run again."""
    triton = backend()
    counters = torch.zeros(100, dtype=torch.int64)
    monkeypatch.setattr(triton, "_zeros", lambda *_: counters)
    found = arguments(LARGE, torch.float16)
    with in_parts(monkeypatch, cache=1) if parts else contextlib.nullcontext():
        loss = fd.distribution_matching_loss(**found)
        assert not counters.any()
        assert torch.equal(fd.distribution_matching_loss(**found), loss)
    assert not counters.any()


# ------------------------------------------------------------------------------------------------------------- backward


def test_backward_writes_nothing_where_the_factor_is_one() -> None:
    """Then the saved gradient becomes x.grad as it is; otherwise it is scaled in place, unless the graph is kept."""
    found = arguments((2, 3, 8, 8))
    x = found["x"]
    (expected,) = torch.autograd.grad(fd.distribution_matching_loss(**found), x)
    for scale in (1.0, 0.25):
        loss = fd.distribution_matching_loss(**found)
        address = loss.grad_fn.saved_tensors[1].data_ptr()
        (gradient,) = torch.autograd.grad(loss * scale, x)
        assert gradient.data_ptr() == address
        assert torch.equal(gradient, expected * scale)
    loss = fd.distribution_matching_loss(**found)
    saved = loss.grad_fn.saved_tensors[1]
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss * 0.25, x, retain_graph=True)
        assert gradient.data_ptr() != saved.data_ptr()
        assert torch.equal(gradient, expected * 0.25)
    assert torch.equal(saved, expected)


def test_backward_takes_a_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the factor is 1 they have nothing to do: as many as run at once, whatever the number of elements."""
    triton = backend()
    facts = triton.device_of(torch.device(DEVICE))
    monkeypatch.setattr(triton, "device_of", lambda _: facts._replace(processors=2))
    for B, factor in ((1, (1.0,)), (1, (0.5,)), (40, (0.5, 1.0, -3.0, 2.0, 1.5))):
        saved = randn(B, 40000 // B + 3000)
        upstream = torch.tensor(factor * (B // len(factor)), device=DEVICE)
        expected = saved * upstream[:, None]
        with recorded_launches(monkeypatch) as launches:
            assert triton.backend.scale_gradient(saved, None, upstream if B > 1 else upstream[0], False) is saved
        assert torch.equal(saved, expected)
        assert launches == [("scale_kernel", 2 * triton._SCALERS)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_inside"])
def test_backward_by_sample(layout: str, dtype: torch.dtype) -> None:
    """An incoming gradient for each sample, a gradient in any dense layout, more elements than one program takes."""
    shape = (3, 4, 50, 60)
    found = {name: tensor.detach() for name, tensor in arguments(shape, dtype).items()}
    if layout == "channels_last":
        found = {name: tensor.to(memory_format=torch.channels_last) for name, tensor in found.items()}
    elif layout == "batch_inside":
        found = {name: tensor.transpose(0, 1).contiguous().transpose(0, 1) for name, tensor in found.items()}
    x = found["x"].requires_grad_()
    factor = torch.tensor([1.0, 0.5, -3.0], device=DEVICE)
    factor = factor.double() if dtype is torch.float64 else factor
    loss = fd.distribution_matching_loss(**found, reduction="sample")
    (kept,) = torch.autograd.grad(loss, x, factor, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, x, factor)
    assert torch.equal(gradient, kept)
    reference = fd.reference.distribution_matching_loss(**found, reduction="sample")
    (expected,) = torch.autograd.grad(reference, x, factor)
    rounding = {torch.bfloat16: 8e-3, torch.float16: 2e-3}.get(
        dtype, 2e-6
    )  # two roundings, one of them the saved one's
    smallest = 2.0**-23 if dtype is torch.float16 else 0.0
    torch.testing.assert_close(gradient, expected, rtol=rounding, atol=smallest)


# -------------------------------------------------------------------------------------------------------------- traffic


class Traffic:
    """Bytes that the interpreter loads and stores in blocks (scalars apart), and what of them a cache of ``capacity``
    bytes with 128-byte lines, least recently used out first, would have to fetch from memory."""

    LINE = 128

    def __init__(self, capacity: int) -> None:
        self.bytes: Counter[str] = Counter()
        self.lines: OrderedDict[int, None] = OrderedDict()
        self.capacity = capacity // self.LINE

    def see(self, kind: str, addresses: Any, mask: Any, itemsize: int) -> None:
        mask = np.broadcast_to(mask, addresses.shape)
        self.bytes[kind if addresses.size > 1 else "scalars"] += int(mask.sum()) * itemsize
        for line in np.unique(addresses[mask].astype(np.int64) // self.LINE).tolist():
            if line not in self.lines and kind == "loads":
                self.bytes["fetched"] += self.LINE
            self.lines[line] = None
            self.lines.move_to_end(line)
            if len(self.lines) > self.capacity:
                self.lines.popitem(last=False)


@contextlib.contextmanager
def traffic(monkeypatch: pytest.MonkeyPatch, capacity: int = 50 << 20) -> Iterator[Traffic]:
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    seen = Traffic(capacity)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        itemsize = np.dtype(_get_np_dtype(pointers.get_element_ty())).itemsize
        seen.see("loads", pointers.data, mask.data, itemsize)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        seen.see("stores", pointers.data, mask.data, value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
        yield seen


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "no normaliser", "guided", "converted", "masked"])
def test_each_operand_is_read_once(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """N bytes for each of x, teacher and fake, and of what the arguments add; N written. Nothing in backward."""
    shape = (2, 3, 16, 16)
    found = arguments(shape, dtype)
    n = found["x"].numel() * dtype.itemsize
    more = variants(shape, dtype)[name] | ({"alpha": 0.8, "sigma": 0.6} if name == "converted" else {})
    budget = {"no normaliser": 2 * n, "guided": 4 * n, "converted": 4 * n}.get(name, 3 * n)
    if name == "masked":
        budget += found["x"].numel()
    with traffic(monkeypatch) as seen:
        loss = fd.distribution_matching_loss(**found, **more)
        in_summary = 8 * shape[0]
        assert seen.bytes["loads"] == budget + in_summary
        assert seen.bytes["stores"] == n
        assert seen.bytes["scalars"] < 1000
        if dtype is not torch.float16:  # whose scale comes in there
            loss.backward()
            assert seen.bytes["loads"] == budget + in_summary
            assert seen.bytes["stores"] == n


@interpreted
def test_weights_read_a_few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """O(B) for each program: the logits of the batch twice, and its own."""
    found = arguments((4, 3, 16, 16))
    n = found["x"].numel() * 4
    with traffic(monkeypatch) as seen:
        fd.f_distill_loss(**found, logits=randn(4, 2))
    assert 3 * n < seen.bytes["loads"] <= 3 * n + 4 * (2 * 4 * 2 * 4) + 4 * 2 * 4 * 4 + 200


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_reads_come_from_the_cache(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch six times the cache: what is fetched from memory is 3N all the same, since the teacher's prediction is
    read again soon after. In one group, whose size knows nothing of the cache, it is 4N."""
    shape = (16, 1, 64, 64)
    found = {name: tensor.detach() for name, tensor in arguments(shape, dtype).items()}
    n = found["x"].numel() * dtype.itemsize
    cache = 5 * n // 8
    fetched = {}
    for claimed in (cache, 1000 * cache):
        with in_parts(monkeypatch, block=512, cache=claimed), traffic(monkeypatch, capacity=cache) as seen:
            fd.score_difference(**found)
        assert seen.bytes["stores"] == n
        fetched[claimed] = seen.bytes["fetched"] / n
    assert fetched[cache] < 3.1
    assert fetched[1000 * cache] > 3.9


# --------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.no_poison
def test_offsets_beyond_32_bits() -> None:
    """Samples that lie 2^31 elements apart. The memory between them is never touched."""
    try:
        memory = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("not enough address space")
    x = memory.as_strided((2, 3, 100), (2**31, 100, 1))
    near = randn(2, 3, 100, dtype=torch.float16)
    x.copy_(near)
    others = {"teacher": randn(2, 3, 100, seed=1), "fake": randn(2, 3, 100, seed=2)}
    assert torch.equal(fd.score_difference(x, **others), fd.score_difference(near, **others))
    target = memory.as_strided((2, 3, 100), (2**31, 100, 1), 1000)
    fd.score_difference(near, **others, out=target)
    assert torch.equal(target, fd.score_difference(near, **others))


def test_empty_batches_of_many_dimensions() -> None:
    """Their strides may be any."""
    x = torch.empty_strided((0, 2, 2, 2, 2), (1, 2, 9, 5, 7), device=DEVICE, requires_grad=True)
    others = [torch.empty_strided(x.shape, stride, device=DEVICE) for stride in ((16, 1, 2, 4, 8), (1, 7, 3, 9, 2))]
    loss = fd.f_distill_loss(x, *others, torch.empty(0, device=DEVICE))
    loss.backward()
    assert loss == 0 and x.grad.shape == x.shape


def test_coefficients_of_empty_samples_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no memory."""
    seen = []
    launch = backend().launch

    def record(kernel: Any, grid: int, device: Any, program: Any, inputs: Any, *rest: Any, **constants: Any) -> None:
        seen.append(inputs[6:9])
        launch(kernel, grid, device, program, inputs, *rest, **constants)

    monkeypatch.setattr(backend(), "launch", record)
    found = arguments((3, 0, 4))
    rows = {"weight": torch.ones(3, 0), "alpha": torch.ones(3, 0), "sigma": torch.ones(3)}
    rows = {name: tensor.to(DEVICE) for name, tensor in rows.items()}
    loss = fd.distribution_matching_loss(**found, **rows, prediction="v", x_t=torch.empty_like(found["teacher"]))
    assert loss == 0
    assert seen[0][0] is None and seen[0][1] is None and seen[0][2] is not None


@pytest.mark.parametrize("parts", [False, True])
def test_layouts_of_many_dimensions(parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the kernels describe: copies are made, of operands, coefficients and results alike."""
    shape = (2, 3, 4, 5, 6)
    found: dict[str, Any] = {name: tensor.detach() for name, tensor in arguments(shape).items()}
    found["teacher"] = found["teacher"].permute(0, 4, 2, 3, 1).contiguous().permute(0, 4, 2, 3, 1)
    found["fake"] = found["fake"].permute(0, 3, 1, 4, 2).contiguous().permute(0, 2, 4, 1, 3)
    found |= {
        "weight": randn(*shape[:2], seed=4),
        "prediction": "flow",
        "x_t": randn(*shape, seed=5),
        "alpha": randn(*shape[:3], seed=6).abs() + 1,
        "sigma": randn(*shape[:4], seed=7).abs() + 1,
        "mask": randn(2, 1, 4, 1, 6, seed=8).expand(shape) > 0,
    }
    expected = fd.reference.score_difference(**found)
    with in_parts(monkeypatch, block=128) if parts else contextlib.nullcontext():
        torch.testing.assert_close(fd.score_difference(**found), expected)
        out = torch.empty(2, 6, 4, 5, 3, device=DEVICE).permute(0, 4, 2, 3, 1)
        assert fd.score_difference(**found, out=out) is out
        torch.testing.assert_close(out, expected)
        x = found.pop("x").requires_grad_()
        (gradient,) = torch.autograd.grad(fd.distribution_matching_loss(x, **found), x)
        (wanted,) = torch.autograd.grad(fd.reference.distribution_matching_loss(x, **found), x)
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("shape", [(0, 5, 70, 60), (2, 2, 3, 2, 2, 0)])
def test_nothing_in_any_layout(shape: tuple[int, ...]) -> None:
    """No samples of a size that takes several programs; samples of no elements, in layouts of many dimensions."""
    found = arguments(shape)
    order = (0, *range(len(shape) - 1, 0, -1))
    found["fake"] = torch.zeros([shape[d] for d in order], device=DEVICE).permute(order)
    found["teacher"] = torch.zeros(shape[1:], device=DEVICE).expand(shape)
    for reduction in ("mean", "sum", "sample"):
        loss, stats = fd.distribution_matching_loss(**found, reduction=reduction, return_stats=True)
        assert loss.shape == (shape[:1] if reduction == "sample" else ())
        assert not loss.any() and stats.to_dict()["grad_norm"] == stats.to_dict()["nonfinite"] == 0.0
        (gradient,) = torch.autograd.grad(loss.sum(), found["x"])
        assert gradient.shape == shape
    assert fd.score_difference(**found).shape == shape


# ---------------------------------------------------------------------------------------------------------- being there


def test_custom_divergence() -> None:
    divergence = fd.register_divergence("of_the_triton_test", h=lambda r: r / (1 + r) ** 3)
    found = arguments((3, 4, 5))
    loss = fd.f_distill_loss(**found, logits=randn(3), divergence=divergence)
    expected = fd.reference.f_distill_loss(**found, logits=randn(3), divergence=divergence)
    torch.testing.assert_close(loss, expected)


def test_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded_launches(monkeypatch) as launches:
        fd.warmup([(64, 3, 8, 8)], (torch.float32, torch.bfloat16), device=DEVICE, mask=True, prediction="v")
        assert [name for name, _ in launches] == ["sample_kernel", "scale_kernel"] * 2
        assert all(programs <= 2 for _, programs in launches)
        fd.warmup(
            [(1, 3, 8, 8)], device=DEVICE, guidance=True, bins=None, heads=3, return_stats=True, reduction="sample"
        )
    for wrong in ({"shapes": [()]}, {"shapes": [(3, -1)]}, {"shapes": [(3,)], "dtypes": [torch.int8]}, {"heads": 0}):
        with pytest.raises(ValueError, match=next(name for name in ("dtypes", "heads", "shapes") if name in wrong)):
            fd.warmup(**({"shapes": [(2, 2)], "device": DEVICE} | wrong))


def run(script: str, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "FDISTILL_BACKEND")}
    result = subprocess.run(
        [sys.executable, "-c", script], env=clean | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_leaves_triton_alone() -> None:
    assert run("import sys, fdistill_ops, fdistill_ops.kernels; print('triton' in sys.modules)").strip() == "False"


@pytest.mark.slow
def test_what_is_missing_is_said() -> None:
    """Without Triton, and with Triton but neither a GPU nor the interpreter."""
    script = (
        "import sys; sys.modules['triton'] = None; import importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else found(name, *rest)\n"
        "import torch, fdistill_ops as fd\n"
        "print(fd.available_backends(), fd.build_info()['unavailable']['triton'])\n"
        "print(float(fd.distribution_matching_loss(*torch.randn(3, 2, 5))) > 0)\n"
        "try: fd.set_backend('triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    printed = run(script)
    assert "'triton'" not in printed.split(")")[0]
    assert printed.count("triton is not installed (pip install triton)") == 2 and "True" in printed
    if not GPU:
        script = "import fdistill_ops as fd; print(fd.build_info()['unavailable'])"
        assert "PyTorch finds no GPU" in run(script)


@interpreted
def test_interpreted_kernels_serve_cpu_tensors_alone() -> None:
    with pytest.raises(RuntimeError, match="'triton' cannot serve meta tensors"):
        fd.distribution_matching_loss(*torch.empty(3, 2, 5, device="meta"))
