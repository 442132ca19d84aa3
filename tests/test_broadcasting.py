"""Shapes that broadcast: each argument in every shape that stands for the same values, to the bit and against the
oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend, check_matching
from torch import Tensor

import fdistill_ops as fd

SHAPE = (3, 4, 5, 6)


def batch(backend: Backend, shape: tuple[int, ...] = SHAPE) -> dict[str, Any]:
    return {
        "x": backend.leaf(*shape),
        "teacher": backend.randn(*shape, seed=1),
        "fake": backend.randn(*shape, seed=2),
    }


def results(**arguments: Any) -> tuple[Tensor, ...]:
    loss = fd.distribution_matching_loss(**arguments)
    (gradient,) = torch.autograd.grad(loss.sum(), arguments["x"])
    g = fd.score_difference(**{name: value for name, value in arguments.items() if name != "reduction"})
    return loss.detach(), gradient, g


def same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


MASKS: list[tuple[int, ...]] = [
    *[(3,), (3, 1, 1, 1), (3, 4), (3, 4, 1, 1), (3, 1, 5, 6), (1, 1, 5, 6)],
    *[(5, 6), (6,), (1, 4, 1, 1), (4, 1, 1), (1,), ()],
]


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
def test_masks(backend: Backend, shape: tuple[int, ...], reduction: str) -> None:
    mask = backend.randn(*shape, seed=7) > -0.3
    leading = len(shape) < 4 and shape == SHAPE[: len(shape)]
    full = mask.reshape(shape + (1,) * (4 - len(shape))) if leading else mask
    arguments = batch(backend) | {"reduction": reduction}
    expected = full.expand(SHAPE)
    check_matching(arguments | {"mask": expected})
    assert same(results(**arguments, mask=mask), results(**arguments, mask=expected))
    identity = {name: value for name, value in arguments.items()} | {"alpha": 1.2}
    assert torch.equal(fd.score_identity_loss(**identity, mask=mask), fd.score_identity_loss(**identity, mask=expected))


def test_a_mask_of_one_dimension_is_the_batch(backend: Backend) -> None:
    """Where the last dimension is as long: documented."""
    arguments = batch(backend, (4, 3, 4))
    mask = torch.tensor([True, False, True, True], device=backend.device)
    assert same(results(**arguments, mask=mask), results(**arguments, mask=mask[:, None, None].expand(4, 3, 4)))


def test_a_mask_of_two_dimensions_is_as_in_pytorch(backend: Backend) -> None:
    """Where both readings would do, the trailing one counts."""
    arguments = batch(backend, (3, 4, 3, 4))
    mask = backend.randn(3, 4, seed=7) > 0
    assert same(results(**arguments, mask=mask), results(**arguments, mask=mask.expand(3, 4, 3, 4)))


@pytest.mark.parametrize("name", ["weight", "alpha", "sigma"])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_rows_with_trailing_ones(backend: Backend, name: str, length: int) -> None:
    """[B, 1, 1, 1] is [B], [B, F, 1, 1] is [B, F], [1, 1, 1, 1] is a number."""
    rows = backend.randn(*SHAPE[:length], seed=3).abs() + 0.2
    arguments = batch(backend) | {"prediction": "v", "x_t": backend.randn(*SHAPE, seed=4), "alpha": 0.8, "sigma": 0.6}
    with_ones = rows.reshape(SHAPE[:length] + (1,) * (4 - length))
    assert same(results(**arguments | {name: with_ones}), results(**arguments | {name: rows}))


@pytest.mark.parametrize("name", ["weight", "alpha", "sigma"])
@pytest.mark.parametrize("shape", [(3, 1, 5, 6), (1, 1, 5, 6), (1, 4, 1, 1), (3, 4, 1, 6), (1, 4, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_ones_inside(backend: Backend, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A coefficient for every element, without the memory for it."""
    rows = backend.randn(*shape, seed=3).abs() + 0.2
    arguments = {k: v.detach().to(dtype).requires_grad_(k == "x") for k, v in batch(backend).items()}
    arguments |= {"prediction": "eps", "x_t": backend.randn(*SHAPE, seed=4), "alpha": 0.8, "sigma": 0.6}
    check_matching(arguments | {name: rows.expand(SHAPE).contiguous()})
    ours, expected = (results(**arguments | {name: v}) for v in (rows, rows.expand(SHAPE).contiguous()))
    assert same(ours, expected)


@pytest.mark.parametrize("name", ["normalizer", "guidance_scale"])
def test_per_sample_with_trailing_ones(backend: Backend, name: str) -> None:
    values = backend.randn(3, seed=3).abs() + 0.2
    arguments = batch(backend)
    if name == "guidance_scale":
        arguments["teacher_uncond"] = backend.randn(*SHAPE, seed=4)
    assert same(results(**arguments | {name: values.reshape(3, 1, 1, 1)}), results(**arguments | {name: values}))
    for wrong in ((3, 1), (1, 3, 1, 1), (3, 4, 1, 1), (4,)):
        with pytest.raises(ValueError, match=name):
            fd.distribution_matching_loss(**arguments | {name: backend.randn(*wrong)})


@pytest.mark.parametrize("shape", [(3, 1, 4, 5), (3, 2, 3), (3, 1, 1, 1), (3, 2, 2, 2, 2)])
def test_logits_of_a_discriminator_of_patches(backend: Backend, shape: tuple[int, ...]) -> None:
    """Averaged as heads, in any layout."""
    logits = backend.randn(*shape, seed=5)
    flat = logits.flatten(1)
    expected = fd.f_weights(flat)
    assert torch.equal(fd.f_weights(logits), expected)
    order = (0, *reversed(range(1, logits.ndim)))
    permuted = logits.permute(order)
    torch.testing.assert_close(fd.f_weights(permuted), expected)
    assert torch.equal(fd.reference.f_weights(logits), fd.reference.f_weights(flat))
    arguments = batch(backend)
    assert torch.equal(fd.f_distill_loss(**arguments, logits=logits), fd.f_distill_loss(**arguments, logits=flat))
    logits.requires_grad_()
    assert not fd.f_weights(logits).requires_grad


def test_to_x0(backend: Backend) -> None:
    pred, x_t = backend.randn(*SHAPE), backend.randn(*SHAPE, seed=1)
    alpha, sigma = backend.randn(3, seed=2).abs() + 0.2, backend.randn(1, 1, 5, 6, seed=3).abs()
    ours = fd.to_x0(pred, x_t, prediction="eps", alpha=alpha.reshape(3, 1, 1, 1), sigma=sigma)
    expected = fd.to_x0(pred, x_t, prediction="eps", alpha=alpha, sigma=sigma.expand(SHAPE).contiguous())
    assert torch.equal(ours, expected)


def test_compiled(backend: Backend) -> None:
    torch._dynamo.reset()
    arguments = batch(backend)
    options = {"mask": backend.randn(5, 6, seed=3) > 0, "weight": backend.randn(3, 1, 5, 6, seed=4)}
    compiled = torch.compile(fd.distribution_matching_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**arguments, **options), fd.distribution_matching_loss(**arguments, **options))
    torch._dynamo.reset()
