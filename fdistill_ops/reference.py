"""Every operation in plain PyTorch: the readable specification the kernels are held to. The formulas are in
``_reference.py``.

Same signatures, checks and results as the public functions; any device, any floating dtype. Arithmetic is float32, or
float64 where an input is; scalars of a sample (ratios, weights, normalisers) are float64 throughout.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _checks, _composition
from ._options import (
    DIFFERENCE,
    F_DIFFERENCE,
    F_DISTILL,
    MATCHING,
    SCORE_IDENTITY,
    WEIGHTS,
    DifferenceOptions,
    FDifferenceOptions,
    FDistillOptions,
    MatchingOptions,
    ScoreIdentityOptions,
    WeightOptions,
    takes,
)
from ._reference import gan_discriminator_loss, gan_generator_loss
from .losses import ScoreDifference, result
from .predictions import to_x0

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


_NAME = "reference"


@takes(WeightOptions, WEIGHTS)
def f_weights(logits: Tensor, t: Tensor | None = None, **options: Any) -> Tensor:
    """See :func:`fdistill_ops.f_weights`."""
    return _composition.f_weights(*_checks.f_weights("f_weights", logits, t, options, _NAME))


@takes(MatchingOptions, MATCHING)
def distribution_matching_loss(x: Tensor, teacher: Tensor, fake: Tensor, **options: Any) -> Any:
    """See :func:`fdistill_ops.distribution_matching_loss`."""
    return result(_checks.loss("distribution_matching_loss", x, teacher, fake, options, _NAME))


@takes(FDistillOptions, F_DISTILL)
def f_distill_loss(
    x: Tensor, teacher: Tensor, fake: Tensor, logits: Tensor, t: Tensor | None = None, **options: Any
) -> Any:
    """See :func:`fdistill_ops.f_distill_loss`."""
    return result(_checks.f_distill("f_distill_loss", x, teacher, fake, logits, t, options, _NAME))


@takes(DifferenceOptions, DIFFERENCE)
def score_difference(x: Tensor, teacher: Tensor, fake: Tensor, **options: Any) -> Tensor:
    """See :func:`fdistill_ops.score_difference`."""
    return _composition.difference(*_checks.difference("score_difference", x, teacher, fake, options, _NAME))


@takes(FDifferenceOptions, F_DIFFERENCE)
def f_score_difference(
    x: Tensor, teacher: Tensor, fake: Tensor, logits: Tensor, t: Tensor | None = None, **options: Any
) -> ScoreDifference:
    """See :func:`fdistill_ops.f_score_difference`."""
    call, out = _checks.f_difference("f_score_difference", x, teacher, fake, logits, t, options, _NAME)
    return ScoreDifference(*_composition.f_difference(call, out))


@takes(ScoreIdentityOptions, SCORE_IDENTITY)
def score_identity_loss(x: Tensor, teacher: Tensor, fake: Tensor, **options: Any) -> Any:
    """See :func:`fdistill_ops.score_identity_loss`."""
    return result(_checks.score_identity("score_identity_loss", x, teacher, fake, options, _NAME))
