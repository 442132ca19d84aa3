"""The paper's question, which divergence covers the modes, over data sets and seeds.

For each data set and seed one teacher is trained and distilled by every divergence; all of it is in the cache, and what
was measured in ``results``, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fdistill_ops as fd

from . import comparison_report, figures
from .checkpoints import Checkpoints
from .config import Config
from .data import Data, load
from .distill import Distillation
from .evaluate import Judge, Row, Sampler, evaluate
from .files import Log, say
from .findings import REFERENCE, canonical, findings
from .interruption import Interrupted, raised
from .limits import DataError
from .networks import MissingPackage
from .progress import bar
from .run import Stages, losses_by, teacher_samplers
from .training import TrainingError, random_numbers

NO_PART = ("divergences", "threads", "checkpoint_every", "max_pixels", "max_mib")  # in a result, but for what is added
MEASURED = 2  # another number where ``measure`` means something else
Measured = dict[str, Any]  # what ``measure`` has found, in types that torch.load reads with weights_only


@dataclass(frozen=True)
class Comparison:
    """The runs, one for each data set and seed, and how many of them at a time, each in a process of its own."""

    runs: tuple[Config, ...]
    jobs: int
    out: Path


def compare(comparison: Comparison) -> None:
    """Trains and measures what is not there yet, and writes the report. Its tables go to stdout."""
    for config in {config.data: config for config in comparison.runs}.values():
        Stages(config, load(config), Log(None))  # what is wrong with somebody's data comes before any training
    if comparison.jobs > 1:
        in_parallel(comparison)
    runs = bar("comparison", comparison.runs) if comparison.jobs == 1 else comparison.runs
    measured = [measure(config) for config in runs]
    # The paper's claims are put to the test where the modes are known.
    found = findings([result for one in measured for result in one["results"] if "divergences" in result])
    comparison_report.write(comparison.out, comparison.runs, measured, found)
    say(f"report: {comparison.out / 'report.html'}")


def in_parallel(comparison: Comparison) -> None:
    """Runs ``measure`` for each run in a process of its own; its result is in the files.

    Raises:
        TrainingError: where a process fails; the others are ended first, once they have saved.
    """
    context = multiprocessing.get_context("spawn")
    progress = bar("comparison", total=len(comparison.runs))
    waiting = list(comparison.runs)
    running: list[SpawnProcess] = []
    try:
        while waiting or running:
            while waiting and len(running) < comparison.jobs:
                process = context.Process(target=_process, args=(waiting.pop(0),))
                process.start()
                running.append(process)
            wait([process.sentinel for process in running])
            ended = [process for process in running if process.exitcode is not None]
            progress.update(len(ended))
            if any(process.exitcode for process in ended):
                raise TrainingError("one of the processes has failed")
            running = [process for process in running if process not in ended]
    finally:
        progress.close()
        for process in running:
            process.terminate()  # SIGTERM, on which a training saves
        for process in running:
            process.join()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # on which a training saves


def _process(config: Config) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()  # nobody else ends it where that was killed
    torch.set_num_threads(config.threads)
    try:
        with raised():
            measure(config)
    except Interrupted as interrupted:
        sys.exit(interrupted.status)
    except (TrainingError, DataError, MissingPackage, OSError) as error:
        say(f"fdistill-train: {config.data}, seed {config.seed}: error: {error}")
        sys.exit(1)


def measure(config: Config) -> Measured:
    """Everything about one data set and seed, from the file where it is there."""
    data = load(config)
    names = [name for name in config.settings() if name not in NO_PART]
    formulas = [(name, repr(fd.get_divergence(name))) for name in config.divergences]
    more = losses_by(config) | {"divergences": formulas, "measured": MEASURED}
    key = config.key(*names, data=data.fingerprint, **more)
    stored = Checkpoints(config.out / "results", f"{data.name}-{config.seed}", key)
    for _, found in stored.newest_first():
        return found
    logs = config.out / "logs" / f"{data.name}-{config.seed}"
    logs.mkdir(parents=True, exist_ok=True)
    with Log(logs) as log:
        found = _measure(config, data, Stages(config, data, log))
    stored.save(0, found)
    say(f"{data.name}, seed {config.seed}: done")
    return found


def _measure(config: Config, data: Data, stages: Stages) -> Measured:
    judge = Judge(data, stages.classifier(), config.seed)
    if judge.warning:
        say(f"warning: {data.name}, seed {config.seed}: {judge.warning}")
    teacher = stages.teacher()
    samplers = teacher_samplers(teacher, config)[:1]
    common: dict[str, float] = {}
    results: list[Row] = []
    curves = []
    # The reference first: its state is the one in which all gradients are compared.
    for name in sorted(config.divergences, key=lambda name: canonical(name) != REFERENCE):
        student = stages.student(teacher, name)
        variances = gradient_variances(student, config.divergences if not common else (name,))
        common = common or variances
        weights = [config.batch_size / record["effective_sample_size"] - 1 for record in student.records]
        results.append(
            {
                "data": data.name,
                "seed": config.seed,
                "divergence": name,
                "weight_variance": sum(weights) / len(weights),
                "gradient_variance": variances[name],
                "gradient_variance_common": common[name],
            }
        )
        samplers.append(Sampler(name, config.student_steps, student.sample))
        levels = figures.by_noise_level(*student.weights(config.weight_samples))
        curves.append({"name": name, "records": student.records, "levels": levels})
    rows = evaluate(samplers, judge, config, data, True, config.divergences, speeds=False)
    by_name = {row["name"]: row for row in rows}
    return {
        "name": data.name,
        "seed": config.seed,
        "compared": data.compared,
        "rows": rows[:2],
        "results": [by_name[result["divergence"]] | result for result in results],
        "curves": curves,
        "samples": figures.sample_sets(config, data, samplers),
    }


def gradient_variances(run: Distillation, divergences: tuple[str, ...]) -> dict[str, float]:
    """Total variance (trace of the covariance) of the gradient of the f-distill loss in the student's parameters, over
    independent batches, in the state that ``run`` is in, relative to that of the unweighted gradient from the same
    random numbers.

    The weights have mean 1 in every batch, so that the unweighted gradient, reverse KL's, is the scale; the gradient's
    own mean is none, since it vanishes as the student converges. Without the normaliser |x - T|, which has no part in
    the weights: it comes near 0 so often in the plane that the variance of what is divided by it is infinite.
    """
    names = dict.fromkeys((REFERENCE, *divergences))
    losses = {name: fd.FDistillLoss(name, histogram=run.loss.histogram, normalizer=None) for name in names}
    parameters, batches = list(run.student.parameters()), run.config.gradient_batches
    sums: dict[str, Tensor] = {}
    squares = dict.fromkeys(losses, 0.0)
    own, gen = run.loss, run.gen
    run.gen = random_numbers(run.config, "gradients")
    try:
        for _ in bar("gradients", range(batches)):
            draws = run.draw()
            for name, loss in losses.items():
                run.loss = loss.to(run.config.device).eval()  # the histogram stays as it is
                parts = torch.autograd.grad(run.student_losses(draws)[0], parameters)
                gradient = torch.cat([part.flatten() for part in parts]).double()
                sums[name] = sums[name] + gradient if name in sums else gradient
                squares[name] += float(gradient.square().sum())
    finally:
        run.loss, run.gen = own, gen
        run.loss.train()
    variances = {name: squares[name] - float(sums[name].square().sum()) / batches for name in losses}
    return {name: variances[name] / variances[REFERENCE] for name in divergences}
