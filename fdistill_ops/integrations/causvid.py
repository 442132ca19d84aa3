"""tianweiy/CausVid: the loss of its DMD class.

``patch()`` swaps ``DMD.compute_distribution_matching_loss``; :func:`matching_loss` is the loss alone, for training
loops of one's own. Random numbers are drawn in CausVid's order. The guided teacher image of the log dictionary is
computed when it is read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._deferred import when_read
from ._known import KNOWN
from ._patching import Patch, Patched, Target
from ._results import guided
from ._video import add_noise, matching_loss

__all__ = ["compute_distribution_matching_loss", "matching_loss", "patch", "unpatch"]


def compute_distribution_matching_loss(
    model: Any,
    image_or_video: Tensor,
    conditional_dict: dict[str, Any],
    unconditional_dict: dict[str, Any],
    gradient_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DMD.compute_distribution_matching_loss (causvid/dmd.py).

    Args:
        model: the DMD module, with its networks, scheduler and settings.
        image_or_video: [B, F, C, H, W], the generator's samples.
        conditional_dict, unconditional_dict: what the networks are conditioned on.
        gradient_mask: bool, the samples' shape: what counts in the loss; None for everything.

    Returns:
        The loss, float64, and the log dictionary.
    """
    with torch.no_grad():
        drawn = torch.randint(
            0, model.num_train_timestep, list(image_or_video.shape[:2]), device=model.device, dtype=torch.long
        )
        noisy, timestep = add_noise(model, image_or_video, model._process_timestep(drawn, type=model.real_task_type))
        inputs = {"noisy_image_or_video": noisy, "timestep": timestep}
        fake = model.fake_score(conditional_dict=conditional_dict, **inputs)
        real_cond = model.real_score(conditional_dict=conditional_dict, **inputs)
        real_uncond = model.real_score(conditional_dict=unconditional_dict, **inputs)
    loss, gradient_norm = matching_loss(
        image_or_video,
        real_cond,
        real_uncond,
        fake,
        real_guidance_scale=model.real_guidance_scale,
        gradient_mask=gradient_mask,
    )
    scale = 1 + model.real_guidance_scale
    return loss, {
        "dmdtrain_clean_latent": image_or_video.detach(),
        "dmdtrain_noisy_latent": noisy,
        "dmdtrain_pred_real_image": when_read(
            lambda: guided(real_cond, real_uncond, scale), real_cond.shape, real_cond.dtype, real_cond.device
        ),
        "dmdtrain_pred_fake_image": fake,
        "dmdtrain_gradient_norm": gradient_norm,
        "timestep": timestep,
    }


_PROJECT = "tianweiy/CausVid"
_PATCH = Patch(
    _PROJECT,
    [
        Target(
            "causvid.dmd",
            "DMD._compute_kl_grad",
            "self noisy_image_or_video estimated_clean_image_or_video timestep conditional_dict unconditional_dict "
            "normalization",
        ),
        Target(
            "causvid.dmd",
            "DMD.compute_distribution_matching_loss",
            "self image_or_video conditional_dict unconditional_dict gradient_mask",
            replacement=compute_distribution_matching_loss,
            inner="_compute_kl_grad",
        ),
    ],
    KNOWN[_PROJECT],
)


def patch(strict: bool = True) -> Patched:
    """Makes CausVid's DMD use :func:`compute_distribution_matching_loss`; as a context manager, for the length of the
    block. See :meth:`fdistill_ops.integrations.Patch.apply`."""
    return _PATCH.apply(strict)


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _PATCH.revert()
