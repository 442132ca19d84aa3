"""What a distillation starts from and is judged by: the teacher and the classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import edm
from .config import Config
from .data import Data
from .files import Log, Record
from .networks import Classifier, Denoiser
from .training import Optimizer, Progress, batch, follow, random_numbers


def train_teacher(teacher: Denoiser, config: Config, data: Data, log: Log) -> list[Record]:
    """EDM training (arXiv 2206.00364, section 5)."""

    def loss(model: nn.Module, x: Tensor, labels: Tensor, gen: torch.Generator) -> Tensor:
        sigma = edm.lognormal_sigma(len(x), config.noise_mean, config.noise_std, gen)
        return edm.denoising_loss(model(edm.add_noise(x, sigma, gen), sigma, labels), x, sigma, data.sigma_data)

    steps, lr, count = config.teacher_steps, config.teacher_lr, config.batch_size
    return _train("teacher", teacher, loss, steps, lr, count, config, data, log)


def train_classifier(classifier: Classifier, config: Config, data: Data, log: Log) -> list[Record]:
    """Cross-entropy on noisy images, so that the features vary smoothly around the data."""

    def loss(model: nn.Module, x: Tensor, labels: Tensor, gen: torch.Generator) -> Tensor:
        return cross_entropy(model(x + config.classifier_noise * edm.normal(x.shape, gen)), labels)

    steps, lr, count = config.classifier_steps, config.classifier_lr, config.classifier_batch
    return _train("classifier", classifier, loss, steps, lr, count, config, data, log)


def _train(
    stage: str,
    average: nn.Module,
    batch_loss: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor],
    steps: int,
    lr: float,
    count: int,
    config: Config,
    data: Data,
    log: Log,
) -> list[Record]:
    """Minimises a loss of ``count`` images and classes; ``average`` becomes the moving average of the parameters."""
    gen = random_numbers(config, stage)
    model = copy.deepcopy(average)
    optimizer = Optimizer(model, lr, steps, betas=(0.9, 0.99))
    progress = Progress(stage, steps, config.log_every, log)
    for step in progress:
        x, labels = batch(data, count, gen)
        loss = batch_loss(model, x, labels, gen)
        optimizer.update(loss, step)
        follow(average, model, step, config.ema)
        if progress.due(step):
            value = loss.item()
            progress.show(step, {"loss": value}, {"loss": f"{value:.3f}"})
    return progress.records
