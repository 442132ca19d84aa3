"""What a distillation starts from and is judged by: the teacher and the classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import edm, ranks
from .config import Config
from .data import Data
from .files import Record
from .networks import Classifier, Denoiser
from .training import Optimizer, Training, autocast, batch, follow, random_numbers


class Regression(Training):
    """Minimises the mean of a loss of images and classes.

    Attributes:
        average: moving average of the parameters: the result.
    """

    def __init__(self, model: nn.Module, lr: float, config: Config, data: Data) -> None:
        super().__init__(config, data)
        self.model = model
        self.average: Any = copy.deepcopy(model).requires_grad_(False)
        self.gen = random_numbers(config, self.stage)
        self.optimizer = Optimizer([(model, lr)], self.steps, (0.9, 0.99), config)
        self.parts = {"model": model, "average": self.average, "optimizer": self.optimizer}
        self.parallel = ranks.parallel(model)

    def loss(self) -> Tensor:
        raise NotImplementedError

    def update(self, step: int) -> Callable[[], Record]:
        with autocast(self.config):
            loss = self.loss()
        self.optimizer.schedule(step)
        self.optimizer.update(loss)
        follow(self.average, self.model, step, self.config.ema)
        return lambda: {"loss": loss.item()}


class TeacherTraining(Regression):
    """EDM training (arXiv 2206.00364, section 5); without the class now and then where it is to be guided (Ho and
    Salimans, arXiv 2207.12598)."""

    stage = "teacher"

    def __init__(self, model: Denoiser, config: Config, data: Data) -> None:
        self.steps, self.no_class = config.teacher_steps, model.no_class
        super().__init__(model, config.teacher_lr, config, data)

    def loss(self) -> Tensor:
        config, gen = self.config, self.gen
        x, labels = batch(self.data, config.batch_size, gen)
        if config.label_dropout:
            dropped = torch.rand(len(labels), generator=gen, device=gen.device) < config.label_dropout
            labels = labels.masked_fill(dropped, self.no_class)
        sigma = edm.lognormal_sigma(len(x), config.noise_mean, config.noise_std, gen)
        x_t = edm.add_noise(x, sigma, gen)
        x, labels, sigma, x_t = map(ranks.mine, (x, labels, sigma, x_t))
        return edm.denoising_loss(self.parallel(x_t, sigma, labels), x, sigma, self.data.sigma_data)


class ClassifierTraining(Regression):
    """Cross-entropy on noisy images, so that the features vary smoothly around the data. Every rank takes the whole
    batch, whose size is fixed, so that it does not change what judges the samples."""

    stage = "classifier"

    def __init__(self, model: Classifier, config: Config, data: Data) -> None:
        self.steps = config.classifier_steps
        super().__init__(model, config.classifier_lr, config, data)

    def loss(self) -> Tensor:
        config = self.config
        x, labels = batch(self.data, config.classifier_batch, self.gen)
        x = x + config.classifier_noise * edm.normal(x.shape, self.gen)
        return cross_entropy(self.parallel(x), labels)
