"""What the back ends of the compiled module share: tensors as its records, and the functions of a back end over its two
entries, the loss and the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import OptionalTensors, compute_dtype
from ..params import REDUCTIONS, LossParams, WeightParams
from ..stats import FIELDS
from ._shared import histogram_buffers, in_dtype_of, plain

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
_SAMPLE = REDUCTIONS["sample"]


def record(tensor: Tensor | None) -> tuple[int, int, tuple[int, ...], Tensor] | None:
    """(address, dtype, strides), and the tensor itself, which keeps the memory alive."""
    if tensor is None:
        return None
    tensor = plain(tensor)
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(), tensor


def _weight_arguments(
    logits: Tensor, t: Tensor | None, bins: Tensor | None, params: WeightParams
) -> tuple[tuple[Any, ...], Tensor | None]:
    bins, new_bins = histogram_buffers(bins)
    bins_address, n_bins = (0, 0) if bins is None else (bins.data_ptr(), bins.numel())
    if t is not None and t.dtype not in DTYPES:
        t = t.double()
    heads = logits.shape[1] if logits.ndim == 2 else 1
    new_address = 0 if new_bins is None else new_bins.data_ptr()
    arguments = (logits.shape[0], heads, record(logits), record(t), bins_address, n_bins, new_address, params)
    return (*arguments, bins), new_bins  # the last only to be kept alive


class Compiled:
    """The functions of a back end (:mod:`fdistill_ops.backends`)."""

    def gradient_like(self, x: Tensor) -> Tensor:
        """Uninitialised, with x's shape, dtype and (where they are dense) strides."""
        return torch.empty_like(x)

    def run_loss(self, device: torch.device, *arguments: Any) -> None:
        """The module's ``loss`` with these arguments."""
        raise NotImplementedError

    def run_weights(self, device: torch.device, arguments: Any, weights: int, ratio_stats: int) -> None:
        """The module's ``f_weights`` with these arguments."""
        raise NotImplementedError

    def _loss(
        self,
        inputs: Sequence[Tensor],
        tensors: OptionalTensors,
        params: LossParams,
        gradients: Sequence[Tensor | None],
        weight_arguments: tuple[Any, ...] | None = None,
        score_identity: bool = False,
        with_scale: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Runs the kernel. The loss, the scale of float16 gradients (None without such), the statistics (None unless
        wanted)."""
        x, teacher, fake = inputs
        weight, uncond, guidance, mask, x_t, alpha, sigma, normalizer = tensors
        dtype, device = compute_dtype(x, teacher, fake, uncond, x_t), x.device
        per_sample = params.reduction == _SAMPLE
        loss = torch.empty(x.shape[:1] if per_sample else (), dtype=dtype, device=device)
        scale = stats = None
        if with_scale and any(g is not None and g.dtype is torch.float16 for g in gradients):
            scale = torch.empty(x.shape[:1], dtype=dtype, device=device)
        if params.need_stats:
            stats = torch.empty(len(FIELDS), dtype=dtype, device=device)
        operands = (
            record(x),
            record(teacher),
            record(fake),
            record(uncond),
            record(x_t),
            record(mask),
            record(weight),
            record(alpha),
            record(sigma),
            *[record(gradient) for gradient in gradients],
        )
        self.run_loss(
            device,
            tuple(x.shape),
            operands,
            record(guidance),
            record(normalizer),
            params,
            weight_arguments,
            score_identity,
            dtype is torch.float64,
            loss.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            0 if stats is None else stats.data_ptr(),
        )
        return loss, scale, stats

    def f_weights(
        self, logits: Tensor, t: Tensor | None, bins: Tensor | None, params: WeightParams
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        arguments, new_bins = _weight_arguments(logits, t, bins, params)
        weights = torch.empty(logits.shape[:1], dtype=compute_dtype(logits), device=logits.device)
        ratio_stats = torch.empty(3, dtype=torch.float64, device=logits.device)
        self.run_weights(logits.device, arguments, weights.data_ptr(), ratio_stats.data_ptr())
        return weights, in_dtype_of(bins, new_bins), ratio_stats

    def distribution_matching(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        tensors: OptionalTensors,
        params: LossParams,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        gradient = self.gradient_like(x) if need_grad else None
        loss, scale, stats = self._loss((x, teacher, fake), tensors, params, (gradient, None, None))
        return loss, gradient, scale, stats

    def difference(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        tensors: OptionalTensors,
        params: LossParams,
        out: Tensor | None,
    ) -> Tensor:
        """g: the gradient of the sum (params.reduction)."""
        g = self.gradient_like(x) if out is None else out
        self._loss((x, teacher, fake), tensors, params, (g, None, None), with_scale=False)
        return g

    def f_distill(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        logits: Tensor,
        t: Tensor | None,
        bins: Tensor | None,
        tensors: OptionalTensors,
        weight_params: WeightParams,
        params: LossParams,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        arguments, new_bins = _weight_arguments(logits, t, bins, weight_params)
        gradient = self.gradient_like(x) if need_grad else None
        loss, scale, stats = self._loss((x, teacher, fake), tensors, params, (gradient, None, None), arguments)
        return loss, gradient, scale, stats, in_dtype_of(bins, new_bins)

    def score_identity(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        normalizer: Tensor | None,
        params: LossParams,
        need_grads: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        inputs = (x, teacher, fake)
        gradients = [
            self.gradient_like(tensor) if need else None for tensor, need in zip(inputs, need_grads, strict=True)
        ]
        tensors = (weight, None, None, mask, None, None, None, normalizer)
        loss, scale, stats = self._loss(inputs, tensors, params, gradients, score_identity=True)
        return loss, *gradients, scale, stats
