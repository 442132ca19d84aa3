"""NVlabs/FastGen: its score-distillation loss and its f-distill weights.

``patch()`` swaps both in where FastGen uses them; the functions can be called by hand as well, in FastGen's own
signatures. FastGen keeps the histogram of the density ratio as the buffer ``bins`` of its student network, and there it
stays: checkpoints are the same either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..divergences import Divergence
from ..histogram import RatioHistogram
from ..losses import distribution_matching_loss
from ..weights import f_weights
from ._fingerprint import fingerprint
from ._known import FASTGEN_WEIGHTINGS, KNOWN
from ._patching import Patch, Patched, Target
from ._results import in_dtype_of

__all__ = ["f_div_weighting_h", "patch", "unpatch", "variational_score_distillation_loss"]

# What FastGen's settings call the divergences; for models that have no weighting function of their own.
_DIVERGENCES = {
    "rkl": "reverse_kl",
    "kl": "forward_kl",
    "js": "jensen_shannon",
    "sf": "softened_reverse_kl",
    "neyman": "alpha:-1",
    "sh": "alpha:0.5",
    "jf": "jeffreys",
}


def variational_score_distillation_loss(
    gen_data: Tensor, teacher_x0: Tensor, fake_score_x0: Tensor, additional_scale: Tensor | None = None
) -> Tensor:
    """fastgen.methods.common_loss.variational_score_distillation_loss: the loss with a normaliser of
    mean abs(gen_data - teacher_x0) + 1e-6 per sample.

    Args:
        gen_data: [B, ...], the student's samples.
        teacher_x0, fake_score_x0: x0-predictions in gen_data's shape.
        additional_scale: [B], the f-distill weights, or one number for all; None for 1.

    Returns:
        0-dimensional, in the dtype FastGen returns: that of the inputs, at least float32 under autocast.

    Raises:
        TypeError, ValueError: see :func:`fdistill_ops.distribution_matching_loss`.
    """
    if additional_scale is not None:
        additional_scale = additional_scale.reshape(() if additional_scale.numel() == 1 else (-1,))
    loss = distribution_matching_loss(gen_data, teacher_x0, fake_score_x0, weight=additional_scale)
    return in_dtype_of(loss, gen_data, teacher_x0, fake_score_x0)


def f_div_weighting_h(model: Any, fake_logits: Tensor, t: Tensor) -> Tensor:
    """FdistillModel._get_f_div_weighting_h: the f-distill weights of a batch, normalised over all ranks, with the
    settings of ``model.config.f_distill``; updates ``model.net.bins``.

    Args:
        model: the FdistillModel.
        fake_logits: [B, K], the discriminator's logits of the samples.
        t: [B], their times.

    Returns:
        [B], in the logits' dtype, detached. A sample with a non-finite logit gets NaN; it changes no other sample's
        weight and no bin.

    Raises:
        TypeError, ValueError: see :func:`fdistill_ops.f_weights`.
    """
    config = model.config.f_distill
    histogram = None
    if config.ratio_normalization:
        schedule = model.net.noise_scheduler
        histogram = RatioHistogram(
            float(schedule.min_t), float(schedule.max_t), bins=model.net.bins, ema_rate=config.ratio_ema_rate
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    divergence = _divergence(model, config.f_div)
    weights = f_weights(
        fake_logits,
        None if histogram is None else t,
        divergence=divergence,
        ratio_clip=(config.ratio_lower, config.ratio_upper),
        histogram=histogram,
        normalize=None if divergence == "reverse_kl" else "mean",  # its mean is 1
        group=torch.distributed.group.WORLD if distributed else None,
    )
    return weights.to(fake_logits.dtype)


def _divergence(model: Any, name: str) -> str | Divergence:
    """What the model weighs by: ours for a weighting that is FastGen's own; for another, which a user has put into its
    table under whatever name, a divergence with that weight."""
    h = getattr(model, "f_div_weighting_function", None)
    ours = _DIVERGENCES.get(name) if h is None else FASTGEN_WEIGHTINGS.get(_fingerprint_of(h))
    if ours is not None:
        return ours
    if h is None:
        raise ValueError(f"f_div is {name!r}, and the model has no f_div_weighting_function")
    return Divergence(name, None, h, lambda log_r: h(log_r.exp()).log(), lambda log_r: h(log_r.exp()))


@torch.compiler.assume_constant_result
def _fingerprint_of(h: Any) -> str:
    try:
        return fingerprint(h)
    except ValueError:  # no function, or one whose source cannot be read
        return ""


_PROJECT = "NVlabs/FastGen"
_PATCH = Patch(
    _PROJECT,
    [
        Target(
            "fastgen.methods.common_loss",
            "variational_score_distillation_loss",
            "gen_data teacher_x0 fake_score_x0 additional_scale",
            replacement=variational_score_distillation_loss,
        ),
        Target(
            "fastgen.methods.distribution_matching.f_distill",
            "FdistillModel._get_f_div_weighting_h",
            "self fake_logits t",
            replacement=f_div_weighting_h,
        ),
    ],
    KNOWN[_PROJECT],
)


def patch(strict: bool = True) -> Patched:
    """Makes FastGen use :func:`variational_score_distillation_loss` and :func:`f_div_weighting_h`, in all its modules;
    as a context manager, for the length of the block. See :meth:`fdistill_ops.integrations.Patch.apply`."""
    return _PATCH.apply(strict)


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _PATCH.revert()
