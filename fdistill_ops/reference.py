"""Every operation in plain PyTorch: the readable specification the kernels are held to.

Same signatures, checks and results as the public functions; any device, any floating dtype. Arithmetic is float32, or
float64 where an input is; scalars of a sample (ratios, weights, normalisers) are float64 throughout.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from . import _checks
from ._autograd import refuse_double_backward
from .divergences import Divergence
from .params import NORMALIZERS, PREDICTIONS, REDUCTIONS, LossParams, WeightParams
from .predictions import rows_like, to_x0, x0_coefficients
from .stats import FIELDS, RATIO_FIELDS, LossStats

if TYPE_CHECKING:
    from .weights import RatioHistogram

__all__ = [
    "distribution_matching_loss",
    "f_distill_loss",
    "f_weights",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "score_difference",
    "score_identity_loss",
    "to_x0",
]

_PREDICTION_NAMES = tuple(PREDICTIONS)
_MEAN, _SUM, _SAMPLE = REDUCTIONS.values()
_MEAN_ABS = NORMALIZERS["mean_abs"]
Reduce = Callable[[Tensor], Tensor]


# ----------------------------------------------------------------------------------------------------------- f-weights


def f_weights(
    logits: Tensor,
    t: Tensor | None = None,
    *,
    divergence: str | Divergence = "js",
    logit_clip: float | None = 10.0,
    ratio_clip: tuple[float, float] | None = (0.1, 20.0),
    histogram: RatioHistogram | None = None,
    normalize: str | None = "mean",
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    group: Any = None,
) -> Tensor:
    """See :func:`fdistill_ops.f_weights`."""
    t, divergence, params = _checks.f_weights(
        logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, eps, nonfinite
    )
    bins = None if histogram is None else histogram.bins
    weights, bins, _ = staged_f_weights(logits, t, bins, divergence, params, all_reduce(group))
    if histogram is not None:
        histogram.record(bins)
    return weights


def ranks(group: Any) -> int:
    """How many ranks a process group has; 1 for None."""
    if group is None:
        return 1
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(f"group must be a process group that this process belongs to, got {group!r}")
    return torch.distributed.get_world_size(group)


def all_reduce(group: Any) -> Reduce:
    """The sum over the ranks of a process group; the identity for None and for a group of one."""
    if ranks(group) == 1:
        return lambda packed: packed

    def reduce(packed: Tensor) -> Tensor:
        torch.distributed.all_reduce(packed, group=group)
        return packed

    return reduce


@torch.no_grad()
def staged_f_weights(
    logits: Tensor, t: Tensor | None, bins: Tensor | None, divergence: Divergence, params: WeightParams, reduce: Reduce
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights [B], the histogram after this batch, and [ratio mean, clipped low, clipped high]; ``reduce`` sums a
    vector over the ranks (one call for the histogram, one for the mean)."""
    out_dtype = _checks.compute_dtype(logits)
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

    weights = divergence.h_from_log(log_r)
    counted = finite & weights.isfinite()
    if params.normalize:
        total, count = reduce(torch.stack([torch.where(counted, weights, 0.0).sum(), counted.sum().double()]))
        weights = weights / (total / count.clamp(min=1) + params.eps)
    weights = torch.where(finite, weights, torch.nan).to(out_dtype)
    if params.zero_nonfinite:
        weights = torch.where(weights.isfinite(), weights, 0.0)
    return weights, bins, ratio_stats


def bounded_exp(log_r: Tensor) -> Tensor:
    """exp(l), held below the largest float32 so that sums of ratios stay finite."""
    return log_r.clamp(max=88.0).exp()


# -------------------------------------------------------------------------------------------------------------- losses


