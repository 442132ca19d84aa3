"""Every operation in plain PyTorch: the readable specification the kernels are held to. The formulas are in
``_reference.py``.

Same signatures, checks and results as the public functions; any device, any floating dtype. Arithmetic is float32, or
float64 where an input is; scalars of a sample (ratios, weights, normalisers) are float64 throughout.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _checks, _composition, _reference
from ._reference import gan_discriminator_loss, gan_generator_loss
from ._validation import number
from .divergences import Divergence
from .histogram import RatioHistogram
from .losses import ScoreDifference
from .predictions import to_x0
from .stats import LossStats

__all__ = [
    "distribution_matching_loss",
    "f_distill_loss",
    "f_score_difference",
    "f_weights",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "score_difference",
    "score_identity_loss",
    "to_x0",
]


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
    call = _checks.f_weights(logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, eps, nonfinite, group)
    weights, bins, _ = _composition.weights(_reference, call)
    call.record(bins)
    return weights


def distribution_matching_loss(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    *,
    max_norm: float | None = None,
    return_stats: bool = False,
    **loss_arguments: Any,
) -> Any:
    """See :func:`fdistill_ops.distribution_matching_loss`."""
    tensors, params = _checks.distribution_matching(x, teacher, fake, return_stats=return_stats, **loss_arguments)
    limit = _checks.max_norm(max_norm)
    loss, stats = _composition.matching(_reference, (x, teacher, fake), tensors, params, limit)
    return (loss, LossStats(stats)) if return_stats else loss


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
    max_norm: float | None = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    return_stats: bool = False,
    **loss_arguments: Any,
) -> Any:
    """See :func:`fdistill_ops.f_distill_loss`."""
    call = _checks.f_weights(logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, eps, nonfinite, group)
    shared = {"eps": eps, "nonfinite": nonfinite, "return_stats": return_stats}
    tensors, params = _checks.distribution_matching(x, teacher, fake, **{**loss_arguments, **shared})
    _checks.same_batch(call.logits, x)
    limit, inputs = _checks.max_norm(max_norm), (x, teacher, fake)
    loss, stats = _composition.f_distill(_reference, inputs, call, tensors, params, limit)
    return (loss, LossStats(stats)) if return_stats else loss


def score_difference(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    *,
    max_norm: float | None = None,
    out: Tensor | None = None,
    **loss_arguments: Any,
) -> Tensor:
    """See :func:`fdistill_ops.score_difference`."""
    tensors, params = _checks.distribution_matching(x, teacher, fake, reduction="sum", **loss_arguments)
    limit, inputs = _checks.max_norm(max_norm), (x, teacher, fake)
    if out is not None:
        _checks.output(out, *inputs, *tensors)
    return _composition.difference(_reference, inputs, tensors, params, limit, out)


def f_score_difference(
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
    max_norm: float | None = None,
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    out: Tensor | None = None,
    **loss_arguments: Any,
) -> ScoreDifference:
    """See :func:`fdistill_ops.f_score_difference`."""
    call = _checks.f_weights(logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, eps, nonfinite, group)
    shared = {"eps": eps, "nonfinite": nonfinite, "reduction": "sum"}
    tensors, params = _checks.distribution_matching(x, teacher, fake, **{**loss_arguments, **shared})
    _checks.same_batch(call.logits, x)
    limit, inputs = _checks.max_norm(max_norm), (x, teacher, fake)
    if out is not None:
        _checks.output(out, *inputs, *tensors, call=call)
    return ScoreDifference(*_composition.f_difference(_reference, inputs, call, tensors, params, limit, out))


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
    (weight, _, _, mask, _, _, _, rows), params = _checks.distribution_matching(
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
        identity_alpha=number(alpha, "alpha"),
    )
    loss, stats = _reference.score_identity(x, teacher, fake, weight, mask, rows, params)
    return (loss, LossStats(stats)) if return_stats else loss
