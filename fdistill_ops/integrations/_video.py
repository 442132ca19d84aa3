"""What the video code bases (CausVid, Self-Forcing) share: samples [B, F, C, H, W], times [B, F]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses import distribution_matching_loss, score_difference
from ._deferred import when_read
from ._results import guided


def matching_loss(
    image_or_video: Tensor,
    pred_real_cond: Tensor,
    pred_real_uncond: Tensor,
    pred_fake: Tensor,
    *,
    real_guidance_scale: float,
    pred_fake_uncond: Tensor | None = None,
    fake_guidance_scale: float = 0.0,
    gradient_mask: Tensor | None = None,
    normalization: bool = True,
) -> tuple[Tensor, Tensor]:
    """The distribution-matching loss of CausVid and Self-Forcing from x0-predictions, in float64 as theirs is.

    Args:
        image_or_video: [B, F, C, H, W], the generator's samples.
        pred_real_cond, pred_real_uncond, pred_fake: x0-predictions in the same shape.
        real_guidance_scale: the teacher is cond + real_guidance_scale * (cond - uncond); that of
            :func:`fdistill_ops.distribution_matching_loss` is larger by 1.
        pred_fake_uncond, fake_guidance_scale: the same for the fake network, where there is such a prediction.
        gradient_mask: bool, the samples' shape or a leading part of it ([B, F], say): what counts in the loss.
        normalization: divide each sample's gradient by mean abs(sample - teacher).

    Returns:
        The loss, float64; and the mean of abs(g) over all elements, masked or not, which the code bases log as
        ``dmdtrain_gradient_norm``: 0-dimensional, float64, on the device, with a mask computed when it is read.

    Raises:
        TypeError, ValueError: see :func:`fdistill_ops.distribution_matching_loss`.
    """
    fake = pred_fake.double()  # makes the arithmetic float64
    if pred_fake_uncond is not None:
        fake = guided(fake, pred_fake_uncond.double(), 1 + fake_guidance_scale)
    arguments: dict[str, Any] = {
        "teacher": pred_real_cond,
        "fake": fake,
        "teacher_uncond": pred_real_uncond,
        "guidance_scale": 1 + real_guidance_scale,
        "normalizer": "mean_abs" if normalization else None,
        "eps": 0.0,
        "nonfinite": "zero",  # what 0/0 and NaN become
    }
    if gradient_mask is None:
        loss, stats = distribution_matching_loss(image_or_video, **arguments, return_stats=True)
        return loss, stats.grad_mean_abs
    extra = (1,) * (image_or_video.ndim - gradient_mask.ndim)
    mask = gradient_mask.reshape(gradient_mask.shape + extra).expand_as(image_or_video)
    loss = distribution_matching_loss(image_or_video, mask=mask, **arguments)
    sample = image_or_video.detach()
    return loss, when_read(
        lambda: score_difference(sample, **arguments).abs().mean(dtype=torch.float64),
        shape=(),
        dtype=torch.float64,
        device=sample.device,
    )


def add_noise(model: Any, image_or_video: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy samples; the times [B, F] after the model's shift, within its bounds."""
    if model.timestep_shift > 1:
        time, shift = timestep / 1000, model.timestep_shift
        timestep = shift * time / (1 + (shift - 1) * time) * 1000
    timestep = timestep.clamp(model.min_step, model.max_step)
    noise = torch.randn_like(image_or_video)
    flat = (tensor.flatten(0, 1) for tensor in (image_or_video, noise, timestep))
    return model.scheduler.add_noise(*flat).unflatten(0, image_or_video.shape[:2]), timestep
