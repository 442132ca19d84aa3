"""The distillation: f-distill (arXiv 2502.15681, Algorithm 1) on DMD2's recipe (arXiv 2405.14867).

Networks: the student, the fake score (which follows the student's samples) and the discriminator head on the frozen
teacher's features. One step is ``fake_updates`` updates of the last two, then one of the student, whose loss is the
f-distill loss plus ``gan_weight`` times the GAN loss.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fdistill_ops as fd

from ..stats import FIELDS
from . import edm, ranks
from .capture import CapturedUpdate
from .config import Config
from .data import Data
from .evaluate import in_batches
from .files import Record
from .networks import Denoiser, DiscriminatorHead
from .training import Optimizer, Training, autocast, batch, follow, initialised, random_numbers


class Draws(NamedTuple):
    """The random inputs of one update, this rank's part of the batch.

    Attributes:
        real, labels: training images [B, ...] and their classes [B], which the student is asked for.
        sigma: [B], noise levels at which student and teacher are compared.
        start: [B, student_steps, ...], unit noise for the student's steps.
        last: [B], which of them is the one trained; equally many of each.
        noise, real_noise: [B, ...], unit noise on the student's samples, on the training images.
    """

    real: Tensor
    labels: Tensor
    sigma: Tensor
    start: Tensor
    last: Tensor
    noise: Tensor
    real_noise: Tensor


def student_levels(config: Config) -> list[float]:
    """The noise levels of the student's steps, from sigma_max: evenly on EDM's schedule."""
    u = torch.arange(config.student_steps, dtype=torch.float64) / config.student_steps
    return edm.karras_sigma(u, config.sigma_min, config.sigma_max).tolist()


def student_inputs(student: nn.Module, noise: Tensor, labels: Tensor, levels: list[float]) -> Iterator[Tensor]:
    """What the student is asked at each level, from unit noise [B, steps, ...]: its last answer, noised again."""
    x = torch.zeros_like(noise[:, 0])
    for k, level in enumerate(levels):
        x_t = x + level * noise[:, k]
        yield x_t
        if k + 1 < len(levels):
            x = student(x_t, x.new_full((len(x),), level), labels)


def generate(student: nn.Module, noise: Tensor, labels: Tensor, levels: list[float]) -> Tensor:
    """The student's samples from unit noise [B, steps, ...]."""
    *_, x_t = student_inputs(student, noise, labels, levels)
    return student(x_t, x_t.new_full((len(x_t),), levels[-1]), labels)


@torch.no_grad()
def student_samples(student: nn.Module, config: Config, noise: Tensor, labels: Tensor) -> Tensor:
    """A trained student's from unit noise [N, ...], which decides the noise of further steps too."""
    levels = student_levels(config)
    gen = random_numbers(config, hashlib.sha256(noise.cpu().numpy().tobytes()).hexdigest())
    more = edm.normal((len(noise), len(levels) - 1, *noise.shape[1:]), gen)
    return generate(student, torch.cat([noise[:, None], more], dim=1), labels, levels)


def guided(teacher: Denoiser, config: Config) -> edm.Denoise:
    """The teacher with classifier-free guidance (arXiv 2207.12598): uncond + s (cond - uncond)."""
    if config.guidance == 1:
        return teacher

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        without = teacher(x, sigma, torch.full_like(labels, teacher.no_class))
        return without + config.guidance * (teacher(x, sigma, labels) - without)

    return denoise


