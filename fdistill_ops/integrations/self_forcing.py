"""guandeh17/Self-Forcing: the losses of its DMD, CausVid and SiD classes.

``patch()`` swaps their ``compute_distribution_matching_loss``; :func:`matching_loss` is the loss of the first two
alone, for training loops of one's own (for SiD's see :func:`fdistill_ops.score_identity_loss`). Random numbers are
drawn in Self-Forcing's order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import score_identity_loss
from ._known import KNOWN
from ._patching import Patch, Patched, Target
from ._results import guided
from ._video import add_noise, matching_loss

__all__ = ["causvid_loss", "dmd_loss", "matching_loss", "patch", "sid_loss", "unpatch"]


def dmd_loss(
    model: Any,
    image_or_video: Tensor,
    conditional_dict: dict[str, Any],
    unconditional_dict: dict[str, Any],
    gradient_mask: Tensor | None = None,
    denoised_timestep_from: int | None = 0,
    denoised_timestep_to: int | None = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DMD.compute_distribution_matching_loss (model/dmd.py).

    Args:
        model: the DMD module, with its networks, scheduler and settings.
        image_or_video: [B, F, C, H, W], the generator's samples.
        conditional_dict, unconditional_dict: what the networks are conditioned on.
        gradient_mask: bool, the samples' shape: what counts in the loss (the first frames do not, where they are
            given); None for everything.
        denoised_timestep_from, denoised_timestep_to: bounds of the times to draw, as the model's settings use them.

    Returns:
        The loss, float64, and the log dictionary.
    """
    bounds = _time_bounds(model, denoised_timestep_from, denoised_timestep_to)
    return _matching(model, bounds, image_or_video, conditional_dict, unconditional_dict, gradient_mask)


def causvid_loss(
    model: Any,
    image_or_video: Tensor,
    conditional_dict: dict[str, Any],
    unconditional_dict: dict[str, Any],
    gradient_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """CausVid.compute_distribution_matching_loss (model/causvid.py): :func:`dmd_loss` with times from the whole
    range."""
    bounds = (0, model.num_train_timestep)
    return _matching(model, bounds, image_or_video, conditional_dict, unconditional_dict, gradient_mask)


def sid_loss(
    model: Any,
    image_or_video: Tensor,
    conditional_dict: dict[str, Any],
    unconditional_dict: dict[str, Any],
    gradient_mask: Tensor | None = None,
    denoised_timestep_from: int | None = 0,
    denoised_timestep_to: int | None = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """SiD.compute_distribution_matching_loss (model/sid.py): the score-identity loss, whose gradients flow through the
    networks too. The arguments are those of :func:`dmd_loss`; like the original it ignores gradient_mask.

    Returns:
        The loss, float64, and the log dictionary.
    """
    bounds = _time_bounds(model, denoised_timestep_from, denoised_timestep_to)
    noisy, timestep = add_noise(model, image_or_video, _draw_times(model, image_or_video, bounds))
    inputs = {"noisy_image_or_video": noisy, "timestep": timestep}
    _, fake = model.fake_score(conditional_dict=conditional_dict, **inputs)
    _, real_cond = model.real_score(conditional_dict=conditional_dict, **inputs)
    _, real_uncond = model.real_score(conditional_dict=unconditional_dict, **inputs)
    real = guided(real_cond.double(), real_uncond.double(), 1 + model.real_guidance_scale)
    loss = score_identity_loss(image_or_video, real, fake, alpha=model.sid_alpha, eps=0.0, nonfinite="zero")
    return loss, {"dmdtrain_gradient_norm": torch.zeros_like(loss), "timestep": timestep}


def _matching(
    model: Any,
    bounds: tuple[int, int],
    image_or_video: Tensor,
    conditional_dict: dict[str, Any],
    unconditional_dict: dict[str, Any],
    gradient_mask: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.no_grad():
        noisy, timestep = add_noise(model, image_or_video, _draw_times(model, image_or_video, bounds))
        inputs = {"noisy_image_or_video": noisy, "timestep": timestep}
        _, fake = model.fake_score(conditional_dict=conditional_dict, **inputs)
        fake_uncond = None
        if model.fake_guidance_scale != 0.0:
            _, fake_uncond = model.fake_score(conditional_dict=unconditional_dict, **inputs)
        _, real_cond = model.real_score(conditional_dict=conditional_dict, **inputs)
        _, real_uncond = model.real_score(conditional_dict=unconditional_dict, **inputs)
    loss, gradient_norm = matching_loss(
        image_or_video,
        real_cond,
        real_uncond,
        fake,
        real_guidance_scale=model.real_guidance_scale,
        pred_fake_uncond=fake_uncond,
        fake_guidance_scale=model.fake_guidance_scale,
        gradient_mask=gradient_mask,
    )
    return loss, {"dmdtrain_gradient_norm": gradient_norm, "timestep": timestep}


def _time_bounds(model: Any, start: int | None, end: int | None) -> tuple[int, int]:
    low = end if model.ts_schedule and end is not None else model.min_score_timestep
    high = start if model.ts_schedule_max and start is not None else model.num_train_timestep
    return low, high


def _draw_times(model: Any, image_or_video: Tensor, bounds: tuple[int, int]) -> Tensor:
    """[B, F], one time for all frames of a sample."""
    return model._get_timestep(*bounds, *image_or_video.shape[:2], model.num_frame_per_block, uniform_timestep=True)


_PROJECT = "guandeh17/Self-Forcing"
_GRADIENT = (
    "self noisy_image_or_video estimated_clean_image_or_video timestep conditional_dict unconditional_dict "
    "normalization"
)
_PARAMETERS = "self image_or_video conditional_dict unconditional_dict gradient_mask"
_PATCH = Patch(
    _PROJECT,
    [
        Target("model.dmd", "DMD._compute_kl_grad", _GRADIENT),
        Target(
            "model.dmd",
            "DMD.compute_distribution_matching_loss",
            f"{_PARAMETERS} denoised_timestep_from denoised_timestep_to",
            replacement=dmd_loss,
            inner="_compute_kl_grad",
        ),
        Target("model.causvid", "CausVid._compute_kl_grad", _GRADIENT),
        Target(
            "model.causvid",
            "CausVid.compute_distribution_matching_loss",
            _PARAMETERS,
            replacement=causvid_loss,
            inner="_compute_kl_grad",
        ),
        Target(
            "model.sid",
            "SiD.compute_distribution_matching_loss",
            f"{_PARAMETERS} denoised_timestep_from denoised_timestep_to",
            replacement=sid_loss,
        ),
    ],
    KNOWN[_PROJECT],
)


def patch(strict: bool = True) -> Patched:
    """Makes Self-Forcing's DMD, CausVid and SiD use the functions here; as a context manager, for the length of the
    block. See :meth:`fdistill_ops.integrations.Patch.apply`."""
    return _PATCH.apply(strict)


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _PATCH.revert()
