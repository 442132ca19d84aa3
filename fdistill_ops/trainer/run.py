"""One run: data, classifier, teacher, a distillation for each divergence, report."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import edm, figures, report
from .config import Config
from .data import Data, load_digits
from .distill import Distillation, one_step
from .evaluate import Judge, Sampler, evaluate
from .files import Log, Record, cached, say
from .networks import Classifier, Denoiser
from .teacher import train_classifier, train_teacher
from .training import initialised, random_numbers

Module = TypeVar("Module", bound=nn.Module)

# The settings that decide what is cached, besides those that count for both.
CACHE_SETTINGS = {
    "classifier": ("classifier_steps", "classifier_lr", "classifier_batch", "classifier_noise"),
    "teacher": ("teacher_steps", "teacher_lr", "batch_size", "noise_mean", "noise_std", "width", "depth"),
}


def run(config: Config) -> None:
    """Trains, distils and writes the report. The table goes to stdout, whatever else is said to stderr."""
    data = load_digits(config.seed, torch.device(config.device))
    shape = tuple(data.train.shape[1:])
    seconds: dict[str, float] = {}
    curves: list[figures.WeightCurve] = []
    with Log(config.out / "log.jsonl") as log:
        with timed(seconds, "classifier"):
            classifier = initialised(config, lambda: Classifier(shape, data.classes))
            classifier = trained(classifier, "classifier", train_classifier, config, data, log)
        with timed(seconds, "teacher"):
            teacher = initialised(
                config, lambda: Denoiser(shape, data.classes, config.width, config.depth, data.sigma_data)
            )
            teacher = trained(teacher, "teacher", train_teacher, config, data, log)
        samplers = teacher_samplers(teacher, config)
        for divergence in config.divergences:
            with timed(seconds, f"student, {divergence}"):
                distillation = Distillation(teacher, config, data, divergence)
                records = distillation.train(log)
            curves.append(figures.WeightCurve(divergence, records, *distillation.weights(config.weight_samples)))
            samplers.append(student_sampler(f"student, {divergence}", distillation.average, config))

    with timed(seconds, "evaluation"):
        rows = evaluate(samplers, Judge(classifier, data), config, data)
    with timed(seconds, "figures"):
        draw(config, data, samplers, curves)
    report.write(config, rows, curves, seconds)
    print(report.table(rows))
    say(f"report: {config.out / 'report.md'} ({sum(seconds.values()):.0f} s)")


def trained(
    module: Module,
    stage: str,
    train: Callable[[Module, Config, Data, Log], list[Record]],
    config: Config,
    data: Data,
    log: Log,
) -> Module:
    """The module trained, or from the cache; its training is in the log either way."""
    key = config.key("ema", "log_every", *CACHE_SETTINGS[stage])
    found = cached(config.cache / f"{stage}-{key}.pt", key, module, lambda: train(module, config, data, log))
    if found is None:
        return module
    module, records = found
    log.write(stage, records)
    return module


def teacher_samplers(teacher: Denoiser, config: Config) -> list[Sampler]:
    """The teacher by EDM's sampler; and in one step, which is the student before the distillation."""

    def heun(noise: Tensor, labels: Tensor) -> Tensor:
        return edm.heun(teacher, noise, labels, config.sampler_steps, config.sigma_min, config.sigma_max)

    steps = config.sampler_steps
    many = Sampler(f"teacher, {steps} Heun steps", 2 * steps - 1, heun)
    return [many, student_sampler("teacher, 1 step", teacher, config)]


def student_sampler(name: str, student: Denoiser, config: Config) -> Sampler:
    return Sampler(name, 1, lambda noise, labels: one_step(student, noise, labels, config.sigma_max))


def draw(config: Config, data: Data, samplers: list[Sampler], curves: list[figures.WeightCurve]) -> None:
    """The PNG files: a grid for the data and for every sampler (a row for each class), the weights, and all of it."""
    columns = config.grid_columns
    labels = torch.arange(data.classes, device=config.device).repeat_interleave(columns)
    noise = edm.normal((len(labels), *data.train.shape[1:]), random_numbers(config, "grids"))
    real = torch.stack([data.held_out[data.held_out_labels == label][:columns] for label in range(data.classes)])
    grids = {"held-out images": real}
    grids |= {sampler.name: sampler(noise, labels).unflatten(0, (-1, columns)) for sampler in samplers}
    for name, images in grids.items():
        figures.grid_png(config.out / f"{re.sub(r'[^a-zA-Z0-9.-]+', '_', name)}.png", images)
    figures.weights_png(config.out / "weights.png", curves)
    figures.overview_png(config.out / "overview.png", grids, curves)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
