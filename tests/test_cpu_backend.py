"""What only the C++ back end has: instruction sets, pooled memory, passes over memory saved."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fdistill_ops as fd
from fdistill_ops import _native, _torch
from fdistill_ops.backends._shared import scaled

pytestmark = pytest.mark.skipif("cpu" not in fd.available_backends(), reason="the compiled module is not built")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    native = _native.module()
    previous = native.isa()
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa(previous)


def arguments(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x, teacher, fake = (torch.randn(shape, generator=gen).to(dtype) for _ in range(3))
    return {"x": x.requires_grad_(), "teacher": teacher, "fake": fake}


def results(shape: tuple[int, ...], dtype: torch.dtype, strided: bool, special: bool) -> list[Tensor]:
    tensors = arguments(shape, dtype)
    if strided:
        tensors["teacher"] = tensors["teacher"].transpose(-1, -2).contiguous().transpose(-1, -2)
    if special:
        with torch.no_grad():
            tensors["x"].view(-1)[1] = float("nan")
            tensors["fake"].view(-1)[-1] = float("inf")
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(2))
    guided: dict[str, Any] = {"teacher_uncond": tensors["fake"] * 0.5, "guidance_scale": 3.0, "weight": weight}
    converted: dict[str, Any] = {
        "prediction": "v",
        "x_t": tensors["teacher"] * 0.7,
        "alpha": weight + 0.5,
        "sigma": 0.4,
    }
    found = []
    for more in ({}, {"mask": mask}, guided, converted | {"nonfinite": "zero"}, {"normalizer": None}):
        loss, stats = fd.distribution_matching_loss(**tensors, **more, return_stats=True)
        plain = fd.distribution_matching_loss(**tensors, **more)
        found += [loss.detach(), stats.vector, plain.detach(), *torch.autograd.grad(plain, tensors["x"])]
    inputs = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    loss = fd.score_identity_loss(*inputs, alpha=1.2)
    return [*found, loss.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 3, 32, 32), (1, 40000, 3)])
def test_every_instruction_set_gives_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, strided: bool, special: bool
) -> None:
    names = _native.module().isas()
    assert "plain" in names
    with isa("plain"):
        expected = results(shape, dtype, strided, special)
    for name in names:
        with isa(name):
            for got, want in zip(results(shape, dtype, strided, special), expected, strict=True):
                same = (got == want) | (got.isnan() & want.isnan())
                assert bool(same.all()), (name, got, want)


@pytest.fixture(params=_native.module().isas() if _native.module() else [])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    with isa(request.param):
        yield request.param


def gradient_is(x: Tensor, fake: Tensor, expected: Tensor) -> None:
    """Of the plainest loss, 1/2 sum (fake - 0)^2, the gradient is fake in x's dtype, to the bit where it is finite."""
    x = x.requires_grad_()
    fd.distribution_matching_loss(x, torch.zeros_like(fake), fake, normalizer=None, eps=0.0, reduction="sum").backward()
    finite = expected.isfinite()
    assert x.grad.dtype == expected.dtype and torch.equal(x.grad[finite], expected[finite])
    assert not x.grad[~finite].isfinite().any()


