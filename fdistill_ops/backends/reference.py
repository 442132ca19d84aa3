"""The reference as the operators' back end: values and gradients of :mod:`fdistill_ops.reference`, in plain PyTorch.
Calls that are not compiled evaluate that module itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _reference
from .._checks import OptionalTensors
from ..params import LossParams, WeightParams
from ..predictions import rows_like
from ..stats import RATIO_FIELDS

name = "reference"

f_weights = _reference.weights
difference = _reference.difference


def distribution_matching(
    x: Tensor, teacher: Tensor, fake: Tensor, tensors: OptionalTensors, params: LossParams, need_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    loss, derivatives, stats = _reference.matching_with_derivatives(x, teacher, fake, tensors, params)
    (gradient,), scale = _stored(derivatives, [x], [need_grad])
    return loss, gradient, scale, stats


def f_distill(
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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    weight, new_bins, ratio_stats = _reference.weights(logits, t, bins, weight_params)
    loss, gradient, scale, stats = distribution_matching(x, teacher, fake, (weight, *tensors[1:]), params, need_grad)
    if params.need_stats:
        stats[RATIO_FIELDS] = ratio_stats.to(stats.dtype)
    return loss, gradient, scale, stats, new_bins


def score_identity(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    normalizer: Tensor | None,
    params: LossParams,
    need_grads: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    loss, derivatives, stats = _reference.identity_with_derivatives(x, teacher, fake, weight, mask, normalizer, params)
    gradients, scale = _stored(derivatives, [x, teacher, fake], need_grads)
    return loss, *gradients, scale, stats


def _stored(
    derivatives: Sequence[Tensor], inputs: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[list[Tensor | None], Tensor | None]:
    """The derivatives that are needed, each in its input's dtype and strides, and the scale [B] of those in float16
    (None without such): for each sample the power of two that they were divided by, so that their largest element is
    near float16's largest. They would otherwise underflow before a loss scale has come with the incoming gradient."""
    wanted = [d if need else None for d, need in zip(derivatives, needed, strict=True)]
    scale = None
    rows = [d.reshape(len(d), -1).abs() for d, x in zip(wanted, inputs, strict=True) if d is not None and _is_half(x)]
    if rows:
        largest = torch.nn.functional.pad(torch.cat(rows, 1), (0, 1)).amax(1)
        _, exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1.0))
        scale = torch.ldexp(torch.ones_like(largest), (exponent - 15).clamp(-120, 120))
    stored: list[Tensor | None] = []
    for derivative, x in zip(wanted, inputs, strict=True):
        if derivative is not None:
            if scale is not None and _is_half(x):
                derivative = derivative / rows_like(scale, x)
            derivative = torch.empty_like(x).copy_(derivative)
        stored.append(derivative)
    return stored, scale


def _is_half(x: Tensor) -> bool:
    return x.dtype is torch.float16
