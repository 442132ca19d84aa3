"""The operations of the reference on checked arguments, in plain PyTorch: what :mod:`fdistill_ops.reference` shows to
users.

Any device, any floating dtype. Arithmetic is float32, or float64 where an input is; scalars of a sample (ratios,
weights, normalisers) are float64 throughout.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ._autograd import refuse_double_backward
from ._call import LossCall, Operands, WeightCall, WeightResult, compute_dtype
from ._distributed import Reduce, all_reduce
from ._torch import is_zero
from ._validation import call_named, floating, refuse_functional, same_device
from .params import NORMALIZERS, PREDICTIONS, REDUCTIONS, LossParams
from .predictions import rows_like, x0_coefficients
from .stats import FIELDS, RATIO_FIELDS

_PREDICTION_NAMES = tuple(PREDICTIONS)
_MEAN, _SUM, _SAMPLE, _NONE = REDUCTIONS.values()
_MEAN_ABS = NORMALIZERS["mean_abs"]


# ----------------------------------------------------------------------------------------------------------- f-weights


def staged_f_weights(call: WeightCall, reduce: Reduce) -> WeightResult:
    """``reduce`` sums a vector over the ranks (one call for the histogram, one for the mean)."""
    return call_named(lambda *_: _staged_f_weights(call, reduce), call.named())


@torch.no_grad()
def _staged_f_weights(call: WeightCall, reduce: Reduce) -> WeightResult:
    params = call.params
    logits, t, bins = _in_memory({"logits": call.logits, "t": call.t, "histogram.bins": call.bins})
    out_dtype = compute_dtype(logits)
    log_r = logits.to(out_dtype)
    log_r = log_r.mean(dim=1).double() if log_r.ndim == 2 else log_r.double()
    finite = log_r.isfinite()
    if t is not None:
        finite &= ~t.isnan()
    log_r = torch.where(finite, log_r, 0.0)
    clipped = torch.stack([finite & (log_r < params.low), finite & (log_r > params.high)]).sum(1)
    log_r = log_r.clamp(params.low, params.high)
    ratio = torch.where(finite, bounded_exp(log_r), 0.0)
    ratio_stats = torch.cat([ratio.sum()[None], clipped]) / finite.sum()

    if bins is not None and t is not None:
        width = (params.max_t - params.min_t) / len(bins)
        position = ((t.double() - params.min_t) / width).nan_to_num(0.0).floor()
        index = position.clamp(0, len(bins) - 1).long()
        updated = torch.where(bins.isfinite() & (bins >= 0), bins, 1.0).double()
        if params.ema_rate < 1:  # this batch counts: not so in eval mode
            member = torch.nn.functional.one_hot(index, len(bins)) * finite[:, None]
            counts, sums = reduce(torch.stack([member.sum(0).double(), (member * ratio[:, None]).sum(0)]))
            mean = (sums / counts.clamp(min=1)).clamp(max=torch.finfo(bins.dtype).max)
            updated = torch.where(counts > 0, params.ema_rate * updated + (1 - params.ema_rate) * mean, updated)
        log_r = log_r - (updated[index] + params.eps).log()
        bins = updated.to(bins.dtype)

    weights = call.divergence.h_from_log(log_r)
    counted = finite & weights.isfinite()
    if params.normalize:
        total, count = reduce(torch.stack([torch.where(counted, weights, 0.0).sum(), counted.sum().double()]))
        weights = weights / (total / count.clamp(min=1) + params.eps)
    weights = torch.where(finite, weights, torch.nan).to(out_dtype)
    if params.zero_nonfinite:
        weights = torch.where(weights.isfinite(), weights, 0.0)
    return WeightResult(weights, bins, ratio_stats)


def f_weights(call: WeightCall) -> WeightResult:
    """:func:`staged_f_weights` within this process."""
    return staged_f_weights(call, all_reduce(None))


def _in_memory(named: Mapping[str, Tensor | None]) -> list[Any]:
    """The operands as PyTorch computes with them. Its zeros without memory, which automatic differentiation makes, make
    0 of a product with infinity."""
    refuse_functional(named)
    return [v.clone() if v is not None and is_zero(v) else v for v in named.values()]


def bounded_exp(log_r: Tensor) -> Tensor:
    """exp(l), held below the largest float32 so that sums of ratios stay finite."""
    return log_r.clamp(max=88.0).exp()


# -------------------------------------------------------------------------------------------------------------- losses


def loss(call: LossCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, differentiable; the statistics (empty unless asked for); and the histogram after this batch."""
    call, made = weighted(call)
    value, stats = call_named(lambda *_: _differentiable(call), call.operands.named())
    if made is not None and call.params.need_stats:
        stats[RATIO_FIELDS] = made.ratio_stats.to(stats.dtype)
    return value, stats, None if made is None else made.bins


