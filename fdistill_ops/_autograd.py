"""What the fused operations and the reference share of autograd."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_DOUBLE_BACKWARD = (
    "fdistill_ops: the losses are differentiable once; their gradient is a constant (the score difference), "
    "so a second derivative through it (create_graph=True) is not defined"
)


class _Refuse(torch.autograd.Function):
    """The identity, whose derivative is an error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(_DOUBLE_BACKWARD)


def refuse_double_backward(
    gradients: Sequence[Tensor], inputs: Sequence[weakref.ref[Tensor]], upstream: Tensor
) -> list[Tensor]:
    """The gradients, such that differentiating them raises: with create_graph=True they would otherwise pass for
    constants. ``inputs`` are what they would be differentiated by; weak references, so that nothing is kept alive
    for it."""
    alive = [tensor for reference in inputs if (tensor := reference()) is not None]
    return [_Refuse.apply(gradient.detach().requires_grad_(), upstream, *alive) for gradient in gradients]
