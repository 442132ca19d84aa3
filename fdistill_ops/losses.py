"""The losses: argument checks, then the operators (or, on the reference back end, the reference)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _checks, _ops, backends, reference
from .divergences import Divergence
from .stats import RATIO_FIELDS, LossStats
from .weights import RatioHistogram, needs_stages


def _implementation(x: Tensor) -> Any:
    """The operators; on the reference back end the reference, whose functions have the same signatures."""
    return reference if backends.choose(x.device) == "reference" else _ops


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
    """Distribution-matching loss whose gradient is the weighted, normalised score difference (DMD, arXiv 2311.18828,
    eqs. 7-8; DMD2, arXiv 2405.14867; weights of f-distill, arXiv 2502.15681, eq. 6)::

        T     = teacher, or teacher_uncond + guidance_scale * (teacher - teacher_uncond), as x0
        n_b   = mean |x - T| over all dimensions of sample b
        g     = w / (n_b + eps) * (fake - T)
        L     = 0.5 * sum over the mask of g^2 / number of masked elements
        dL/dx = g / number of masked elements on the mask, 0 elsewhere

    the gradient of ``0.5 * mse_loss(x, (x - g).detach())`` without the rounding of ``x - g``, in one pass. Nothing
    flows to any other argument. Differentiable once.

    Args:
        x: [B, ...], the student's sample, float32, float64, bfloat16 or float16, any strides.
        teacher, fake: x's shape, any of those dtypes: predictions of the teacher's and of the student's ("fake") score.
        weight: a number, or a tensor whose shape is a leading part of x's: [B], [B, F] for video frames.
        teacher_uncond, guidance_scale: classifier-free guidance of the teacher; the scale is a float or [B].
        mask: bool, x's shape (``mask.expand_as(x)`` costs nothing): what counts in the loss. The normaliser ignores
            it. An empty mask gives a loss and a gradient of 0.
        prediction: what teacher, fake and teacher_uncond predict: ``"x0"``, ``"eps"``, ``"v"``, ``"flow"`` (eps -
            x0) or ``"score"``; converted in the kernel.
        x_t, alpha, sigma: for a prediction other than x0: the noisy input x_t = alpha x0 + sigma eps in x's shape, and
            its schedule, numbers or leading parts of x's shape (float64 keeps its precision).
        normalizer: ``"mean_abs"``; None for 1; or a tensor [B] that is n_b itself.
        eps: added to n_b.
        nonfinite: ``"propagate"`` or ``"zero"`` for elements of g that are NaN or infinite.
        reduction: ``"mean"`` over the mask, ``"sum"``, or ``"sample"``: [B], each sample's mean over its mask.
        return_stats: also return :class:`~fdistill_ops.stats.LossStats`.

    Returns:
        The loss, float32 (float64 where an input is), 0-dimensional or [B]; with return_stats, (loss, stats). The
        gradient arrives in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, before any kernel runs.
    """
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
    loss, stats = _implementation(x).distribution_matching(x, teacher, fake, tensors, params)
    return (loss, LossStats(stats)) if return_stats else loss


def score_difference(
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
    out: Tensor | None = None,
) -> Tensor:
    """g of :func:`distribution_matching_loss` itself, for ``x.backward(g)``; 0 outside the mask.

    Args:
        out: a tensor to write g into, of x's shape and dtype; it may be x, teacher or fake itself, and share no other
            memory with an input.
        The others are those of :func:`distribution_matching_loss`.

    Returns:
        [B, ...] in x's shape and dtype (out, where given), detached.

    Raises:
        TypeError, ValueError: naming the argument that is wrong, before any kernel runs.
    """
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
        "sum",
    )
    if out is not None:
        _checks.output(out, x, teacher, fake, *tensors)
    return _implementation(x).difference(x, teacher, fake, tensors, params, out)


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
    """The f-distill loss (arXiv 2502.15681, Algorithm 1): :func:`distribution_matching_loss` with the weights of
    :func:`fdistill_ops.f_weights`, in one call.

    Args:
        logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, group: as in
            :func:`fdistill_ops.f_weights`. Nothing flows to the logits.
        eps, nonfinite: of both operations.
        The others are those of :func:`distribution_matching_loss`.

    Returns:
        The loss, float32 (float64 where x, teacher, fake or x_t is), 0-dimensional or [B]; with return_stats,
        (loss, stats).

    Raises:
        TypeError, ValueError: naming the argument that is wrong; the histogram has not changed then.
    """
    t, found, weight_params = _checks.f_weights(
        logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, eps, nonfinite
    )
    tensors, params = _checks.distribution_matching(
        x,
        teacher,
        fake,
        None,
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
    _checks.same_batch(logits, x)
    bins = None if histogram is None else histogram.bins
    if needs_stages(logits, found, group):
        weight, bins, ratio_stats = reference.staged_f_weights(
            logits, t, bins, found, weight_params, reference.all_reduce(group)
        )
        loss, stats = _implementation(x).distribution_matching(x, teacher, fake, (weight, *tensors[1:]), params)
        if return_stats:
            stats[RATIO_FIELDS] = ratio_stats.to(stats.dtype)
    else:
        loss, stats, bins = _ops.f_distill(x, teacher, fake, logits, t, bins, tensors, weight_params, params)
    if histogram is not None:
        histogram.record(bins)
    return (loss, LossStats(stats)) if return_stats else loss


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
    """Score-identity loss (SiD, Zhou et al., arXiv 2404.04057, eq. 23)::

        n_b = mean |x - T| over all dimensions of sample b, detached
        L   = mean over the mask of w (T - F) ((T - x) - alpha (T - F)) / (n_b + eps)

    with gradients to x, teacher (T) and fake (F), those that need one, all in one pass. Differentiable once.

    Args:
        x, teacher, fake: [B, ...], x0-predictions of one shape, float32, float64, bfloat16 or float16, any strides.
        alpha: the coefficient of the squared score difference (SiD trains with 1 to 1.2).
        nonfinite: ``"propagate"`` or ``"zero"`` for elements whose term or one of whose derivatives is not finite.
        weight, mask, normalizer, eps, reduction, return_stats: as in :func:`distribution_matching_loss`; the
            statistics of g are those of w (F - T) / (n_b + eps).

    Returns:
        The loss, float32 (float64 where an input is), 0-dimensional or [B]; with return_stats, (loss, stats).

    Raises:
        TypeError, ValueError: naming the argument that is wrong, before any kernel runs.
    """
    tensors, params = _checks.distribution_matching(
        x,
        teacher,
        fake,
        weight,
        mask=mask,
        normalizer=normalizer,
        eps=eps,
        nonfinite=nonfinite,
        reduction=reduction,
        return_stats=return_stats,
        identity_alpha=_checks.number(alpha, "alpha"),
    )
    loss, stats = _implementation(x).score_identity(x, teacher, fake, tensors[0], tensors[3], tensors[7], params)
    return (loss, LossStats(stats)) if return_stats else loss


def gan_generator_loss(logits: Tensor) -> Tensor:
    """Non-saturating GAN loss of the generator, mean softplus(-logits) (Goodfellow et al., arXiv 1406.2661).

    Args:
        logits: any shape, any floating dtype: the discriminator's logits of generated samples.

    Returns:
        0-dimensional, float32 (float64 for float64 logits), differentiable; 0 for an empty batch.

    Raises:
        TypeError: logits is no dense floating tensor.
    """
    return reference.gan_generator_loss(logits)


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """GAN loss of the discriminator, mean softplus(-real_logits) + mean softplus(fake_logits). Its optimum is the log
    density ratio log(real/fake) that :func:`fdistill_ops.f_weights` reads.

    Args:
        real_logits, fake_logits: any shapes, any floating dtype.

    Returns:
        0-dimensional, float32 (float64 for float64 logits), differentiable; an empty batch counts 0.

    Raises:
        TypeError: an argument is no dense floating tensor.
    """
    return reference.gan_discriminator_loss(real_logits, fake_logits)
