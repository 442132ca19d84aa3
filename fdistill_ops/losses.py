"""The losses: argument checks, then the operation on whichever back end serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

from torch import Tensor

from . import _checks, _composition, _ops, _reference
from ._validation import number
from .divergences import Divergence
from .histogram import RatioHistogram
from .stats import LossStats

if TYPE_CHECKING:
    from typing_extensions import Unpack


# What the overloads below share, for type checkers alone.
class _Common(TypedDict, total=False):
    mask: Tensor | None
    normalizer: str | Tensor | None
    eps: float
    nonfinite: str
    weight: Tensor | float | None


class _Reduced(_Common, total=False):
    reduction: str


class _Matching(_Common, total=False):
    teacher_uncond: Tensor | None
    guidance_scale: float | Tensor | None
    prediction: str
    x_t: Tensor | None
    alpha: Tensor | float | None
    sigma: Tensor | float | None
    max_norm: float | None


class MatchingOptions(_Matching, _Reduced, total=False):
    """Keyword arguments of :func:`distribution_matching_loss`, but ``return_stats``."""


class FDistillOptions(MatchingOptions, total=False):
    """Keyword arguments of :func:`f_distill_loss`, but ``return_stats``."""

    divergence: str | Divergence
    logit_clip: float | None
    ratio_clip: tuple[float, float] | None
    histogram: RatioHistogram | None
    normalize: str | None
    group: Any


class ScoreIdentityOptions(_Reduced, total=False):
    """Keyword arguments of :func:`score_identity_loss`, but ``return_stats``."""

    alpha: float


class ScoreDifference(NamedTuple):
    """What :func:`f_score_difference` returns."""

    g: Tensor
    """[B, ...] in x's shape and dtype: the weighted score difference."""
    weights: Tensor
    """[B]: the f-weights, as :func:`fdistill_ops.f_weights` returns them."""


@overload
def distribution_matching_loss(
    x: Tensor, teacher: Tensor, fake: Tensor, *, return_stats: Literal[False] = ..., **options: Unpack[MatchingOptions]
) -> Tensor: ...
@overload
def distribution_matching_loss(
    x: Tensor, teacher: Tensor, fake: Tensor, *, return_stats: Literal[True], **options: Unpack[MatchingOptions]
) -> tuple[Tensor, LossStats]: ...
@overload
def distribution_matching_loss(
    x: Tensor, teacher: Tensor, fake: Tensor, *, return_stats: bool, **options: Unpack[MatchingOptions]
) -> Tensor | tuple[Tensor, LossStats]: ...
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
    max_norm: float | None = None,
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
        weight: a number, or a tensor whose shape is a leading part of x's ([B], [B, F] for video frames) or that
            broadcasts to it in as many dimensions ([B, 1, 1, 1], [B, 1, H, W]).
        teacher_uncond, guidance_scale: classifier-free guidance of the teacher; the scale is a float, [B] or
            [B, 1, ..., 1].
        mask: bool, of a shape that broadcasts to x's ([B, 1, H, W], [H, W]), or [B], or another leading part of x's
            shape: what counts in the loss. One dimension of B elements is the batch. The normaliser ignores the mask.
            An empty one gives a loss and a gradient of 0.
        prediction: what teacher, fake and teacher_uncond predict: ``"x0"``, ``"eps"``, ``"v"``, ``"flow"`` (eps -
            x0) or ``"score"``, or diffusers' names (``"sample"``, ``"epsilon"``, ``"v_prediction"``,
            ``"flow_prediction"``); converted in the kernel.
        x_t, alpha, sigma: for a prediction other than x0: the noisy input x_t = alpha x0 + sigma eps in x's shape, and
            its schedule, of shapes as the weight's (float64 keeps its precision).
        normalizer: ``"mean_abs"``; None for no division: the factor is w, and eps plays no part; or a tensor [B] (or
            [B, 1, ..., 1]) that is n_b itself.
        eps: added to n_b.
        nonfinite: ``"propagate"`` or ``"zero"`` for elements of g that are NaN or infinite.
        max_norm: g of each sample is scaled down to this L2 norm over the mask, where it is above. g is computed once
            more for it. The statistics are those of the scaled g and weight.
        reduction: ``"mean"`` over the mask, ``"sum"``, ``"sample"``: [B], each sample's mean over its mask, or
            ``"none"``: each element's 0.5 g^2 in x's shape, 0 outside the mask, whose derivative is g.
        return_stats: also return :class:`~fdistill_ops.stats.LossStats`.

    Returns:
        The loss, float32 (float64 where an input is), 0-dimensional, [B] or in x's shape; with return_stats, (loss,
        stats). The gradient arrives in x's dtype.

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
    loss, stats = _composition.matching(_ops, (x, teacher, fake), tensors, params, _checks.max_norm(max_norm))
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
    max_norm: float | None = None,
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
    limit, inputs = _checks.max_norm(max_norm), (x, teacher, fake)
    if out is not None:
        _checks.output(out, *inputs, *tensors)
    return _composition.difference(_ops, inputs, tensors, params, limit, out)


