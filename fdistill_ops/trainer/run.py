"""One run: data, classifier, teacher, a distillation for each divergence, report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import fdistill_ops as fd

from .. import backends
from . import edm, figures, models, ranks, report
from .checkpoints import Checkpoints
from .config import Config
from .data import Data, load
from .distill import Distillation, generate, guided
from .evaluate import Judge, Sampler, evaluate
from .files import Log, say
from .networks import Classifier, Denoiser, is_large, unet_class
from .teacher import ClassifierTraining, TeacherTraining
from .training import TrainingError, initialised, train

# The settings that decide what a stage makes of its data, besides those that count for all.
SETTINGS = {
    "classifier": ("classifier_steps", "classifier_lr", "classifier_batch", "classifier_noise"),
    "teacher": ("teacher_steps", "teacher_lr", "batch_size", "noise_mean", "noise_std", "width", "depth"),
    "student": (
        *("distill_steps", "student_steps", "guidance", "fake_updates", "student_lr", "fake_lr", "discriminator_lr"),
        *("gan_weight", "distill_sigma_min", "distill_sigma_max", "sigma_min", "sigma_max"),
        *("ratio_bins", "ratio_ema"),
        *("compile", "cuda_graph"),
    ),
}


class Stages:
    """The trainings of one data set, each from its checkpoints where there are some."""

    def __init__(self, config: Config, data: Data, log: Log) -> None:
        if config.guidance != 1 and data.classes == 1:
            raise TrainingError(f"--guidance {config.guidance} needs classes, and {data.name} has none")
        if is_large(data.shape):
            unet_class()  # what is missing is said before any training
        self.config, self.data, self.log = config, data, log
        self.fingerprint = data.fingerprint
        self.models: dict[str, Checkpoints] = {}  # those of the teacher, and of students by divergence

    def classifier(self) -> Classifier | None:
        """None for data without classes."""
        if self.data.classes == 1:
            return None
        model = initialised(self.config, lambda: Classifier(self.data.shape, self.data.classes))
        training = ClassifierTraining(model, self.config, self.data)
        train(training, self.checkpoints("classifier", SETTINGS["classifier"]), self.log)
        return training.average

    def teacher(self) -> Denoiser:
        config, data = self.config, self.data
        size = (config.width, config.depth, data.sigma_data)
        model = initialised(config, lambda: Denoiser(data.shape, data.classes, *size))
        training = TeacherTraining(model, config, data)
        self.models["teacher"] = self.checkpoints("teacher", (*SETTINGS["teacher"], "label_dropout"))
        train(training, self.models["teacher"], self.log)
        return training.average

    def student(self, teacher: Denoiser, divergence: str) -> Distillation:
        training = Distillation(teacher, self.config, self.data, divergence)
        names = (*SETTINGS["teacher"], "label_dropout", *SETTINGS["student"])
        # By its formula: a name can be registered for another one.
        more = losses_by(self.config) | {"divergence": repr(fd.get_divergence(divergence))}
        self.models[divergence] = self.checkpoints(f"student-{divergence}", names, **more)
        train(training, self.models[divergence], self.log)
        return training

    def checkpoints(self, stage: str, names: tuple[str, ...], **more: str) -> Checkpoints:
        key = self.config.key("ema", "log_every", *names, data=self.fingerprint, **more)
        return Checkpoints(self.config.cache, stage, key)


def losses_by(config: Config) -> dict[str, str]:
    """What computes the students' losses: the last bits depend on it."""
    return {"backend": backends.choose(torch.device(config.device)), "fdistill_ops": fd.__version__}


def run(config: Config) -> None:
    """Trains, distils and writes the report. The table goes to stdout, whatever else is said to stderr."""
    data = load(config)
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
            levels = figures.by_noise_level(*student.weights(config.weight_samples))
            curves.append(figures.WeightCurve(divergence, student.records, levels))
            samplers.append(Sampler(f"student, {divergence}", config.student_steps, student.sample))
    if not ranks.is_main():
        return
    with timed(seconds, "evaluation"):
        judge = Judge(data, classifier, config.seed)
        if judge.warning:
            say(f"warning: {judge.warning}")
        rows = evaluate(samplers, judge, config, data, modes=data.classes == 1)  # else the classes say it
    with timed(seconds, "figures"):
        figures.draw(config, data, samplers, curves)
    report.write(config, data, rows, curves, seconds)
    models.write(config, data, stages.models)
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


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