@pytest.mark.parametrize("length", [65536, 65535, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("instruction_set")
def test_every_16_bit_number_is_widened_exactly(dtype: torch.dtype, length: int) -> None:
    every = torch.arange(-32768, 32768).to(torch.int16).view(dtype)[-length:].view(1, -1)
    gradient_is(torch.zeros(every.shape), every, every.float())


@pytest.mark.parametrize("length", [1 << 18, 513, 7])
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.usefixtures("instruction_set")
def test_bfloat16_is_rounded_to_nearest_even(mixed: bool, length: int) -> None:
    """From a float32 gradient, and (not mixed) from the difference of bfloat16 operands, which has many ties."""
    gen = torch.Generator().manual_seed(length)
    if mixed:  # any float32: half of them ties, or next to one
        bits = torch.randint(-(2**31), 2**31, (1, length), generator=gen)
        near = (bits & ~0xFFFF) + 0x8000 + torch.randint(-1, 2, bits.shape, generator=gen)
        fake = torch.where(torch.rand(bits.shape, generator=gen) < 0.5, near, bits).to(torch.int32).view(torch.float32)
        fake = fake.where(fake.abs() < 1e18, 1)  # the loss, a sum of squares, is not to overflow
        gradient_is(torch.zeros(fake.shape, dtype=torch.bfloat16), fake, fake.bfloat16())
        return
    fake, teacher = (torch.randn(1, length, generator=gen).bfloat16() for _ in range(2))
    x = torch.zeros_like(fake).requires_grad_()
    fd.distribution_matching_loss(x, teacher, fake, normalizer=None, eps=0.0, reduction="sum").backward()
    exact = fake.float() - teacher.float()
    assert torch.equal(x.grad, exact.bfloat16())
    assert length < 1000 or ((exact.view(torch.int32) & 0xFFFF) == 0x8000).float().mean() > 0.05, "hardly any ties"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [33, 64, 1024, 1027, 3072, 40000])
@pytest.mark.usefixtures("instruction_set")
def test_large_batches_are_what_their_parts_are(elements: int, dtype: torch.dtype) -> None:
    """A gradient that is written past the caches, as large ones are, is that of a few samples, which is not."""
    tensors = arguments(((4 << 20) // dtype.itemsize // elements, elements), dtype)
    fd.distribution_matching_loss(**tensors, reduction="sample").sum().backward()
    for rows in (slice(9), slice(-9, None)):
        part = {name: tensor.detach()[rows].requires_grad_(name == "x") for name, tensor in tensors.items()}
        fd.distribution_matching_loss(**part, reduction="sample").sum().backward()
        assert torch.equal(part["x"].grad, tensors["x"].grad[rows])


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isa: sse9 .*plain"):
        _native.module().set_isa("sse9")


def gradient_of(loss: Tensor) -> int:
    """Address of the saved gradient."""
    return loss.grad_fn.saved_tensors[1].data_ptr()


needs_kept_graphs = pytest.mark.skipif(
    not _torch.KNOWS_KEPT_GRAPHS, reason="this PyTorch does not say whether a graph is kept: backward copies"
)


@needs_kept_graphs
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (4, 3, 512, 512)])
def test_no_pass_over_memory_when_the_incoming_gradient_is_one(shape: tuple[int, ...]) -> None:
    """The saved gradient becomes x.grad itself; scaled in place otherwise; copied where the graph is kept."""
    tensors = arguments(shape, torch.float32)
    x = tensors["x"]
    for scale in (1.0, 0.3):
        x.grad = None
        loss = fd.distribution_matching_loss(**tensors)
        address = gradient_of(loss)
        (loss * scale).backward()
        assert x.grad.data_ptr() == address
    x.grad = None
    loss = fd.distribution_matching_loss(**tensors)
    address = gradient_of(loss)
    loss.backward(retain_graph=True)
    assert x.grad.data_ptr() != address


class Passes(TorchDispatchMode):
    """The operators of PyTorch that return a tensor of so many elements."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.names = elements, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.elements:
            self.names.append(func.__name__.split(".")[0])
        return result


FACTORS = {
    "dense": lambda factor: factor,
    "every other": lambda factor: factor.repeat_interleave(2)[::2],
    "one for all": lambda factor: factor[:1].expand(len(factor)),
    "negated": lambda factor: torch._neg_view(factor),
}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("layout", ["dense", "channels last", "samples innermost"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (1, 1, 1, 1), (5, 3, 160, 200), (0, 2, 3, 3), (4, 0, 1, 1)])
@pytest.mark.usefixtures("instruction_set")
def test_16_bit_gradients_times_a_factor_per_sample(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, factor: str
) -> None:
    """What PyTorch's product is, which copies to float32 and back, in one pass; in place unless the graph is kept."""
    from fdistill_ops.backends.cpu import backend as cpu

    gen = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape, generator=gen).to(dtype)
    if layout == "channels last":
        gradient = gradient.to(memory_format=torch.channels_last)
    elif layout == "samples innermost":
        gradient = gradient.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    upstream = FACTORS[factor](torch.randn(shape[0], generator=gen))
    expected = scaled(gradient, upstream)
    with Passes(gradient.numel()) as passes:
        kept = cpu.scale_gradient(gradient, None, upstream, True)
        replaced = cpu.scale_gradient(gradient.clone(), None, upstream, False)
    for got in (kept, replaced):
        assert torch.equal(got, expected) and got.dtype == dtype and got.stride() == gradient.stride()
    if gradient.numel() > 1000 and layout != "samples innermost":
        assert set(passes.names) <= {"empty_like", "fill_", "clone"}