def distribution_matching_loss(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    *,
    weight: Tensor | float | None = None,
    teacher_uncond: Tensor | None = None,
    guidance_scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    prediction: str = "x0",
    x_t: Tensor | None = None,
    alpha: Tensor | float | None = None,
    sigma: Tensor | float | None = None,
    normalizer: str | Tensor | None = "mean_abs",
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    reduction: str = "mean",
    return_stats: bool = False,
) -> Any:
    """See :func:`fdistill_ops.distribution_matching_loss`."""
    tensors, params = _checks.distribution_matching(
        x,
        teacher,
        fake,
        weight,
        teacher_uncond,
        guidance_scale,
        mask,
        prediction,
        x_t,
        alpha,
        sigma,
        normalizer,
        eps,
        nonfinite,
        reduction,
        return_stats,
    )
    loss, stats = distribution_matching(x, teacher, fake, tensors, params)
    return (loss, LossStats(stats)) if return_stats else loss


def distribution_matching(
    x: Tensor, teacher: Tensor, fake: Tensor, tensors: _checks.OptionalTensors, params: LossParams
) -> tuple[Tensor, Tensor]:
    """The loss and the statistics vector, from checked arguments."""
    g, n, bad = _score_difference(x, teacher, fake, tensors, params)
    return _reduced(0.5 * g.square(), g, n, bad, x, tensors, params, [(x, g)])


def f_distill_loss(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    logits: Tensor,
    t: Tensor | None = None,
    *,
    divergence: str | Divergence = "js",
    logit_clip: float | None = 10.0,
    ratio_clip: tuple[float, float] | None = (0.1, 20.0),
    histogram: RatioHistogram | None = None,
    normalize: str | None = "mean",
    group: Any = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    return_stats: bool = False,
    **loss_arguments: Any,
) -> Any:
    """See :func:`fdistill_ops.f_distill_loss`."""
    _checks.no_weight(loss_arguments)
    t, divergence, weight_params = _checks.f_weights(
        logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, eps, nonfinite
    )
    loss_arguments |= {"eps": eps, "nonfinite": nonfinite, "return_stats": return_stats}
    tensors, params = _checks.distribution_matching(x, teacher, fake, **loss_arguments)
    _checks.same_batch(logits, x)
    bins = None if histogram is None else histogram.bins
    weight, bins, ratio_stats = staged_f_weights(logits, t, bins, divergence, weight_params, all_reduce(group))
    loss, stats = distribution_matching(x, teacher, fake, (weight, *tensors[1:]), params)
    if histogram is not None:
        histogram.record(bins)
    if not return_stats:
        return loss
    stats[RATIO_FIELDS] = ratio_stats.to(stats.dtype)
    return loss, LossStats(stats)


def score_difference(
    x: Tensor, teacher: Tensor, fake: Tensor, *, out: Tensor | None = None, **loss_arguments: Any
) -> Tensor:
    """See :func:`fdistill_ops.score_difference`."""
    tensors, params = _checks.distribution_matching(x, teacher, fake, **loss_arguments)
    if out is not None:
        _checks.output(out, x, teacher, fake, *tensors)
    return difference(x, teacher, fake, tensors, params, out)


@torch.no_grad()
def difference(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    tensors: _checks.OptionalTensors,
    params: LossParams,
    out: Tensor | None = None,
) -> Tensor:
    """g in x's dtype, 0 outside the mask, from checked arguments."""
    g, _, _ = _score_difference(x, teacher, fake, tensors, params)
    mask = tensors[3]
    g = (g if mask is None else torch.where(mask, g, 0.0)).to(x.dtype)
    return g if out is None else out.copy_(g)


def score_identity_loss(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    *,
    alpha: float = 1.0,
    weight: Tensor | float | None = None,
    mask: Tensor | None = None,
    normalizer: str | Tensor | None = "mean_abs",
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    reduction: str = "mean",
    return_stats: bool = False,
) -> Any:
    """See :func:`fdistill_ops.score_identity_loss`."""
    tensors, params = _checks.distribution_matching(
        x,
        teacher,
        fake,
        weight=weight,
        mask=mask,
        normalizer=normalizer,
        eps=eps,
        nonfinite=nonfinite,
        reduction=reduction,
        return_stats=return_stats,
        identity_alpha=_checks.number(alpha, "alpha"),
    )
    loss, stats = score_identity(x, teacher, fake, tensors[0], tensors[3], tensors[7], params)
    return (loss, LossStats(stats)) if return_stats else loss


