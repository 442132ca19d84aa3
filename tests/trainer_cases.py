"""Small trainings, and runs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fdistill_ops as fd
from fdistill_ops.trainer.checkpoints import Checkpoints
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import Data
from fdistill_ops.trainer.distill import Distillation
from fdistill_ops.trainer.files import Log
from fdistill_ops.trainer.networks import Denoiser
from fdistill_ops.trainer.training import Training, train

STEPS, EVERY = 11, 4
TINY = ["--quick", "--teacher-steps", "9", "--distill-steps", str(STEPS), "--checkpoint-every", str(EVERY)]
TINY += ["--width", "16", "--depth", "1", "--batch-size", "16", "--divergences", "js", "--device", "cpu"]


def need_extra() -> None:
    for module in ("sklearn", "matplotlib", "tqdm", "safetensors"):
        pytest.importorskip(module, reason="the trainer's extra is not installed")


def distillation(data: Data, **settings: Any) -> Distillation:
    few = {"distill_steps": STEPS, "checkpoint_every": EVERY, "log_every": 3, "width": 16, "depth": 1, "batch_size": 16}
    config = Config(**(few | settings))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = Denoiser(data.shape, data.classes, config.width, config.depth, data.sigma_data)
        for parameter in teacher.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return Distillation(teacher.to(config.device), config, data, "js")


def trained(data: Data, folder: Path) -> Distillation:
    """An uninterrupted training."""
    training = distillation(data)
    train(training, Checkpoints(folder, "js", "key"), Log(None))
    return training


def same(a: Any, b: Any) -> bool:
    """Two states, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Stop(Exception):
    """Stands for a kill: nothing is saved."""


def killed_before(training: Training, step: int) -> None:
    update = training.update

    def stop(now: int) -> Any:
        if now == step:
            raise Stop
        return update(now)

    training.update = stop  # type: ignore[method-assign]


def environment() -> dict[str, str]:
    path = [str(Path(fd.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not list(path.glob(pattern)):
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"no {pattern}: {process.communicate()[1][-2000:]}")
        time.sleep(0.01)
