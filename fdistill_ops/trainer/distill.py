"""The distillation: f-distill (arXiv 2502.15681, Algorithm 1) on DMD2's recipe (arXiv 2405.14867).

Networks: the one-step student, the fake score (which follows the student's samples) and the discriminator head on the
frozen teacher's features. One step is ``fake_updates`` updates of the last two, then one of the student, whose loss is
the f-distill loss plus ``gan_weight`` times the GAN loss.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

import fdistill_ops as fd

from . import edm
from .config import Config
from .data import Data
from .files import Log, Record
from .networks import Denoiser, DiscriminatorHead
from .training import Optimizer, Progress, batch, follow, initialised, random_numbers


def one_step(student: Denoiser, noise: Tensor, labels: Tensor, sigma_max: float) -> Tensor:
    """The student's samples from unit noise [B, ...]: the denoiser's answer to pure noise."""
    return student(sigma_max * noise, noise.new_full((len(noise),), sigma_max), labels)


class Distillation:
    """The networks, their optimizers and the two updates.

    Attributes:
        average: moving average of the student's parameters: the result.
    """

    def __init__(self, teacher: Denoiser, config: Config, data: Data, divergence: str) -> None:
        self.config, self.data, self.divergence = config, data, divergence
        self.gen = random_numbers(config, "distillation")
        self.teacher = copy.deepcopy(teacher).requires_grad_(False)
        self.student, self.fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
        self.average = copy.deepcopy(self.teacher)
        self.head = initialised(config, lambda: DiscriminatorHead(config.width, config.depth))
        # The time of the ratio histogram is log(sigma).
        histogram = fd.RatioHistogram(
            math.log(config.distill_sigma_min),
            math.log(config.sigma_max),
            bins=config.ratio_bins,
            ema_rate=config.ratio_ema,
        )
        self.loss = fd.FDistillLoss(divergence, histogram=histogram).to(config.device)
        # No momentum: the three chase each other.
        steps, betas = config.distill_steps, (0.0, 0.99)
        self.student_optimizer = Optimizer(self.student, config.student_lr, steps, betas)
        self.fake_optimizer = Optimizer(self.fake, config.fake_lr, steps, betas)
        self.head_optimizer = Optimizer(self.head, config.discriminator_lr, steps, betas)

    def generate(self, student: Denoiser, labels: Tensor) -> Tensor:
        noise = edm.normal((len(labels), *student.shape), self.gen)
        return one_step(student, noise, labels, self.config.sigma_max)

    def noise_levels(self, count: int) -> Tensor:
        """Noise levels at which student and teacher are compared: uniform on EDM's schedule."""
        u = torch.rand(count, generator=self.gen, device=self.gen.device)
        return edm.karras_sigma(u, self.config.distill_sigma_min, self.config.sigma_max)

    def update_critics(self, step: int) -> dict[str, Tensor]:
        """The fake score learns to denoise the student's samples; the discriminator tells them from data at the same
        noise level and class, so that its logit is log(real/generated)."""
        real, labels = batch(self.data, self.config.batch_size, self.gen)
        sigma = self.noise_levels(len(labels))
        with torch.no_grad():
            x = self.generate(self.student, labels)
            x_t, real_t = edm.add_noise(x, sigma, self.gen), edm.add_noise(real, sigma, self.gen)
            _, real_features = self.teacher.with_features(real_t, sigma, labels)
            _, features = self.teacher.with_features(x_t, sigma, labels)
        fake_loss = edm.denoising_loss(self.fake(x_t, sigma, labels), x, sigma, self.data.sigma_data)
        self.fake_optimizer.update(fake_loss, step)
        discriminator_loss = fd.gan_discriminator_loss(self.head(real_features), self.head(features))
        self.head_optimizer.update(discriminator_loss, step)
        return {"fake_loss": fake_loss, "discriminator_loss": discriminator_loss}

    def update_student(self, step: int) -> tuple[fd.LossStats, dict[str, Tensor]]:
        """The weighted score difference at noised samples, and the GAN gradient through the teacher's features."""
        _, labels = batch(self.data, self.config.batch_size, self.gen)
        sigma = self.noise_levels(len(labels))
        x = self.generate(self.student, labels)
        x_t = edm.add_noise(x, sigma, self.gen)
        teacher, features = self.teacher.with_features(x_t, sigma, labels)
        with torch.no_grad():
            fake = self.fake(x_t, sigma, labels)
        logits = self.head(features)
        loss, stats = self.loss(x, teacher, fake, logits, sigma.log(), return_stats=True)
        gan_loss = fd.gan_generator_loss(logits)
        self.student_optimizer.update(loss + self.config.gan_weight * gan_loss, step)
        follow(self.average, self.student, step, self.config.ema)
        return stats, {"gan_loss": gan_loss}

    def train(self, log: Log) -> list[Record]:
        """All steps; the log records are the loss statistics by their names in LossStats, and the other losses."""
        progress = Progress(self.divergence, self.config.distill_steps, self.config.log_every, log)
        for step in progress:
            for _ in range(self.config.fake_updates):
                losses = self.update_critics(step)
            stats, generator_losses = self.update_student(step)
            if progress.due(step):
                losses |= generator_losses
                values = stats.to_dict()  # one copy for all of them
                values |= dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
                low, mean, high = (values[f"weight_{name}"] for name in ("min", "mean", "max"))
                postfix = {"loss": f"{values['loss']:.3f}", "weights": f"{low:.2f}/{mean:.2f}/{high:.2f}"}
                progress.show(step, values, postfix | {"ess": f"{values['effective_sample_size']:.0f}"})
        return progress.records

    @torch.no_grad()
    def weights(self, count: int) -> tuple[Tensor, Tensor]:
        """Noise levels and f-weights of ``count`` samples of the trained student, the histogram as it stands."""
        _, labels = batch(self.data, count, self.gen)
        sigma = self.noise_levels(count)
        x_t = edm.add_noise(self.generate(self.average, labels), sigma, self.gen)
        logits = self.head(self.teacher.with_features(x_t, sigma, labels)[1])
        self.loss.eval()
        weights = self.loss.weights(logits, sigma.log())
        self.loss.train()
        return sigma, weights
