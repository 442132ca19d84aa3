"""What the back ends of the compiled module share: its two entries, the loss and the weights, and tensors as its
records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import OptionalTensors
from ..params import LossParams, WeightParams
from ._functions import Functions
from ._shared import histogram_buffers, plain

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


# The order of csrc/include/fdistill/calls.h.
_OPERAND_NAMES = (
    *("x", "teacher", "fake", "teacher_uncond", "x_t", "mask", "weight", "alpha", "sigma"),
    *("the gradient of x", "the gradient of teacher", "the gradient of fake"),
)
MAX_DIMS = 64  # kMaxDims of csrc/include/fdistill/layout.h


def record(tensor: Tensor | None, name: str) -> tuple[int, int, tuple[int, ...], Tensor] | None:
    """(address, dtype, strides), and the tensor itself, which keeps the memory alive; None for one without elements."""
    if tensor is None:
        return None
    tensor = plain(tensor, name)
    address = tensor.data_ptr()
    return (address, DTYPES[tensor.dtype], tensor.stride(), tensor) if address else None


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


class Compiled(Functions):
    def run_loss(self, device: torch.device, *arguments: Any) -> None:
        """The module's ``loss`` with these arguments."""
        raise NotImplementedError

    def run_weights(self, device: torch.device, arguments: Any, weights: int, ratio_stats: int) -> None:
        """The module's ``f_weights`` with these arguments."""
        raise NotImplementedError

    def weight_arguments(
        self, logits: Tensor, t: Tensor | None, bins: Tensor | None, params: WeightParams
    ) -> tuple[tuple[Any, ...], Tensor | None]:
        bins, new_bins = histogram_buffers(bins)
        bins_address, n_bins = (0, 0) if bins is None else (bins.data_ptr(), bins.numel())
        if t is not None and t.dtype not in DTYPES:
            t = t.double()
        heads = logits.shape[1] if logits.ndim == 2 else 1
        new_address = 0 if new_bins is None else new_bins.data_ptr()
        histogram = (bins_address, n_bins, new_address)
        arguments = (logits.shape[0], heads, record(logits, "logits"), record(t, "t"), *histogram, params)
        return (*arguments, bins), new_bins  # the last only to be kept alive

    def compute_weights(self, arguments: tuple[Any, ...], weights: Tensor, ratio_stats: Tensor) -> None:
        self.run_weights(weights.device, arguments, weights.data_ptr(), ratio_stats.data_ptr())

    def compute_loss(
        self,
        inputs: Sequence[Tensor],
        tensors: OptionalTensors,
        params: LossParams,
        gradients: Sequence[Tensor | None],
        results: tuple[Tensor, Tensor | None, Tensor | None],
        weight_arguments: tuple[Any, ...] | None,
        score_identity: bool,
    ) -> None:
        x, teacher, fake = inputs
        weight, uncond, guidance, mask, x_t, alpha, sigma, normalizer = tensors
        loss, scale, stats = results
        operands = [x, teacher, fake, uncond, x_t, mask, weight, alpha, sigma, *gradients]
        shape = tuple(x.shape)
        if x.ndim > MAX_DIMS:
            view = _of_few_dimensions(x)
            operands, shape = [view(operand) for operand in operands], tuple(view(x).shape)
        self.run_loss(
            loss.device,
            shape,
            tuple(map(record, operands, _OPERAND_NAMES)),
            record(guidance, "guidance_scale"),
            record(normalizer, "normalizer"),
            params,
            weight_arguments,
            score_identity,
            loss.dtype is torch.float64,
            loss.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if stats is None else stats.data_ptr(),
        )