def _differentiable(call: LossCall) -> tuple[Tensor, Tensor]:
    value, derivatives, stats = with_derivatives(call)
    return WithGradients.apply(value, derivatives, *call.operands[: len(derivatives)]), stats


def weighted(call: LossCall) -> tuple[LossCall, WeightResult | None]:
    """The call with its f-weights as an operand, and what they were made with."""
    if call.weights is None:
        return call, None
    made = f_weights(call.weights)
    return call._replace(operands=call.operands._replace(weight=made.weights), weights=None), made


@torch.no_grad()
def with_derivatives(call: LossCall) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss; its derivatives, in the dtype of the arithmetic, with respect to the first operands, as many as the
    rule has; and the statistics vector. Without logits."""
    return _RULES[call.params.rule](call.operands, call.params)


@torch.no_grad()
def difference(call: LossCall, out: Tensor | None) -> Tensor:
    """g in x's dtype, 0 outside the mask."""
    return call_named(lambda *_: _difference(call, out), call.operands.named() | {"out": out})


def _difference(call: LossCall, out: Tensor | None) -> Tensor:
    x, mask = call.operands.x, call.operands.mask
    g, _, _ = _score_difference(call.operands, call.params)
    g = (g if mask is None else torch.where(mask, g, 0.0)).to(x.dtype)
    return g if out is None else out.copy_(g)


def _distribution_matching(operands: Operands, params: LossParams) -> tuple[Tensor, list[Tensor], Tensor]:
    g, n, bad = _score_difference(operands, params)
    return _reduced(0.5 * g.square(), g, n, bad, operands, params, [g])


def _score_identity(operands: Operands, params: LossParams) -> tuple[Tensor, list[Tensor], Tensor]:
    alpha, mask = params.identity_alpha, operands.mask
    g, n, _ = _score_difference(operands, params._replace(zero_nonfinite=False))
    k = _coefficient(operands.x, n, operands.weight, params, g.dtype)
    X, T, F = (tensor.to(g.dtype) for tensor in operands[:3])
    terms = k * (T - F) * ((T - X) - alpha * (T - F))
    d_x = -k * (T - F)
    d_teacher = k * ((T - F) + (T - X) - 2 * alpha * (T - F))
    d_fake = -k * ((T - X) - 2 * alpha * (T - F))
    good = terms.isfinite() & d_x.isfinite() & d_teacher.isfinite() & d_fake.isfinite()
    bad = (~good if mask is None else ~good & mask).sum()
    if params.zero_nonfinite:
        terms, d_x, d_teacher, d_fake = (torch.where(good, v, 0.0) for v in (terms, d_x, d_teacher, d_fake))
    return _reduced(terms, d_x, n, bad, operands, params, [d_x, d_teacher, d_fake])


_RULES = (_distribution_matching, _score_identity)  # in the order of params.RULES


def _score_difference(operands: Operands, params: LossParams) -> tuple[Tensor, Tensor, Tensor]:
    """g = w_b / (n_b + eps) * (fake - T) in the shape of x, n [B], and how many elements of g on the mask were not
    finite."""
    operands = Operands(*_in_memory(operands.named()))
    x, teacher, fake, weight, uncond, guidance, mask, x_t, alpha, sigma, normalizer = operands
    dtype = operands.compute_dtype()
    X, T, F = x.to(dtype), teacher.to(dtype), fake.to(dtype)
    if uncond is not None:
        scale = params.guidance_scale if guidance is None else rows_like(guidance, x).to(dtype)
        T = uncond.to(dtype) + scale * (T - uncond.to(dtype))
    difference = F - T
    if x_t is not None and alpha is not None and sigma is not None:
        prediction = _PREDICTION_NAMES[params.prediction]
        a, c = (rows.to(dtype) for rows in x0_coefficients(prediction, rows_like(alpha, x), rows_like(sigma, x)))
        T = a * x_t.to(dtype) + c * T
        difference = c * difference
    if params.normalizer == _MEAN_ABS:
        n = (X - T).abs().flatten(1).double().mean(1) if x.ndim > 1 else (X - T).abs().double()
    elif normalizer is not None:
        n = normalizer.double()
    else:
        n = torch.ones(x.shape[0], dtype=torch.float64, device=x.device)
    g = _coefficient(x, n, weight, params, dtype) * difference
    bad = ~g.isfinite() if mask is None else ~g.isfinite() & mask
    if params.zero_nonfinite:
        g = torch.where(g.isfinite(), g, 0.0)
    return g, n, bad.sum()


