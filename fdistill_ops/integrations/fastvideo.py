"""hao-ai-lab/FastVideo: the DMD losses of its two training frameworks.

``patch()`` swaps ``_dmd_loss`` of DMD2Method and SelfForcingMethod (fastvideo.train), and ``_dmd_forward`` of
DistillationPipeline (fastvideo.training); :func:`matching_loss` is the loss alone, for training loops of one's own.
Random numbers are drawn in FastVideo's order. The methods of StreamingLongTuningMethod and of the Matrix-Game pipeline,
which have losses of their own, stay as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..losses import distribution_matching_loss
from ._deferred import when_read
from ._known import KNOWN
from ._patching import Patch, Patched, Target
from ._results import guided

__all__ = ["dmd2_loss", "matching_loss", "patch", "pipeline_loss", "self_forcing_loss", "unpatch"]


def matching_loss(
    generated: Tensor, real_cond: Tensor, real_uncond: Tensor, fake: Tensor, guidance_scale: float
) -> Tensor:
    """FastVideo's loss from x0-predictions, whose normaliser is one number for the whole batch.

    Args:
        generated: [B, ...], the generator's samples.
        real_cond, real_uncond, fake: x0-predictions in the same shape.
        guidance_scale: the teacher is uncond + guidance_scale * (cond - uncond).

    Returns:
        The loss, float32 (float64 where an input is).

    Raises:
        TypeError, ValueError: see :func:`fdistill_ops.distribution_matching_loss`.
    """
    batch, cond, uncond, fake = (tensor.unsqueeze(0) for tensor in (generated, real_cond, real_uncond, fake))
    return distribution_matching_loss(
        batch, cond, fake, teacher_uncond=uncond, guidance_scale=guidance_scale, eps=0.0, nonfinite="zero"
    )


def dmd2_loss(method: Any, generator_pred_x0: Tensor, batch: Any) -> Tensor:
    """DMD2Method._dmd_loss (fastvideo/train/methods/distribution_matching/dmd2.py).

    Args:
        method: the DMD2Method, with its models and settings.
        generator_pred_x0: [B, F, C, H, W], the student's samples.
        batch: what the models are conditioned on.

    Returns:
        The loss, float32.
    """

    def predict(model: Any, noisy: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        settings = {"conditional": conditional, "cfg_uncond": method._cfg_uncond, "attn_kind": "dense"}
        return model.predict_x0(noisy, timestep, batch, **settings)

    sample = getattr(method, "_sample_score_timestep", None) or (lambda device: _draw_timestep(method, device))
    return _loss(_DMD2, method, generator_pred_x0, sample, method.student.add_noise, predict)


def self_forcing_loss(method: Any, generator_pred_x0: Tensor, batch: Any) -> Tensor:
    """SelfForcingMethod._dmd_loss (fastvideo/train/methods/distribution_matching/self_forcing.py): :func:`dmd2_loss`
    with the method's own noise and predictions."""

    def predict(model: Any, noisy: Tensor, timestep: Tensor, conditional: bool) -> Tensor:
        settings = {"conditional": conditional, "attn_kind": "dense"}
        return method._predict_x0_with_scheduler(model, noisy, timestep, batch, **settings)

    def sample(device: torch.device) -> Tensor:
        return _draw_timestep(method, device)

    return _loss(_SELF_FORCING, method, generator_pred_x0, sample, method._sf_add_noise, predict)


def _loss(
    module: str,
    method: Any,
    generated: Tensor,
    sample_timestep: Callable[[torch.device], Tensor],
    add_noise: Callable[[Tensor, Tensor, Tensor], Tensor],
    predict: Callable[[Any, Tensor, Tensor, bool], Tensor],
) -> Tensor:
    name = "real_score_guidance_scale"
    read: Callable[..., float | None] = sys.modules[module].get_optional_float
    scale = read(method.method_config, name, where=f"method.{name}")
    with torch.no_grad():
        timestep = sample_timestep(generated.device)
        place: dict[str, Any] = {"device": generated.device, "dtype": generated.dtype}
        noise = torch.randn(generated.shape, generator=method.cuda_generator, **place)
        noisy = add_noise(generated, noise, timestep)
        fake = predict(method.critic, noisy, timestep, True)
        cond = predict(method.teacher, noisy, timestep, True)
        uncond = predict(method.teacher, noisy, timestep, False)
    return matching_loss(generated, cond, uncond, fake, 1.0 if scale is None else scale)


