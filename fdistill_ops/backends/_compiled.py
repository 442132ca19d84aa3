"""What the back ends of the compiled module share: its two entries, the loss and the weights, and tensors as its
records."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._call import NAMES, LossCall, WeightCall
from ..params import RULES
from ._functions import Functions, Gradients, Results
from ._shared import histogram_buffers, plain

_SCORE_IDENTITY = RULES["score_identity"]

# The codes of csrc/include/fdistill/dtype.h.
DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.uint8: 5,
    torch.int8: 6,
    torch.int16: 7,
    torch.int32: 8,
    torch.int64: 9,
}


MAX_DIMS = 64  # kMaxDims of csrc/include/fdistill/layout.h


_Record = tuple[int, int, tuple[int, ...], Tensor]
"""(address, dtype, strides), and the tensor itself, which keeps the memory alive."""


def record(tensor: Tensor | None, name: str) -> _Record | None:
    """None for one without elements."""
    return records((tensor,), (name,))[0]


def records(tensors: Sequence[Tensor | None], names: Sequence[str]) -> tuple[_Record | None, ...]:
    found: list[_Record | None] = []
    for i, tensor in enumerate(tensors):
        if tensor is None:
            found.append(None)
            continue
        address = tensor.data_ptr()
        if not address or tensor.is_neg() or (address == tensor.storage_offset() * tensor.itemsize):
            tensor = plain(tensor, names[i])
            address = tensor.data_ptr()
        found.append((address, DTYPES[tensor.dtype], tensor.stride(), tensor) if address else None)
    return tuple(found)


def _of_few_dimensions(x: Tensor) -> Callable[[Any], Any]:
    """For an x of more dimensions than the kernels take: a function that makes x, or what has a leading part of its
    shape, a view without the dimensions of size 1."""
    kept = [0, *(d for d in range(1, x.ndim) if x.shape[d] != 1)]
    if 0 in x.shape[1:]:  # no elements: one dimension says so
        kept = [0, 1 + x.shape[1:].index(0)]

    def view(tensor: Any) -> Any:
        if tensor is None:
            return None
        dims = [d for d in kept if d < tensor.ndim]
        sizes, strides = [tensor.shape[d] for d in dims], [tensor.stride(d) for d in dims]
        return tensor.detach().as_strided(sizes, strides)

    return view


_GRADIENTS = ("the gradient of x", "the gradient of teacher", "the gradient of fake")


class Compiled(Functions):
    def __init__(self, operands: Sequence[str]) -> None:
        """``operands``: names of a loss's tensors in the order that the module takes them in; the gradients follow."""
        self._names = (*operands, *_GRADIENTS, "guidance_scale", "normalizer")
        self._in_order = operator.itemgetter(*map(NAMES.index, operands))
        assert {*self._names} == {*NAMES, *_GRADIENTS}

    def run_loss(self, device: torch.device, *arguments: Any) -> None:
        """The module's ``loss`` with these arguments."""
        raise NotImplementedError

    def run_weights(self, device: torch.device, arguments: Any, weights: int, ratio_stats: int) -> None:
        """The module's ``f_weights`` with these arguments."""
        raise NotImplementedError

    def weight_arguments(self, call: WeightCall) -> tuple[tuple[Any, ...], Tensor | None]:
        logits, t = call.logits, call.t
        bins, new_bins = histogram_buffers(call.bins) if call.bins is not None else (None, None)
        bins_address, n_bins = (0, 0) if bins is None else (bins.data_ptr(), bins.numel())
        if t is not None and t.dtype not in DTYPES:
            t = t.double()
        heads = logits.shape[1] if logits.ndim == 2 else 1
        new_address = 0 if new_bins is None else new_bins.data_ptr()
        histogram = (bins_address, n_bins, new_address)
        arguments = (logits.shape[0], heads, *records((logits, t), ("logits", "t")), *histogram, call.params)
        return (*arguments, bins), new_bins  # the last only to be kept alive

    def compute_weights(self, arguments: tuple[Any, ...], weights: Tensor, ratio_stats: Tensor) -> None:
        self.run_weights(weights.device, arguments, weights.data_ptr(), ratio_stats.data_ptr())

    def compute_loss(
        self, call: LossCall, gradients: Gradients, results: Results, weight_arguments: tuple[Any, ...] | None
    ) -> None:
        operands, (loss, scale, stats) = call.operands, results
        x, shape = operands.x, tuple(operands.x.shape)
        tensors = (*self._in_order(operands), *gradients)
        if x.ndim > MAX_DIMS:
            view = _of_few_dimensions(x)
            tensors, shape = tuple(map(view, tensors)), tuple(view(x).shape)
        *found, guidance, normalizer = records((*tensors, operands.guidance_scale, operands.normalizer), self._names)
        self.run_loss(
            loss.device,
            shape,
            tuple(found),
            guidance,
            normalizer,
            call.params,
            weight_arguments,
            call.params.rule == _SCORE_IDENTITY,
            loss.dtype is torch.float64,
            loss.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if stats is None else stats.data_ptr(),
        )
