"""The reference as a back end of the operators: values and gradients of :mod:`fdistill_ops.reference`, in plain
PyTorch. Calls that are not traced evaluate that module itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _reference
from .._call import LossCall, LossResult, Needs, WeightCall, WeightResult
from ..predictions import rows_like
from ..stats import RATIO_FIELDS
from ._shared import scaled


class Reference:
    name = "reference"

    def f_weights(self, call: WeightCall) -> WeightResult:
        return _reference.f_weights(call)

    def difference(self, call: LossCall, out: Tensor | None) -> Tensor:
        return _reference.difference(call, out)

    def loss(self, call: LossCall, needs: Needs) -> LossResult:
        call, made = _reference.weighted(call)
        value, derivatives, stats = _reference.with_derivatives(call)
        wanted = [d if need else None for d, need in zip(derivatives, needs, strict=False)]
        stored, scale = _stored(wanted, call.operands[:3][: len(wanted)])
        if made is not None and call.params.need_stats:
            stats[RATIO_FIELDS] = made.ratio_stats.to(stats.dtype)
        x, teacher, fake = [*stored, None, None][:3]
        return LossResult(value, (x, teacher, fake), scale, stats, None if made is None else made.bins)

    def scale_gradient(self, gradient: Tensor, scale: Tensor | None, upstream: Tensor, keep: bool) -> Tensor:
        return scaled(gradient, upstream if scale is None or not _is_half(gradient) else upstream * scale)

    def empty_cache(self) -> int:
        return 0


def _stored(wanted: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> tuple[list[Tensor | None], Tensor | None]:
    """The derivatives that are wanted, each in its input's dtype and strides, and the scale [B] of those in float16
    (None without such): for each sample the power of two that they were divided by, so that their largest element is
    near float16's largest. They would otherwise underflow before a loss scale has come with the incoming gradient."""
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


backend = Reference()