class Distillation(Training):
    """The networks, their optimizers and the two updates.

    Attributes:
        average: moving average of the student's parameters: the result.
    """

    def __init__(self, teacher: Denoiser, config: Config, data: Data, divergence: str) -> None:
        super().__init__(config, data)
        self.stage, self.steps = divergence, config.distill_steps
        self.gen = random_numbers(config, "distillation")
        self.levels = student_levels(config)
        # On the device: a CUDA graph copies nothing from the host.
        self.level_of_step = torch.tensor(self.levels, device=config.device)
        self.teacher = copy.deepcopy(teacher).requires_grad_(False)
        self.student, self.fake = (copy.deepcopy(teacher).requires_grad_() for _ in range(2))
        # Fake score and discriminator are told the step, the former as a further class: they follow what each of them
        # makes, not the mixture.
        self.fake.repeat_classes(config.student_steps)
        self.average = copy.deepcopy(self.teacher)
        sizes = (teacher.network.features, config.width, config.student_steps)
        self.head = initialised(config, lambda: DiscriminatorHead(*sizes))
        # The time of the ratio histogram is log(sigma).
        histogram = fd.RatioHistogram(
            math.log(config.distill_sigma_min),
            math.log(config.distill_sigma_max),
            bins=config.ratio_bins,
            ema_rate=config.ratio_ema,
        )
        self.loss = fd.FDistillLoss(divergence, histogram=histogram).to(config.device)
        # No momentum: the three chase each other.
        steps, betas = config.distill_steps, (0.0, 0.99)
        critics = [(self.fake, config.fake_lr), (self.head, config.discriminator_lr)]
        self.student_optimizer = Optimizer([(self.student, config.student_lr)], steps, betas, config)
        self.critics_optimizer = Optimizer(critics, steps, betas, config)
        names = ("student", "fake", "head", "average", "loss", "student_optimizer", "critics_optimizer")
        self.parts = {name: getattr(self, name) for name in names}
        # The same modules; over several ranks they average their gradients.
        self.trained_student, self.trained_fake, self.trained_head = map(
            ranks.parallel, (self.student, self.fake, self.head)
        )
        self.compute_critics: Callable[..., Any] = self.critic_losses
        self.compute_student: Callable[..., Any] = self.student_losses
        if config.compile:
            self.compute_critics = torch.compile(self.critic_losses, fullgraph=ranks.world() == 1)
            self.compute_student = torch.compile(self.student_losses, fullgraph=ranks.world() == 1)
        if config.cuda_graph:
            self.apply_student = CapturedUpdate(self.apply_student)  # type: ignore[method-assign,assignment]

    def noise_levels(self, count: int, gen: torch.Generator) -> Tensor:
        """Noise levels at which student and teacher are compared: uniform on EDM's schedule."""
        u = torch.rand(count, generator=gen, device=gen.device)
        return edm.karras_sigma(u, self.config.distill_sigma_min, self.config.distill_sigma_max)

    def draw(self) -> Draws:
        """The random inputs of the next update. All ranks draw those of the whole batch, and keep their part."""
        config, shape = self.config, self.teacher.shape
        real, labels = batch(self.data, config.batch_size, self.gen)
        sigma = self.noise_levels(len(labels), self.gen)
        start = edm.normal((len(labels), config.student_steps, *shape), self.gen)
        last = torch.arange(len(labels), device=sigma.device) % config.student_steps
        noise, real_noise = (edm.normal(real.shape, self.gen) for _ in range(2))
        return Draws(*map(ranks.mine, (real, labels, sigma, start, last, noise, real_noise)))

    def student_samples(self, draws: Draws) -> Tensor:
        """Each from the step that it is to train; the steps before run without gradients, on the student's own samples:
        DMD2's backward simulation (section 4.5)."""
        with torch.no_grad():
            inputs = torch.stack([*student_inputs(self.student, draws.start, draws.labels, self.levels)], dim=1)
        x_t = inputs[torch.arange(len(inputs), device=inputs.device), draws.last]
        return self.trained_student(x_t, self.level_of_step[draws.last], draws.labels)

    def by_step(self, draws: Draws) -> Tensor:
        """The classes that the fake score knows."""
        return draws.labels + draws.last * (self.teacher.no_class + 1)

    def critic_losses(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """The fake score learns to denoise the student's samples; the discriminator tells them from data at the same
        noise level and class, so that its logit is log(real/generated)."""
        sigma, labels = draws.sigma, draws.labels
        with autocast(self.config):
            with torch.no_grad():
                x = self.student_samples(draws)
                x_t, real_t = edm.noised(x, sigma, draws.noise), edm.noised(draws.real, sigma, draws.real_noise)
                _, real_features = self.teacher.with_features(real_t, sigma, labels)
                _, features = self.teacher.with_features(x_t, sigma, labels)
            fake_loss = edm.denoising_loss(
                self.trained_fake(x_t, sigma, self.by_step(draws)), x, sigma, self.data.sigma_data
            )
            real_logits, logits = self.trained_head(torch.cat([real_features, features]), draws.last.repeat(2)).chunk(2)
        return fake_loss, fd.gan_discriminator_loss(real_logits, logits)

    def student_losses(self, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted score difference at noised samples, and the GAN loss through the teacher's features.

        Returns:
            f-distill loss, GAN loss, statistics of the first (LossStats.vector).
        """
        sigma, labels = draws.sigma, draws.labels
        with autocast(self.config):
            x = self.student_samples(draws)
            x_t = edm.noised(x, sigma, draws.noise)
            teacher, features = self.teacher.with_features(x_t, sigma, labels)
            guidance: dict[str, Any] = {}
            with torch.no_grad():
                fake = self.fake(x_t, sigma, self.by_step(draws))
                if self.config.guidance != 1:
                    without = self.teacher(x_t, sigma, torch.full_like(labels, self.teacher.no_class))
                    guidance = {"teacher_uncond": without, "guidance_scale": self.config.guidance}
            logits = self.head(features, draws.last)
        loss, stats = self.loss(x, teacher, fake, logits, sigma.log(), return_stats=True, **guidance)
        return loss, fd.gan_generator_loss(logits), stats.vector

    def apply_student(self, draws: Draws) -> tuple[Tensor, Tensor]:
        loss, gan_loss, stats = self.compute_student(draws)
        self.student_optimizer.update(loss + self.config.gan_weight * gan_loss)
        return gan_loss, stats

    def update_critics(self, step: int) -> dict[str, Tensor]:
        fake_loss, discriminator_loss = self.compute_critics(self.draw())
        self.critics_optimizer.schedule(step)
        self.critics_optimizer.update(fake_loss + discriminator_loss)  # which have no parameter in common
        return {"fake_loss": fake_loss, "discriminator_loss": discriminator_loss}

    def update_student(self, step: int) -> tuple[Tensor, Tensor]:
        self.student_optimizer.schedule(step)
        gan_loss, stats = self.apply_student(self.draw())
        follow(self.average, self.student, step, self.config.ema)
        return gan_loss, stats

    def update(self, step: int) -> Callable[[], Record]:
        """A record holds the statistics by their names in LossStats, and the other losses."""
        for _ in range(self.config.fake_updates):
            losses = self.update_critics(step)
        losses["gan_loss"], stats = self.update_student(step)

        def read() -> Record:
            values = torch.cat([stats, torch.stack([*losses.values()]).to(stats)])
            return dict(zip([*FIELDS, *losses], values.tolist(), strict=True))  # one copy for all of them

        return read

    def postfix(self, values: Record) -> dict[str, str]:
        low, mean, high = (values[f"weight_{name}"] for name in ("min", "mean", "max"))
        weights = {"weights": f"{low:.2f}/{mean:.2f}/{high:.2f}"}
        return super().postfix(values) | weights | {"ess": f"{values['effective_sample_size']:.0f}"}

    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Samples of the result from unit noise [N, ...]."""
        return student_samples(self.average, self.config, noise, labels)

    @torch.no_grad()
    def weights(self, count: int) -> tuple[Tensor, Tensor]:
        """Noise levels and f-weights of ``count`` samples of the result, the histogram as it stands."""
        gen = random_numbers(self.config, "weights")
        _, labels = batch(self.data, count, gen)
        sigma = self.noise_levels(count, gen)
        x = in_batches(self.sample, edm.normal((count, *self.teacher.shape), gen), labels)
        x_t = edm.add_noise(x, sigma, gen)
        features = in_batches(lambda *part: self.teacher.with_features(*part)[1], x_t, sigma, labels)
        logits = self.head(features, torch.full_like(labels, len(self.levels) - 1))
        self.loss.eval()
        weights = self.loss.weights(logits, sigma.log())
        self.loss.train()
        return sigma, weights
