"""The losses: argument checks, then the operation on whichever back end serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from torch import Tensor

from . import _checks, _composition, _reference
from ._call import LossCall
from ._options import (
    DIFFERENCE,
    F_DIFFERENCE,
    F_DISTILL,
    MATCHING,
    SCORE_IDENTITY,
    DifferenceOptions,
    FDifferenceOptions,
    FDistillOptions,
    MatchingOptions,
    ScoreIdentityOptions,
    takes,
)
from .stats import LossStats

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ScoreDifference(NamedTuple):
    """What :func:`f_score_difference` returns."""

    g: Tensor
    """[B, ...] in x's shape and dtype: the weighted score difference."""
    weights: Tensor
    """[B]: the f-weights, as :func:`fdistill_ops.f_weights` returns them."""


def result(call: LossCall) -> Any:
    """Of a loss: what its function returns."""
    loss, stats = _composition.loss(call)
    return (loss, LossStats(stats)) if stats is not None and call.params.need_stats else loss


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
@takes(MatchingOptions, MATCHING)
def distribution_matching_loss(x: Tensor, teacher: Tensor, fake: Tensor, **options: Any) -> Any:
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
    return result(_checks.loss("distribution_matching_loss", x, teacher, fake, options))


@takes(DifferenceOptions, DIFFERENCE)
def score_difference(x: Tensor, teacher: Tensor, fake: Tensor, **options: Unpack[DifferenceOptions]) -> Tensor:
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
    return _composition.difference(*_checks.difference("score_difference", x, teacher, fake, {**options}))


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
@takes(FDistillOptions, F_DISTILL)
def f_distill_loss(
    x: Tensor, teacher: Tensor, fake: Tensor, logits: Tensor, t: Tensor | None = None, **options: Any
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
    return result(_checks.f_distill("f_distill_loss", x, teacher, fake, logits, t, options))


@takes(FDifferenceOptions, F_DIFFERENCE)
def f_score_difference(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    logits: Tensor,
    t: Tensor | None = None,
    **options: Unpack[FDifferenceOptions],
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
    call, out = _checks.f_difference("f_score_difference", x, teacher, fake, logits, t, {**options})
    return ScoreDifference(*_composition.f_difference(call, out))


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
@takes(ScoreIdentityOptions, SCORE_IDENTITY)
def score_identity_loss(x: Tensor, teacher: Tensor, fake: Tensor, **options: Any) -> Any:
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
    return result(_checks.score_identity("score_identity_loss", x, teacher, fake, options))


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