@needs_kept_graphs
def test_large_gradients_reuse_their_memory() -> None:
    """Step after step the same block; what is kept is no more than was in use at once, and empty_cache returns it."""
    gc.collect()
    fd.empty_cache()
    tensors = arguments((4, 3, 256, 512), torch.float32)
    size = tensors["x"].numel() * 4
    addresses = set()
    for _ in range(4):
        fd.distribution_matching_loss(**tensors).backward()
        addresses.add(tensors["x"].grad.data_ptr())
        tensors["x"].grad = None
    assert len(addresses) == 1
    assert size <= fd.empty_cache() <= size + (2 << 20)
    assert fd.empty_cache() == 0
    losses = [fd.distribution_matching_loss(**tensors) for _ in range(3)]
    assert len({gradient_of(loss) for loss in losses}) == 3
    del losses
    kept = fd.empty_cache()
    assert 3 * size <= kept <= 3 * (size + (2 << 20))


def test_gradients_outlive_everything_else() -> None:
    """Pooled memory belongs to the tensor: it survives empty_cache and is not handed out twice."""
    tensors = arguments((4, 3, 256, 512), torch.float32)
    fd.distribution_matching_loss(**tensors).backward()
    gradient = tensors["x"].grad
    tensors["x"].grad = None
    before = gradient.clone()
    fd.empty_cache()
    for seed in (5, 6):
        others = arguments((4, 3, 256, 512), torch.float32, seed)
        fd.distribution_matching_loss(**others).backward()
        assert others["x"].grad.data_ptr() != gradient.data_ptr()
    assert torch.equal(gradient, before)


def test_pooled_gradients_are_ordinary_tensors() -> None:
    tensors = arguments((4, 3, 256, 512), torch.bfloat16)
    fd.distribution_matching_loss(**tensors).backward()
    gradient = tensors["x"].grad
    assert gradient.shape == tensors["x"].shape and gradient.dtype == torch.bfloat16 and gradient.is_contiguous()
    gradient.mul_(2).add_(1)
    assert torch.equal(gradient.clone(), gradient)


def test_threads_belong_to_the_process() -> None:
    """No second pool beside PyTorch's."""
    assert fd.build_info()["threading"].startswith(("OpenMP threads of this process", "threads started per call"))
    if torch.backends.openmp.is_available() and torch.get_num_threads() > 1:
        assert fd.build_info()["threading"].startswith("OpenMP threads of this process")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dense_layouts_share_the_pool(memory_format: torch.memory_format) -> None:
    gc.collect()
    fd.empty_cache()
    tensors = {
        k: v.detach().to(memory_format=memory_format) for k, v in arguments((4, 3, 256, 512), torch.float32).items()
    }
    x = tensors["x"].requires_grad_()
    fd.distribution_matching_loss(**tensors).backward()
    assert x.grad.stride() == x.stride()
    x.grad = None
    assert fd.empty_cache() >= x.numel() * 4
