"""A backward that was broken off by an exception, and the next one: right, or refused as PyTorch refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Backend

import fdistill_ops as fd

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Broken(Exception):
    """What the hook raises."""


def raise_once(calls: list[int]) -> Any:
    def hook(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise Broken

    return hook


def leaf_and_loss(backend: Backend, dtype: torch.dtype, reduction: str) -> tuple[torch.Tensor, torch.Tensor]:
    x = backend.leaf(4, 3, 8, dtype=dtype)
    teacher, fake = (backend.randn(4, 3, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    return x, fd.distribution_matching_loss(x, teacher, fake, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sample"])
@pytest.mark.parametrize("where", ["after the node", "before the leaf"])
def test_after_an_exception_in_a_hook(backend: Backend, dtype: torch.dtype, reduction: str, where: str) -> None:
    """The saved gradient may have been scaled in place by then."""
    x, loss = leaf_and_loss(backend, dtype, reduction)
    upstream = torch.tensor(3.0, device=backend.device)
    if reduction == "sample":
        upstream = torch.tensor([3.0, -2.0, 0.5, 1.0], device=backend.device)
    upstream = upstream.to(loss.dtype)
    (expected,) = torch.autograd.grad(loss, x, upstream, retain_graph=True)
    calls: list[int] = []
    if where == "after the node":
        assert loss.grad_fn is not None
        loss.grad_fn.register_hook(raise_once(calls))
    else:
        x.register_hook(raise_once(calls))
    with pytest.raises(Broken):
        loss.backward(upstream)
    assert x.grad is None
    try:
        loss.backward(upstream)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) or "backward through the graph a second time" in str(
            error
        )
    else:
        assert x.grad is not None
        assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_an_exception_with_the_graph_kept(backend: Backend, dtype: torch.dtype) -> None:
    x, loss = leaf_and_loss(backend, dtype, "mean")
    (expected,) = torch.autograd.grad(loss, x, torch.full_like(loss, 3.0), retain_graph=True)
    assert loss.grad_fn is not None
    loss.grad_fn.register_hook(raise_once([]))
    with pytest.raises(Broken):
        loss.backward(torch.full_like(loss, 3.0), retain_graph=True)
    loss.backward(torch.full_like(loss, 3.0))
    assert x.grad is not None
    assert torch.equal(x.grad, expected)
