"""One run: data, classifier, teacher, a distillation for each divergence, report."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import fdistill_ops as fd

from . import edm, figures, ranks, report
from .checkpoints import Checkpoints
from .config import Config
from .data import Data, load_digits
from .distill import Distillation, generate, guided
from .evaluate import Judge, Sampler, evaluate
from .files import Log, say
from .networks import Classifier, Denoiser
from .teacher import ClassifierTraining, TeacherTraining
from .training import initialised, random_numbers, train

# The settings that decide what a stage makes of its data, besides those that count for all.
SETTINGS = {
    "classifier": ("classifier_steps", "classifier_lr", "classifier_batch", "classifier_noise"),
    "teacher": ("teacher_steps", "teacher_lr", "batch_size", "noise_mean", "noise_std", "width", "depth"),
    "student": (
        *("distill_steps", "student_steps", "guidance", "fake_updates", "student_lr", "fake_lr", "discriminator_lr"),
        *("gan_weight", "distill_sigma_min", "sigma_min", "sigma_max", "ratio_bins", "ratio_ema"),
        *("compile", "cuda_graph"),
    ),
}


class Stages:
    """The trainings of one data set, each from its checkpoints where there are some."""

    def __init__(self, config: Config, data: Data, log: Log) -> None:
        self.config, self.data, self.log = config, data, log
        self.shape = tuple(data.train.shape[1:])
        self.fingerprint = _fingerprint(data)

    def classifier(self) -> Classifier:
        model = initialised(self.config, lambda: Classifier(self.shape, self.data.classes))
        training = ClassifierTraining(model, self.config, self.data)
        train(training, self.checkpoints("classifier", SETTINGS["classifier"]), self.log)
        return training.average

    def teacher(self) -> Denoiser:
        config, data = self.config, self.data
        model = initialised(
            config, lambda: Denoiser(self.shape, data.classes, config.width, config.depth, data.sigma_data)
        )
        training = TeacherTraining(model, config, data)
        train(training, self.checkpoints("teacher", (*SETTINGS["teacher"], "label_dropout")), self.log)
        return training.average

    def student(self, teacher: Denoiser, divergence: str) -> Distillation:
        training = Distillation(teacher, self.config, self.data, divergence)
        names = (*SETTINGS["teacher"], "label_dropout", *SETTINGS["student"])
        # By its formula: a name can be registered for another one.
        formula = repr(fd.get_divergence(divergence))
        train(training, self.checkpoints(f"student-{divergence}", names, divergence=formula), self.log)
        return training

    def checkpoints(self, stage: str, names: tuple[str, ...], **more: str) -> Checkpoints:
        key = self.config.key("ema", "log_every", *names, data=self.fingerprint, **more)
        return Checkpoints(self.config.cache, stage, key)


def _fingerprint(data: Data) -> str:
    """A hash of the training images and classes."""
    digest = hashlib.sha256()
    for tensor in (data.train, data.train_labels):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def run(config: Config) -> None:
    """Trains, distils and writes the report. The table goes to stdout, whatever else is said to stderr."""
    data = load_digits(config.seed, torch.device(config.device))
    seconds: dict[str, float] = {}
    curves: list[figures.WeightCurve] = []
    with Log(config.out if ranks.is_main() else None) as log:
        stages = Stages(config, data, log)
        with timed(seconds, "classifier"):
            classifier = stages.classifier()
        with timed(seconds, "teacher"):
            teacher = stages.teacher()
        samplers = teacher_samplers(teacher, config)
        for divergence in config.divergences:
            with timed(seconds, f"student, {divergence}"):
                student = stages.student(teacher, divergence)
            curves.append(figures.WeightCurve(divergence, student.records, *student.weights(config.weight_samples)))
            samplers.append(Sampler(f"student, {divergence}", config.student_steps, student.sample))
    if not ranks.is_main():
        return
    with timed(seconds, "evaluation"):
        rows = evaluate(samplers, Judge(classifier, data), config, data)
    with timed(seconds, "figures"):
        draw(config, data, samplers, curves)
    report.write(config, rows, curves, seconds)
    print(report.table(rows))
    say(f"report: {config.out / 'report.md'} ({sum(seconds.values()):.0f} s)")


def teacher_samplers(teacher: Denoiser, config: Config) -> list[Sampler]:
    """The teacher by EDM's sampler; and in one step, which is the one-step student before the distillation."""
    denoise, evaluations = guided(teacher, config), 1 if config.guidance == 1 else 2

    def heun(noise: Tensor, labels: Tensor) -> Tensor:
        return edm.heun(denoise, noise, labels, config.sampler_steps, config.sigma_min, config.sigma_max)

    def one_step(noise: Tensor, labels: Tensor) -> Tensor:
        return generate(teacher, noise[:, None], labels, [config.sigma_max])

    many = Sampler(f"teacher, {config.sampler_steps} Heun steps", evaluations * (2 * config.sampler_steps - 1), heun)
    return [many, Sampler("teacher, 1 step", 1, one_step)]


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