def _coefficient(x: Tensor, n: Tensor, weight: Tensor | None, params: LossParams, dtype: torch.dtype) -> Tensor:
    """w / (n_b + eps), shaped to broadcast against x."""
    k = rows_like(1 / (n + params.eps), x)
    return (k if weight is None else rows_like(weight.double(), x) * k).to(dtype)


def _reduced(
    terms: Tensor,
    g: Tensor,
    n: Tensor,
    bad: Tensor,
    operands: Operands,
    params: LossParams,
    gradients: list[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The sum of the terms over the mask, over the number of masked elements; each of the gradients over that number,
    on the mask, and 0 elsewhere; and the statistics."""
    x, weight, mask = operands.x, operands.weight, operands.mask
    on = torch.ones_like(terms, dtype=torch.bool) if mask is None else mask
    flat = (x.shape[0], math.prod(x.shape[1:]))
    per_sample = torch.where(on, terms, 0.0).reshape(flat).double().sum(1)
    counts = on.reshape(flat).sum(1)
    if params.reduction == _NONE:
        value, divisor = torch.where(on, terms, 0.0), torch.ones_like(counts.sum())
    elif params.reduction == _SAMPLE:
        count = counts.clamp(min=1)
        value, divisor = per_sample / count, rows_like(count, x)
    else:
        divisor = counts.sum().clamp(min=1) if params.reduction == _MEAN else torch.ones_like(counts.sum())
        value = per_sample.sum() / divisor
    value = value.to(terms.dtype)
    derivatives = [torch.where(on, d, 0.0) / divisor for d in gradients]
    mean = per_sample.sum() / counts.sum().clamp(min=1) if params.reduction == _NONE else value
    stats = _statistics(mean, torch.where(on, g, 0.0), counts.sum(), n, weight, bad)
    return value, derivatives, stats if params.need_stats else stats[:0]


def _statistics(value: Tensor, g: Tensor, count: Tensor, n: Tensor, weight: Tensor | None, bad: Tensor) -> Tensor:
    rows = torch.ones_like(n) if weight is None else weight.double().reshape(-1)
    fields = {
        "loss": value.double().sum() / max(value.numel(), 1),
        "grad_norm": g.double().square().sum().sqrt(),
        "grad_mean_abs": g.double().abs().sum() / count.clamp(min=1),
        "nonfinite": bad.double(),
    }
    for name, values in (("normalizer", n), ("weight", rows)):
        finite = values.isfinite()
        number = finite.sum()
        total, squares = (torch.where(finite, v, 0.0).sum() for v in (values, values.square()))
        padded = torch.nn.functional.pad(values, (0, 1), value=torch.nan)  # so that there is a value to take
        low = padded.nan_to_num(torch.inf, torch.inf, torch.inf).amin()
        high = padded.nan_to_num(-torch.inf, -torch.inf, -torch.inf).amax()
        fields |= {f"{name}_min": low, f"{name}_mean": total / number, f"{name}_max": high}
        fields |= {key: torch.where(number > 0, fields[key], torch.nan) for key in (f"{name}_min", f"{name}_max")}
    fields["effective_sample_size"] = total**2 / squares
    missing = torch.full_like(fields["loss"], torch.nan)
    return torch.stack([fields.get(name, missing) for name in FIELDS]).to(g.dtype)


class WithGradients(torch.autograd.Function):
    """A value that depends on some tensors only through the derivatives given with it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, derivatives: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.dtypes, ctx.inputs = [tensor.dtype for tensor in inputs], [weakref.ref(tensor) for tensor in inputs]
        ctx.save_for_backward(*derivatives)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        with torch.no_grad():
            results = [
                (rows_like(upstream, d) * d).to(dtype)
                for d, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needed, strict=True)
                if need
            ]
        if torch.is_grad_enabled():
            results = refuse_double_backward(results, ctx.inputs, upstream)
        remaining = iter(results)
        return (None, None, *(next(remaining) if need else None for need in needed))


# ----------------------------------------------------------------------------------------------------------------- GAN


def gan_generator_loss(logits: Tensor) -> Tensor:
    """See :func:`fdistill_ops.gan_generator_loss`."""
    return call_named(lambda v: _mean_softplus(-v), {"logits": floating(logits, "logits")})


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """See :func:`fdistill_ops.gan_discriminator_loss`."""
    floating(real_logits, "real_logits")
    same_device(floating(fake_logits, "fake_logits"), "fake_logits", real_logits, "real_logits")

    def loss(real: Tensor, fake: Tensor) -> Tensor:
        return _mean_softplus(-real) + _mean_softplus(fake)

    return call_named(loss, {"real_logits": real_logits, "fake_logits": fake_logits})


def _mean_softplus(logits: Tensor) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return softplus(logits, threshold=40.0).sum() / max(logits.numel(), 1)  # linear where it is exactly so
