"""What is composed of the operations of a back end: weights times weights, clipping by norm, losses that are not
reduced, the weights of every divergence and process group.

``operations`` is :mod:`fdistill_ops._ops`, which asks for the back end, or :mod:`fdistill_ops._reference`: both have
``weights``, ``distribution_matching``, ``difference`` and ``f_distill`` for checked arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _distributed
from ._checks import OptionalTensors, WeightCall, compute_dtype, named
from ._reference import WithGradients, staged_f_weights
from ._validation import call_named, refuse_functional
from .params import REDUCTIONS, LossParams
from .stats import RATIO_FIELDS

Inputs = tuple[Tensor, Tensor, Tensor]  # x, teacher, fake
_MEAN, _SUM, _NONE = REDUCTIONS["mean"], REDUCTIONS["sum"], REDUCTIONS["none"]


def weights(operations: Any, call: WeightCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """The f-weights [B], the new histogram (None or empty without one) and [ratio mean, clipped low, clipped high]."""
    if needs_stages(call):
        reduce = _distributed.all_reduce(call.group)
        return staged_f_weights(call.logits, call.t, call.bins(), call.divergence, call.params, reduce)
    return operations.weights(call.logits, call.t, call.bins(), call.params)


def needs_stages(call: WeightCall) -> bool:
    """Whether the B log-ratios go through PyTorch: for a registered divergence, whose h is a Python function, and for
    sums over several ranks, between which a collective stands."""
    return call.divergence.kind is None or _distributed.ranks(call.group) > 1


def f_distill(
    operations: Any,
    inputs: Inputs,
    call: WeightCall,
    tensors: OptionalTensors,
    params: LossParams,
    max_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """The f-distill loss and the statistics; updates the histogram. One operation where nothing is asked for that lies
    between the weights and the loss."""
    if tensors[0] is None and max_norm is None and params.reduction != _NONE and not needs_stages(call):
        sources = call.logits, call.t, call.bins()
        loss, stats, bins = operations.f_distill(*inputs, *sources, tensors, call.params, params)
    else:
        (_, bins, ratio_stats), used = _weighted(operations, call, tensors)
        loss, stats = call_named(lambda *_: matching(operations, inputs, used, params, max_norm), call.named())
        if params.need_stats:
            stats[RATIO_FIELDS] = ratio_stats.to(stats.dtype)
    call.record(bins)
    return loss, stats


def f_difference(
    operations: Any,
    inputs: Inputs,
    call: WeightCall,
    tensors: OptionalTensors,
    params: LossParams,
    max_norm: float | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """g with the f-weights, and those [B]; updates the histogram."""
    (f_weights, bins, _), used = _weighted(operations, call, tensors)
    g = call_named(lambda *_: difference(operations, inputs, used, params, max_norm, out), call.named())
    call.record(bins)
    return g, f_weights


def _weighted(
    operations: Any, call: WeightCall, tensors: OptionalTensors
) -> tuple[tuple[Tensor, Tensor | None, Tensor], OptionalTensors]:
    """What :func:`weights` returns, and the tensors with the product of the f-weights and the weight given."""
    made = weights(operations, call)
    given = tensors[0]
    weight = made[0] if given is None else call_named(lambda rows: times(made[0], rows), {"weight": given})
    return made, (weight, *tensors[1:])


def matching(
    operations: Any, inputs: Inputs, tensors: OptionalTensors, params: LossParams, max_norm: float | None
) -> tuple[Tensor, Tensor]:
    """The distribution-matching loss and the statistics."""
    if max_norm is not None:
        tensors = clipped(operations, inputs, tensors, params, max_norm)
    if params.reduction == _NONE:
        return not_reduced(operations, inputs, tensors, params)
    return operations.distribution_matching(*inputs, tensors, params)


def not_reduced(operations: Any, inputs: Inputs, tensors: OptionalTensors, params: LossParams) -> tuple[Tensor, Tensor]:
    """The loss of every element, from g, and the statistics, of which that of the loss is its mean."""
    x, teacher, fake = inputs
    with torch.no_grad():
        g = unrounded(operations, inputs, tensors, params)
        loss, stats = 0.5 * g.square(), g.new_empty(0)
        if params.need_stats:
            mean = params._replace(reduction=_MEAN)
            _, stats = operations.distribution_matching(x.detach(), teacher, fake, tensors, mean)
    return WithGradients.apply(loss, [g], x), stats


def difference(
    operations: Any,
    inputs: Inputs,
    tensors: OptionalTensors,
    params: LossParams,
    max_norm: float | None,
    out: Tensor | None,
) -> Tensor:
    """g itself."""
    if max_norm is not None:
        tensors = clipped(operations, inputs, tensors, params, max_norm)
    return operations.difference(*inputs, tensors, params, out)


def unrounded(operations: Any, inputs: Inputs, tensors: OptionalTensors, params: LossParams) -> Tensor:
    """g in the dtype of the arithmetic."""
    x, teacher, fake = inputs
    _, uncond, _, _, x_t, *_ = tensors
    refuse_functional(named(*inputs, tensors))
    dtype = compute_dtype(x, teacher, fake, uncond, x_t)
    wide = call_named(lambda v: v.detach().to(dtype), {"x": x})
    total = params._replace(reduction=_SUM, need_stats=False)
    return operations.difference(wide, teacher, fake, tensors, total, None)


@torch.no_grad()
def clipped(
    operations: Any, inputs: Inputs, tensors: OptionalTensors, params: LossParams, max_norm: float
) -> OptionalTensors:
    """The tensors with a weight such that g of each sample has at most that L2 norm over the mask. The norm is taken
    relative to the sample's largest element, so that no square leaves the range."""
    x = inputs[0]
    g = unrounded(operations, inputs, tensors, params).reshape(len(x), math.prod(x.shape[1:]))
    largest = torch.nn.functional.pad(g.abs(), (0, 1)).amax(1)
    relative = (g / torch.where(largest == 0, 1.0, largest)[:, None]).norm(dim=1)
    factor = (max_norm / (largest.double() * relative.double())).clamp(max=1.0)
    return (factor if tensors[0] is None else times(factor, tensors[0]), *tensors[1:])


@torch.no_grad()
def times(per_sample: Tensor, rows: Tensor) -> Tensor:
    """per_sample [B] times rows, whose shape is a leading part of x's, in float64. What is expanded stays so."""
    if rows.ndim == 0:
        return per_sample.double() * rows.double()
    sizes = [1 if d > 0 and stride == 0 else rows.shape[d] for d, stride in enumerate(rows.stride())]
    factor = per_sample.double().reshape(per_sample.shape + (1,) * (rows.ndim - 1))
    return (rows.as_strided(sizes, rows.stride()).double() * factor).expand(rows.shape)
