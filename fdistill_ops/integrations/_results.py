"""Losses in the dtypes in which the code bases return them, and the guidance they do beforehand."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def in_dtype_of(loss: Tensor, *inputs: Tensor) -> Tensor:
    """The loss in the dtype mse_loss would have returned: that of the inputs together, at least float32 in autocast."""
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in inputs])
    if torch.is_autocast_enabled(inputs[0].device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    return loss.to(dtype)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, unconditional + scale * (conditional - unconditional), rounded once."""
    return torch.lerp(unconditional, conditional, scale)
