"""The C++ back end for CPU tensors (csrc/cpu)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._torch import from_dlpack
from ._compiled import DTYPES, MAX_DIMS, Compiled
from ._shared import is_dense, mark_changed, opaque, plain, rows_are_dense, scaled

_C = _native.module()
_POOLED_BYTES = 1 << 20
_HALF = (torch.bfloat16, torch.float16)


class Cpu(Compiled):
    name = "cpu"

    def gradient_like(self, x: Tensor) -> Tensor:
        """Large ones reuse the memory of earlier gradients: fresh memory costs more in page faults than the gradient
        takes to write."""
        bytes_ = x.numel() * x.itemsize
        if bytes_ < _POOLED_BYTES or x.ndim > MAX_DIMS or not (x.is_contiguous() or is_dense(x)):
            return torch.empty_like(x)
        return from_dlpack(_C.pooled_empty(tuple(x.shape), x.stride(), DTYPES[x.dtype], bytes_))

    def run_loss(self, device: torch.device, *arguments: Any) -> None:
        _C.loss(*arguments, torch.get_num_threads())

    def run_weights(self, device: torch.device, arguments: Any, weights: int, ratio_stats: int) -> None:
        _C.f_weights(arguments, weights, ratio_stats)

    def scale_gradient(self, gradient: Tensor, scale: Tensor | None, upstream: Tensor, keep: bool) -> Tensor:
        """The saved tensor itself where the factor is 1 and the graph is not kept, scaled in place where it is not 1, a
        new tensor where the graph is kept. Reading the factor costs nothing: it is in host memory."""
        factor = upstream if scale is None or gradient.dtype is not torch.float16 else upstream * scale
        if opaque(factor):
            return scaled(gradient, factor)
        if factor.ndim == 0:
            number = factor.item()
            if number == 1.0:
                return gradient.clone() if keep else gradient
            return gradient * number if keep else gradient.mul_(number)
        if bool((factor == 1.0).all()):
            return gradient.clone() if keep else gradient
        if gradient.dtype in _HALF and factor.dtype is torch.float32 and rows_are_dense(gradient):
            return _scaled_rows(gradient, factor, keep)
        if keep:
            return scaled(gradient, factor)
        return gradient.mul_(factor.reshape(factor.shape + (1,) * (gradient.ndim - 1)))

    def empty_cache(self) -> int:
        return _C.pool_trim()


def _scaled_rows(gradient: Tensor, factor: Tensor, keep: bool) -> Tensor:
    """``scaled`` in one pass, where PyTorch's product of a 16-bit tensor and float32 factors makes float32 copies."""
    gradient, factor = plain(gradient, "gradient"), plain(factor, "the incoming gradient").contiguous()
    out = torch.empty_like(gradient) if keep else gradient
    batch = gradient.shape[0]
    rows = batch, gradient.numel() // batch if batch else 0
    dtype, threads = DTYPES[gradient.dtype], torch.get_num_threads()
    _C.scale_rows(gradient.data_ptr(), out.data_ptr(), dtype, *rows, factor.data_ptr(), threads)
    if not keep:
        mark_changed(gradient)
    return out


backend = Cpu(_C.operands)