def _draw_timestep(method: Any, device: torch.device) -> Tensor:
    steps, draw = int(method.student.num_train_timesteps), {"device": device, "generator": method.cuda_generator}
    return method.student.shift_and_clamp_timestep(torch.randint(0, steps, [1], dtype=torch.long, **draw))


def pipeline_loss(pipeline: Any, generator_pred_video: Tensor, training_batch: Any) -> Tensor:
    """DistillationPipeline._dmd_forward (fastvideo/training/distillation_pipeline.py).

    Args:
        pipeline: the DistillationPipeline, with its transformers, scheduler and settings.
        generator_pred_video: [1, F, C, H, W], the generator's samples.
        training_batch: what the transformers are conditioned on. Its ``dmd_latent_vis_dict`` gets what FastVideo shows;
            the guided prediction of the teacher is computed when it is read.

    Returns:
        The loss, float32.
    """
    module: Any = sys.modules[_PIPELINE]
    sample, frames = generator_pred_video.detach(), generator_pred_video.shape[1]
    with torch.no_grad():
        steps = pipeline.num_train_timestep
        drawn = torch.randint(0, steps, [1], device=pipeline.device, dtype=torch.long)
        timestep = module.shift_timestep(drawn, pipeline.timestep_shift, steps)
        timestep = timestep.clamp(pipeline.min_timestep, pipeline.max_timestep)
        noise = torch.randn(pipeline.video_latent_shape, device=pipeline.device, dtype=sample.dtype)
        noisy = pipeline.noise_scheduler.add_noise(sample.flatten(0, 1), noise.flatten(0, 1), timestep)
        noisy = noisy.unflatten(0, (1, frames))

        def predict(transformer: Any, condition: Any) -> Tensor:
            batch = pipeline._build_distill_input_kwargs(noisy, timestep, condition, training_batch)
            flow = transformer(**batch.input_kwargs).permute(0, 2, 1, 3, 4)
            inputs = {"noise_input_latent": noisy.flatten(0, 1), "timestep": timestep}
            scheduler = pipeline.noise_scheduler
            image = module.pred_noise_to_pred_video(pred_noise=flow.flatten(0, 1), **inputs, scheduler=scheduler)
            return image.unflatten(0, flow.shape[:2])

        fake = predict(pipeline._get_fake_score_transformer(timestep), training_batch.conditional_dict)
        teacher = pipeline._get_real_score_transformer(timestep)
        cond = predict(teacher, training_batch.conditional_dict)
        uncond = predict(teacher, training_batch.unconditional_dict)
    scale = 1 + pipeline.real_score_guidance_scale
    loss = matching_loss(generator_pred_video, cond, uncond, fake, scale)
    training_batch.dmd_latent_vis_dict.update(
        {
            "training_batch_dmd_fwd_clean_latent": training_batch.latents,
            "generator_pred_video": sample,
            "real_score_pred_video": when_read(
                lambda: guided(cond, uncond, scale), cond.shape, cond.dtype, cond.device
            ),
            "faker_score_pred_video": fake,
            "dmd_timestep": timestep,
        }
    )
    return loss


_PROJECT = "hao-ai-lab/FastVideo"
_TRAIN, _TRAINING = "fastvideo.train", "fastvideo.training"  # the newer framework, which v0.1 lacks; the older one
_DMD2 = f"{_TRAIN}.methods.distribution_matching.dmd2"
_SELF_FORCING = f"{_TRAIN}.methods.distribution_matching.self_forcing"
_PIPELINE = f"{_TRAINING}.distillation_pipeline"
_PARAMETERS = "self generator_pred_x0 batch"
_PATCH = Patch(
    _PROJECT,
    [
        Target(_DMD2, "DMD2Method._dmd_loss", _PARAMETERS, replacement=dmd2_loss, may_lack=_TRAIN),
        Target(
            _SELF_FORCING, "SelfForcingMethod._dmd_loss", _PARAMETERS, replacement=self_forcing_loss, may_lack=_TRAIN
        ),
        Target(
            _PIPELINE,
            "DistillationPipeline._dmd_forward",
            "self generator_pred_video training_batch",
            replacement=pipeline_loss,
            may_lack=_TRAINING,
        ),
    ],
    KNOWN[_PROJECT],
)


def patch(strict: bool = True) -> Patched:
    """Makes FastVideo's DMD losses use the functions here; as a context manager, for the length of the block. A
    framework that a version does not have is left out: what is returned says so. See
    :meth:`fdistill_ops.integrations.Patch.apply`."""
    return _PATCH.apply(strict)


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _PATCH.revert()