@overload
def f_distill_loss(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    logits: Tensor,
    t: Tensor | None = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[FDistillOptions],
) -> Tensor: ...
@overload
def f_distill_loss(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    logits: Tensor,
    t: Tensor | None = ...,
    *,
    return_stats: Literal[True],
    **options: Unpack[FDistillOptions],
) -> tuple[Tensor, LossStats]: ...
@overload
def f_distill_loss(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    logits: Tensor,
    t: Tensor | None = ...,
    *,
    return_stats: bool,
    **options: Unpack[FDistillOptions],
) -> Tensor | tuple[Tensor, LossStats]: ...
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
    max_norm: float | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Any:
    """The f-distill loss (arXiv 2502.15681, Algorithm 1): :func:`distribution_matching_loss` with the weights of
    :func:`fdistill_ops.f_weights`, in one call.

    Args:
        logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, group: as in
            :func:`fdistill_ops.f_weights`. Nothing flows to the logits.
        weight: multiplies the f-weights: w(t) h(r), say. Weights and loss are then two operations, as with max_norm.
        eps, nonfinite: of both operations.
        The others are those of :func:`distribution_matching_loss`.

    Returns:
        The loss, float32 (float64 where x, teacher, fake or x_t is), 0-dimensional or [B]; with return_stats,
        (loss, stats).

    Raises:
        TypeError, ValueError: naming the argument that is wrong; the histogram has not changed then.
    """
    call = _checks.f_weights(logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, eps, nonfinite, group)
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
    _checks.same_batch(call.logits, x)
    limit, inputs = _checks.max_norm(max_norm), (x, teacher, fake)
    loss, stats = _composition.f_distill(_ops, inputs, call, tensors, params, limit)
    return (loss, LossStats(stats)) if return_stats else loss


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
    max_norm: float | None = None,
    out: Tensor | None = None,
) -> ScoreDifference:
    """g of :func:`f_distill_loss` itself, for ``x.backward(g)``, and the f-weights it was made with.

    Args:
        out: as in :func:`score_difference`.
        The others are those of :func:`f_distill_loss`.

    Returns:
        :class:`ScoreDifference`, a pair (g, weights), detached.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; the histogram has not changed then.
    """
    call = _checks.f_weights(logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, eps, nonfinite, group)
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
    _checks.same_batch(call.logits, x)
    limit, inputs = _checks.max_norm(max_norm), (x, teacher, fake)
    if out is not None:
        _checks.output(out, *inputs, *tensors, call=call)
    return ScoreDifference(*_composition.f_difference(_ops, inputs, call, tensors, params, limit, out))


@overload
def score_identity_loss(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    *,
    return_stats: Literal[False] = ...,
    **options: Unpack[ScoreIdentityOptions],
) -> Tensor: ...
@overload
def score_identity_loss(
    x: Tensor, teacher: Tensor, fake: Tensor, *, return_stats: Literal[True], **options: Unpack[ScoreIdentityOptions]
) -> tuple[Tensor, LossStats]: ...
@overload
def score_identity_loss(
    x: Tensor, teacher: Tensor, fake: Tensor, *, return_stats: bool, **options: Unpack[ScoreIdentityOptions]
) -> Tensor | tuple[Tensor, LossStats]: ...
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
            statistics of g are those of w (F - T) / (n_b + eps). Without a reduction PyTorch evaluates the formula,
            on every back end.

    Returns:
        The loss, float32 (float64 where an input is), 0-dimensional, [B] or in x's shape; with return_stats,
        (loss, stats).

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
        identity_alpha=number(alpha, "alpha"),
    )
    weight, _, _, mask, _, _, _, rows = tensors
    loss, stats = _ops.score_identity(x, teacher, fake, weight, mask, rows, params)
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
    return _reference.gan_generator_loss(logits)


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
    return _reference.gan_discriminator_loss(real_logits, fake_logits)
