"""Tensors of more dimensions than a kernel has room for: dimensions of size 1 do not count, and none is read or written
out of bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend, check_identity, check_matching
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops import _native

MANY = [64, 65, 66, 80, 100]


def spread(n: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of n dimensions with these among ones, the first of them first."""
    shape = [1] * n
    for i, size in enumerate(sizes):
        shape[i * (n - 1) // (len(sizes) - 1)] = size
    return tuple(shape)


def arguments_of(backend: Backend, shape: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    return {
        "x": backend.leaf(*shape),
        "teacher": backend.randn(*shape, seed=1),
        "fake": backend.randn(*shape, seed=2),
    } | changes


@pytest.mark.parametrize("n", MANY)
def test_ones_do_not_count(backend: Backend, n: int) -> None:
    """The same bits as without them, in every result."""
    shape = spread(n, (3, 4, 2, 5))
    many = arguments_of(backend, shape)
    few = {name: value.detach().reshape(3, 4, 2, 5).requires_grad_(name == "x") for name, value in many.items()}
    for name in ("weight", "alpha", "sigma"):
        rows = backend.randn(3, 4, seed=ord(name[0])).abs() + 0.1
        length = 1 + next(d for d in range(1, n) if shape[d] == 4)
        few[name], many[name] = rows, rows.reshape(shape[:length])
    mask = backend.randn(3, 4, 2, 5, seed=4) > 0
    few |= {"prediction": "v", "x_t": backend.randn(3, 4, 2, 5, seed=5), "mask": mask, "reduction": "sample"}
    many |= {"prediction": "v", "x_t": few["x_t"].reshape(shape), "mask": mask.reshape(shape), "reduction": "sample"}
    results = []
    for arguments in (many, few):
        loss, stats = fd.distribution_matching_loss(**arguments, return_stats=True)
        (gradient,) = torch.autograd.grad(loss.sum(), arguments["x"])
        assert gradient.shape == arguments["x"].shape
        g = fd.score_difference(**{k: v for k, v in arguments.items() if k != "reduction"})
        results.append((loss, stats.vector, gradient.reshape(-1), g.reshape(-1)))
    for with_ones, without in zip(*results, strict=True):
        assert torch.equal(with_ones.nan_to_num(7.0), without.nan_to_num(7.0))


@pytest.mark.parametrize("n", [65, 100])
def test_against_the_oracle(backend: Backend, n: int) -> None:
    if n > 64 and not backend.compiled:
        pytest.skip("the oracle is NumPy, which has 64 dimensions")
    shape = spread(n, (2, 3, 4))
    x, teacher, fake = (backend.randn(*shape, seed=seed) for seed in range(3))
    flat = [value.reshape(2, 3, 4) for value in (x, teacher, fake)]
    expected, _ = check_matching(
        dict(zip(("x", "teacher", "fake"), [flat[0].requires_grad_(), *flat[1:]], strict=True))
    )
    assert torch.equal(fd.distribution_matching_loss(x, teacher, fake), expected)
    inputs = [value.clone().requires_grad_() for value in flat]
    loss, *gradients = check_identity(dict(zip(("x", "teacher", "fake"), inputs, strict=True)), 1.2)
    leaves = [value.clone().requires_grad_() for value in (x, teacher, fake)]
    many = fd.score_identity_loss(*leaves, alpha=1.2)
    assert torch.equal(many, loss)
    for got, want in zip(torch.autograd.grad(many, leaves), gradients, strict=True):
        assert torch.equal(got.reshape(2, 3, 4), want)


def views(x: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts of as many dimensions."""
    order = tuple(reversed(range(x.ndim)))
    wide = torch.stack([torch.zeros_like(x), x], -1)
    return {"reversed": x.permute(order).contiguous().permute(order), "stepped": wide[..., 1], "negated": _negated(x)}


def _negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x)


@pytest.mark.parametrize("layout", ["reversed", "stepped", "negated"])
def test_layouts(backend: Backend, layout: str) -> None:
    shape = spread(70, (2, 3, 4))
    many = [views(backend.randn(*shape, seed=seed))[layout] for seed in range(3)]
    few = [value.squeeze() for value in many]
    assert few[0].shape == (2, 3, 4)
    assert torch.equal(fd.distribution_matching_loss(*many), fd.distribution_matching_loss(*few))
    assert torch.equal(fd.score_difference(*many).squeeze(), fd.score_difference(*few))


@pytest.mark.parametrize("dims", [(0,), (3, 0), (3, 2, 0), (0, 5)])
def test_without_elements(backend: Backend, dims: tuple[int, ...]) -> None:
    shape = dims + (2,) * 50 + (1,) * 40
    x = torch.empty(shape, device=backend.device).requires_grad_()
    loss = fd.distribution_matching_loss(x, torch.empty_like(x), torch.empty_like(x), reduction="sample")
    assert loss.shape == shape[:1]
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


@pytest.mark.parametrize("n", [65, 100])
def test_large_gradients_and_half_precision(backend: Backend, n: int) -> None:
    """Gradients that come from the pool, and those that are stored with a scale."""
    if backend.emulated:
        pytest.skip("too slow")
    shape = spread(n, (2, 1024, 400))
    for dtype in (torch.float32, torch.float16):
        x = backend.leaf(*shape, dtype=dtype)
        loss = fd.distribution_matching_loss(x, x.detach() + 1, x.detach() - 1)
        loss.backward()
        assert x.grad is not None
        flat = x.detach().reshape(2, 1024, 400).requires_grad_()
        fd.distribution_matching_loss(flat, flat.detach() + 1, flat.detach() - 1).backward()
        assert flat.grad is not None
        assert torch.equal(x.grad.reshape(-1), flat.grad.reshape(-1))
        assert bool(flat.grad.isfinite().all())


@pytest.mark.parametrize("module", ["_C", "_C_emulated"])
def test_the_compiled_modules_guard_themselves(module: str) -> None:
    """What Python's checks have let through by mistake is refused, and nothing is read."""
    native = _native.module() if module == "_C" else _native.emulator()
    if native is None:
        pytest.skip(f"{module} was not built")
    kernels = native
    x = torch.zeros(2, 3)
    record = (x.data_ptr(), 0, x.stride(), x)
    numbers = (1.0, 0, 1, 1e-6, False, 0, 1.0, False)
    loss = torch.zeros(())
    memory = (0, 0, 0, 0)
    rest = (1,) if module == "_C" else (memory, 0)

    def call(shape: tuple[int, ...], operand: Any, at: int = 0) -> Any:
        operands: list[Any] = [record, record, record, *[None] * 9]
        operands[at] = operand
        return kernels.loss(
            shape, tuple(operands), None, None, numbers, None, False, False, loss.data_ptr(), 0, 0, *rest
        )

    with pytest.raises(ValueError, match="x has 65 dimensions"):
        call((1,) * 65, record)
    for at, name in enumerate(("x", "teacher", "fake", "teacher_uncond", "x_t", "mask", "weight", "alpha", "sigma")):
        with pytest.raises(ValueError, match=f"^{name} has 65 dimensions"):
            call((2, 3), (x.data_ptr(), 0, (1,) * 65, x), at)
        with pytest.raises(ValueError, match=f"^{name} has no memory"):
            call((2, 3), (0, 0, (3, 1), x), at)
    with pytest.raises(ValueError, match="logits has no memory"):
        params = (2, 0.0, -10.0, 10.0, 0.0, 1.0, 0.0, True, 1e-6, False)
        arguments = (2, 1, (0, 0, (1,), x), None, 0, 0, 0, params, None)
        kernels.f_weights(arguments, x.data_ptr(), loss.data_ptr(), *rest[: 0 if module == "_C" else 3])
    if module == "_C":
        with pytest.raises(ValueError, match="the gradient has 65 dimensions"):
            kernels.pooled_empty((1,) * 65, (1,) * 65, 0, 1 << 21)


def test_what_broadcasts_in_many_dimensions(backend: Backend) -> None:
    shape = (2, 3) + (1,) * 64
    x, teacher, fake = (backend.randn(*shape, seed=seed) for seed in range(3))
    few = [value.reshape(2, 3) for value in (x, teacher, fake)]
    rows, logits = torch.full((1,) * 66, 0.5, device=backend.device), backend.randn(2)
    for name in ("weight", "alpha", "sigma"):
        options: dict[str, Any] = {"prediction": "v", "alpha": 0.8, "sigma": 0.6}
        many = fd.distribution_matching_loss(x, teacher, fake, **options | {name: rows, "x_t": x})
        assert torch.equal(many, fd.distribution_matching_loss(*few, **options | {name: 0.5, "x_t": few[0]}))
    g, _ = fd.f_score_difference(x, teacher, fake, logits, weight=rows, max_norm=0.1)
    expected, _ = fd.f_score_difference(*few, logits, weight=0.5, max_norm=0.1)
    assert torch.equal(g.reshape(2, 3), expected)
    alpha = backend.randn(2).abs()
    converted = fd.to_x0(x, teacher, prediction="eps", alpha=alpha, sigma=rows)
    assert torch.equal(
        converted.reshape(2, 3),
        fd.to_x0(few[0], few[1], prediction="eps", alpha=alpha, sigma=torch.full((), 0.5, device=backend.device)),
    )


def test_weights_of_many_dimensions_whatever_their_strides(backend: Backend) -> None:
    """Of size 1 with strides that say nothing, or in another order than their names."""
    sizes = (2, *[1] * 11, 5, 2)
    x, teacher, fake, weight = (backend.randn(*sizes, seed=seed) for seed in range(4))
    strides = [(0, 7, 2**40, 1)[d % 4] if size == 1 else weight.stride(d) for d, size in enumerate(sizes)]
    expected, want = fd.distribution_matching_loss(x, teacher, fake, weight=weight, return_stats=True)
    loss, stats = fd.distribution_matching_loss(
        x, teacher, fake, weight=weight.as_strided(sizes, strides), return_stats=True
    )
    assert torch.equal(loss, expected)
    torch.testing.assert_close(stats.vector, want.vector, rtol=0, atol=0, equal_nan=True)
    rows = backend.randn(2, *[1, 2] * 6, seed=4)
    x, teacher, fake, rows = (
        v.permute(0, *range(12, 0, -1)) for v in (*(backend.randn(2, *[1, 2] * 6, seed=s) for s in range(3)), rows)
    )
    expected, want = fd.distribution_matching_loss(
        *(v.contiguous() for v in (x, teacher, fake)), weight=rows.contiguous(), return_stats=True
    )
    loss, stats = fd.distribution_matching_loss(x, teacher, fake, weight=rows, return_stats=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats.vector, want.vector, equal_nan=True)
