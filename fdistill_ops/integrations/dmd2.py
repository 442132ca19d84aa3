"""tianweiy/DMD2: compute_distribution_matching_loss of its guidance for Stable Diffusion and SDXL, and for EDM.

``patch()`` swaps the methods; :func:`noise_matching_loss` is the loss alone, for training loops of one's own. Random
numbers are drawn in DMD2's order, so that a run sees the noise it would have seen. What the log dictionaries hold is
computed when it is read: ``dmtrain_gradient_norm`` is a 0-dimensional tensor on the device, the images and the gradient
are :class:`~fdistill_ops.integrations.Deferred`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses import distribution_matching_loss, score_difference
from ..predictions import to_x0
from ..stats import LossStats
from ._deferred import when_read
from ._known import KNOWN
from ._patching import Patch, Patched, Target
from ._results import guided, in_dtype_of

__all__ = [
    "edm_distribution_matching_loss",
    "noise_matching_loss",
    "patch",
    "sd_distribution_matching_loss",
    "unpatch",
]

# 0/0 and NaN become 0, and nothing is added to the normaliser.
_FLAGS: dict[str, Any] = {"eps": 0.0, "nonfinite": "zero"}


def noise_matching_loss(
    latents: Tensor,
    noisy_latents: Tensor,
    real_noise: Tensor,
    fake_noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    *,
    real_noise_uncond: Tensor | None = None,
    guidance_scale: float | None = None,
) -> tuple[Tensor, LossStats]:
    """DMD2's loss from predictions of the noise. Their conversion to x0 and the guidance happen inside, in float64.

    Args:
        latents: [B, ...], the generator's samples.
        noisy_latents: what the networks saw, in the same shape.
        real_noise, fake_noise: the noise predicted by the teacher (given the text) and by the fake network.
        alphas_cumprod: [steps], the scheduler's.
        timesteps: [B], integers.
        real_noise_uncond, guidance_scale: classifier-free guidance of the teacher,
            uncond + guidance_scale * (real - uncond).

    Returns:
        The loss, float64, and the statistics (``grad_norm`` is DMD2's ``dmtrain_gradient_norm``), on the device.

    Raises:
        TypeError, ValueError: see :func:`fdistill_ops.distribution_matching_loss`.
    """
    inputs = (noisy_latents, real_noise, fake_noise, alphas_cumprod, timesteps, real_noise_uncond, guidance_scale)
    loss, stats = distribution_matching_loss(latents, **_arguments(*inputs), return_stats=True)
    return loss, stats


def _arguments(
    noisy: Tensor,
    real_noise: Tensor,
    fake_noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    real_uncond: Tensor | None,
    scale: float | None,
) -> dict[str, Any]:
    return {
        "teacher": real_noise,
        "fake": fake_noise,
        "teacher_uncond": real_uncond,
        "guidance_scale": scale,
        "x_t": noisy.double(),  # makes the arithmetic float64, as theirs is
        **_schedule(alphas_cumprod, timesteps),
        **_FLAGS,
    }


def _schedule(alphas_cumprod: Tensor, timesteps: Tensor) -> dict[str, Any]:
    power = alphas_cumprod[timesteps].double()
    return {"prediction": "eps", "alpha": power.sqrt(), "sigma": (1 - power).sqrt()}


def sd_distribution_matching_loss(
    guidance: Any,
    latents: Tensor,
    text_embedding: Tensor,
    uncond_embedding: Tensor,
    unet_added_conditions: dict[str, Tensor] | None,
    uncond_unet_added_conditions: dict[str, Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """SDGuidance.compute_distribution_matching_loss (main/sd_guidance.py), for Stable Diffusion and SDXL.

    Args:
        guidance: the SDGuidance, with its networks, scheduler and settings.
        latents: [B, C, H, W], the generator's samples. The rest is what the networks are conditioned on.

    Returns:
        ``{"loss_dm": loss}``, the loss in float32, and the log dictionary.
    """
    with torch.no_grad():
        timesteps = _draw_timesteps(guidance, latents, [latents.shape[0]])
        noise = torch.randn_like(latents)
        noisy = guidance.scheduler.add_noise(latents, noise, timesteps)
        conditions = [text_embedding, uncond_embedding, unet_added_conditions, uncond_unet_added_conditions]
        fake_scale, real_scale = guidance.fake_guidance_scale, guidance.real_guidance_scale
        fake_noise, fake_uncond = _predict_noise(guidance.fake_unet, noisy, timesteps, conditions, fake_scale)
        if fake_uncond is not None:
            fake_noise = guided(fake_noise, fake_uncond, fake_scale)
        seen = noisy
        if guidance.use_fp16:
            seen, *conditions = (_in_bfloat16(value, guidance.sdxl) for value in (noisy, *conditions))
        real_noise, real_uncond = _predict_noise(guidance.real_unet, seen, timesteps, conditions, real_scale)
    inputs = (noisy, real_noise, fake_noise, guidance.alphas_cumprod, timesteps)
    scale = None if real_uncond is None else real_scale
    loss, stats = noise_matching_loss(latents, *inputs, real_noise_uncond=real_uncond, guidance_scale=scale)
    sample = latents.detach()

    def image(noise: Tensor, uncond: Tensor | None = None) -> Tensor:
        noise = noise.double() if uncond is None else guided(noise.double(), uncond.double(), real_scale)
        return to_x0(noise, noisy, **_schedule(guidance.alphas_cumprod, timesteps)).float()

    def deferred(compute: Callable[[], Tensor]) -> Tensor:
        return when_read(compute, latents.shape, torch.float32, latents.device)

    return {"loss_dm": loss.float()}, {
        "dmtrain_noisy_latents": noisy.float(),
        "dmtrain_pred_real_image": deferred(lambda: image(real_noise, real_uncond)),
        "dmtrain_pred_fake_image": deferred(lambda: image(fake_noise)),
        "dmtrain_grad": deferred(lambda: score_difference(sample.float(), **_arguments(*inputs, real_uncond, scale))),
        "dmtrain_gradient_norm": stats.grad_norm,
    }


def edm_distribution_matching_loss(
    guidance: Any, latents: Tensor, labels: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """EDMGuidance.compute_distribution_matching_loss (main/edm/edm_guidance.py).

    Args:
        guidance: the EDMGuidance, with its networks and noise levels.
        latents: [B, C, H, W], the generator's samples; labels: [B, classes].

    Returns:
        ``{"loss_dm": loss}``, the loss in the samples' dtype, and the log dictionary.
    """
    with torch.no_grad():
        timesteps = _draw_timesteps(guidance, latents, [latents.shape[0], 1, 1, 1])
        noise = torch.randn_like(latents)
        sigma = guidance.karras_sigmas[timesteps]
        noisy = latents + sigma * noise
        real, fake = guidance.real_unet(noisy, sigma, labels), guidance.fake_unet(noisy, sigma, labels)
    loss, stats = distribution_matching_loss(latents, real, fake, **_FLAGS, return_stats=True)
    sample = latents.detach()
    dtype = torch.promote_types(torch.promote_types(latents.dtype, real.dtype), fake.dtype)
    return {"loss_dm": in_dtype_of(loss, latents, real, fake)}, {
        "dmtrain_noisy_latents": noisy,
        "dmtrain_pred_real_image": real,
        "dmtrain_pred_fake_image": fake,
        "dmtrain_grad": when_read(
            lambda: score_difference(sample.to(dtype), real, fake, **_FLAGS), latents.shape, dtype, latents.device
        ),
        "dmtrain_gradient_norm": stats.grad_norm,
        "dmtrain_timesteps": timesteps,
    }


def _draw_timesteps(guidance: Any, latents: Tensor, shape: list[int]) -> Tensor:
    end = min(guidance.max_step + 1, guidance.num_train_timesteps)
    return torch.randint(guidance.min_step, end, shape, device=latents.device, dtype=torch.long)


def _predict_noise(
    unet: Any, noisy: Tensor, timesteps: Tensor, conditions: Any, guidance_scale: float
) -> tuple[Tensor, Tensor | None]:
    """The prediction given the text; with guidance also the one without it, both from one call of the network."""
    text, uncond, added, added_uncond = conditions
    if not guidance_scale > 1:
        return unet(noisy, timesteps, text, added_cond_kwargs=added).sample, None
    if added is not None:
        added = {key: torch.cat([added_uncond[key], value]) for key, value in added.items()}
    noisy, timesteps = torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps])
    both = unet(noisy, timesteps, torch.cat([uncond, text]), added_cond_kwargs=added).sample
    without, given = both.chunk(2)
    return given, without


def _in_bfloat16(value: Any, nested: bool) -> Any:
    """Tensors; the dictionaries of SDXL's added conditions too."""
    if isinstance(value, Tensor):
        return value.to(torch.bfloat16)
    return {key: entry.to(torch.bfloat16) for key, entry in value.items()} if nested else value


_PROJECT = "tianweiy/DMD2"
_SD, _EDM = "main.sd_guidance", "main.edm.edm_guidance"
# Each of its two programs needs one of the modules, and a package that the other program does not.
_SD_NEEDS, _EDM_NEEDS = "diffusers", "dnnlib"
_PATCH = Patch(
    _PROJECT,
    [
        Target(
            _SD,
            "SDGuidance.compute_distribution_matching_loss",
            "self latents text_embedding uncond_embedding unet_added_conditions uncond_unet_added_conditions",
            replacement=sd_distribution_matching_loss,
            may_lack=_SD_NEEDS,
        ),
        Target(
            _SD,
            "predict_noise",
            "unet noisy_latents text_embeddings uncond_embedding timesteps guidance_scale unet_added_conditions "
            "uncond_unet_added_conditions",
            may_lack=_SD_NEEDS,
        ),
        Target(_SD, "get_x0_from_noise", "sample model_output alphas_cumprod timestep", may_lack=_SD_NEEDS),
        Target(
            _EDM,
            "EDMGuidance.compute_distribution_matching_loss",
            "self latents labels",
            replacement=edm_distribution_matching_loss,
            may_lack=_EDM_NEEDS,
        ),
    ],
    KNOWN[_PROJECT],
)


def patch(strict: bool = True) -> Patched:
    """Makes DMD2's guidance modules use the functions here; as a context manager, for the length of the block. The one
    for Stable Diffusion is left out where diffusers is not installed, and that for EDM where dnnlib is not: what is
    returned says so. See :meth:`fdistill_ops.integrations.Patch.apply`."""
    return _PATCH.apply(strict)


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _PATCH.revert()
