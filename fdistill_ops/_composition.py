"""What is composed of the operations of a back end: weights times weights, clipping by norm, losses that are not
reduced, the weights of every divergence and process group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _distributed, _ops
from ._call import LossCall, WeightCall, WeightResult
from ._reference import WithGradients, staged_f_weights
from ._validation import call_named, refuse_functional
from .params import REDUCTIONS, RULES
from .stats import RATIO_FIELDS

_MEAN, _SUM, _NONE = REDUCTIONS["mean"], REDUCTIONS["sum"], REDUCTIONS["none"]
_MATCHING = RULES["distribution_matching"]


def f_weights(call: WeightCall, backend: str) -> Tensor:
    """The f-weights [B]; updates the histogram."""
    made = _made(call, backend)
    call.record(made.bins)
    return made.weights


def _made(call: WeightCall, backend: str) -> WeightResult:
    if needs_stages(call):
        return staged_f_weights(call, _distributed.all_reduce(call.group))
    return _ops.f_weights(call, backend)


def needs_stages(call: WeightCall) -> bool:
    """Whether the B log-ratios go through PyTorch: for a registered divergence, whose h is a Python function, and for
    sums over several ranks, between which a collective stands."""
    return call.divergence.kind is None or (call.group is not None and _distributed.ranks(call.group) > 1)


def loss(call: LossCall) -> tuple[Tensor, Tensor | None]:
    """The loss and the statistics (empty or None unless asked for); updates the histogram. One operation where nothing
    is asked for that lies between the weights and the loss."""
    weights, params = call.weights, call.params
    if weights is None:
        return _without_logits(call)
    if (
        call.operands.weight is None
        and call.max_norm is None
        and params.reduction != _NONE
        and not needs_stages(weights)
    ):
        loss, stats, bins = _ops.loss(call)
    else:
        made, weighted = _weighted(call, weights)
        loss, stats = call_named(lambda *_: _without_logits(weighted), _typed(weights))
        bins = made.bins
        if params.need_stats and stats is not None:
            stats[RATIO_FIELDS] = made.ratio_stats.to(stats.dtype)
    weights.record(bins)
    return loss, stats


def difference(call: LossCall, out: Tensor | None) -> Tensor:
    """g itself."""
    if call.max_norm is not None:
        call = _clipped(call, call.max_norm)
    return _ops.difference(call, out)


def f_difference(call: LossCall, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """g with the f-weights, and those [B]; updates the histogram."""
    weights = call.weights
    assert weights is not None
    made, weighted = _weighted(call, weights)
    g = call_named(lambda *_: difference(weighted, out), _typed(weights))
    weights.record(made.bins)
    return g, made.weights


def _typed(weights: WeightCall) -> dict[str, Tensor | None]:
    """The arguments whose type the weights have."""
    return {"logits": weights.logits, "t": weights.t}


def _weighted(call: LossCall, weights: WeightCall) -> tuple[WeightResult, LossCall]:
    """The f-weights, and the call with the product of them and the weight given."""
    made, given = _made(weights, call.backend), call.operands.weight
    weight = made.weights if given is None else call_named(lambda v: _times(made.weights, v), {"weight": given})
    return made, call._replace(operands=call.operands._replace(weight=weight), weights=None)


def _without_logits(call: LossCall) -> tuple[Tensor, Tensor | None]:
    if call.max_norm is not None:
        call = _clipped(call, call.max_norm)
    if call.params.reduction == _NONE and call.params.rule == _MATCHING:
        return _not_reduced(call)
    loss, stats, _ = _ops.loss(call)
    return loss, stats


def _not_reduced(call: LossCall) -> tuple[Tensor, Tensor | None]:
    """The loss of every element, from g, and the statistics, of which that of the loss is its mean."""
    x = call.operands.x
    with torch.no_grad():
        g = _unrounded(call)
        loss, stats = 0.5 * g.square(), None
        if call.params.need_stats:
            operands = call.operands._replace(x=x.detach())
            _, stats, _ = _ops.loss(call._replace(operands=operands, params=call.params._replace(reduction=_MEAN)))
    return WithGradients.apply(loss, [g], x), stats


def _unrounded(call: LossCall) -> Tensor:
    """g in the dtype of the arithmetic."""
    operands = call.operands
    refuse_functional(operands.named())
    dtype = operands.compute_dtype()
    wide = call_named(lambda v: v.detach().to(dtype), {"x": operands.x})
    total = call.params._replace(reduction=_SUM, need_stats=False)
    return _ops.difference(call._replace(operands=operands._replace(x=wide), params=total), None)


@torch.no_grad()
def _clipped(call: LossCall, max_norm: float) -> LossCall:
    """The call with a weight such that g of each sample has at most that L2 norm over the mask. The norm is taken
    relative to the sample's largest element, so that no square leaves the range."""
    x, weight = call.operands.x, call.operands.weight
    g = _unrounded(call).reshape(len(x), math.prod(x.shape[1:]))
    largest = torch.nn.functional.pad(g.abs(), (0, 1)).amax(1)
    relative = (g / torch.where(largest == 0, 1.0, largest)[:, None]).norm(dim=1)
    factor = (max_norm / (largest.double() * relative.double())).clamp(max=1.0)
    factor = factor if weight is None else _times(factor, weight)
    return call._replace(operands=call.operands._replace(weight=factor), max_norm=None)


@torch.no_grad()
def _times(per_sample: Tensor, rows: Tensor) -> Tensor:
    """per_sample [B] times rows, whose shape is a leading part of x's, in float64. What is expanded stays so."""
    if rows.ndim == 0:
        return per_sample.double() * rows.double()
    sizes = [1 if d > 0 and stride == 0 else rows.shape[d] for d, stride in enumerate(rows.stride())]
    factor = per_sample.double().reshape(per_sample.shape + (1,) * (rows.ndim - 1))
    return (rows.as_strided(sizes, rows.stride()).double() * factor).expand(rows.shape)