def score_identity(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    normalizer: Tensor | None,
    params: LossParams,
) -> tuple[Tensor, Tensor]:
    """The loss and the statistics vector, from checked arguments."""
    tensors = (weight, None, None, mask, None, None, None, normalizer)
    alpha = params.identity_alpha
    g, n, _ = _score_difference(x, teacher, fake, tensors, params._replace(zero_nonfinite=False))
    with torch.no_grad():
        k = _coefficient(x, n, weight, params, g.dtype)
        X, T, F = (tensor.to(g.dtype) for tensor in (x, teacher, fake))
        terms = k * (T - F) * ((T - X) - alpha * (T - F))
        d_x = -k * (T - F)
        d_teacher = k * ((T - F) + (T - X) - 2 * alpha * (T - F))
        d_fake = -k * ((T - X) - 2 * alpha * (T - F))
        good = terms.isfinite() & d_x.isfinite() & d_teacher.isfinite() & d_fake.isfinite()
        bad = (~good if mask is None else ~good & mask).sum()
        if params.zero_nonfinite:
            terms, d_x, d_teacher, d_fake = (torch.where(good, v, 0.0) for v in (terms, d_x, d_teacher, d_fake))
    return _reduced(terms, d_x, n, bad, x, tensors, params, [(x, d_x), (teacher, d_teacher), (fake, d_fake)])


@torch.no_grad()
def _score_difference(
    x: Tensor, teacher: Tensor, fake: Tensor, tensors: _checks.OptionalTensors, params: LossParams
) -> tuple[Tensor, Tensor, Tensor]:
    """g = w_b / (n_b + eps) * (fake - T) in the shape of x, n [B], and how many elements of g on the mask were not
    finite."""
    _, uncond, guidance, mask, x_t, alpha, sigma, normalizer = tensors
    dtype = _checks.compute_dtype(x, teacher, fake, uncond, x_t)
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
    g = _coefficient(x, n, tensors[0], params, dtype) * difference
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
    x: Tensor,
    tensors: _checks.OptionalTensors,
    params: LossParams,
    gradients: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The sum of the terms over the mask, over the number of masked elements; its derivative with respect to each
    given tensor is the gradient given with it over that number, on the mask, and 0 elsewhere. And the statistics."""
    weight, mask = tensors[0], tensors[3]
    on = torch.ones_like(terms, dtype=torch.bool) if mask is None else mask
    flat = (x.shape[0], math.prod(x.shape[1:]))
    per_sample = torch.where(on, terms, 0.0).reshape(flat).double().sum(1)
    counts = on.reshape(flat).sum(1)
    if params.reduction == _SAMPLE:
        count = counts.clamp(min=1)
        value, divisor = per_sample / count, rows_like(count, x)
    else:
        divisor = counts.sum().clamp(min=1) if params.reduction == _MEAN else torch.ones_like(counts.sum())
        value = per_sample.sum() / divisor
    value = value.to(terms.dtype)
    derivatives = [torch.where(on, d, 0.0) / divisor for _, d in gradients]
    loss = _WithGradients.apply(value, derivatives, *[tensor for tensor, _ in gradients])
    stats = _statistics(value, torch.where(on, g, 0.0), counts.sum(), n, weight, bad)
    return loss, stats if params.need_stats else stats[:0]


@torch.no_grad()
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
    return torch.stack([fields.get(name, missing) for name in FIELDS]).to(value.dtype)


class _WithGradients(torch.autograd.Function):
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
    return _mean_softplus(logits, "logits", -1.0)


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """See :func:`fdistill_ops.gan_discriminator_loss`."""
    return _mean_softplus(real_logits, "real_logits", -1.0) + _mean_softplus(fake_logits, "fake_logits", 1.0)


def _mean_softplus(logits: Tensor, name: str, sign: float) -> Tensor:
    _checks.floating(logits, name)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return softplus(sign * logits, threshold=40.0).sum() / max(logits.numel(), 1)  # linear where it is exactly so
