"""What every training here shares: random numbers, batches, optimizer, moving average, progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .config import Config
from .data import Data
from .files import Log, Record

Module = TypeVar("Module", bound=nn.Module)
_STAGES = ("classifier", "teacher", "distillation", "evaluation", "grids")


class TrainingError(RuntimeError):
    """A training that went wrong, as one line for the user."""


def random_numbers(config: Config, stage: str) -> torch.Generator:
    """The random numbers of one stage: the same whether the stages before it ran or came from the cache."""
    return torch.Generator(config.device).manual_seed(config.seed * len(_STAGES) + _STAGES.index(stage))


def initialised(config: Config, build: Callable[[], Module]) -> Module:
    """A module whose parameters depend on the seed alone; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build().to(config.device)


def batch(data: Data, count: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training images and classes, drawn with replacement."""
    index = torch.randint(len(data.train), (count,), generator=gen, device=gen.device)
    return data.train[index], data.train_labels[index]


class Optimizer:
    """Adam with a short warm-up, then linear decay to a tenth."""

    def __init__(self, module: nn.Module, lr: float, steps: int, betas: tuple[float, float]) -> None:
        self.adam = torch.optim.Adam(module.parameters(), lr=lr, betas=betas, fused=True)
        self.lr, self.steps = lr, steps

    def update(self, loss: Tensor, step: int) -> None:
        for group in self.adam.param_groups:
            group["lr"] = self.lr * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / self.steps)
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """One step of an exponential moving average of the parameters; its memory is shorter at first."""
    rate = 1 - min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(module.parameters()), rate)


class Progress:
    """The steps of a training, with a progress bar and a log record every ``every`` steps and at the last.

    ``due(step)`` says whether to read numbers from the device at this step; ``show`` takes them.
    """

    def __init__(self, stage: str, steps: int, every: int, log: Log) -> None:
        self.stage, self.steps, self.every, self.log = stage, steps, every, log
        self.records: list[Record] = []

    def __iter__(self) -> Iterator[int]:
        from tqdm import tqdm

        with tqdm(total=self.steps, desc=self.stage, mininterval=0.5, dynamic_ncols=True) as self.bar:
            for step in range(self.steps):
                yield step
                self.bar.update()

    def due(self, step: int) -> bool:
        return (step + 1) % self.every == 0 or step + 1 == self.steps

    def show(self, step: int, values: dict[str, float], postfix: dict[str, Any]) -> None:
        """Logs ``values`` and shows ``postfix``; TrainingError where the loss is not finite."""
        if not math.isfinite(values["loss"]):
            raise TrainingError(f"{self.stage}: the loss is {values['loss']} at step {step + 1}")
        record = {"step": step + 1} | values
        self.records.append(record)
        self.log.write(self.stage, [record])
        self.bar.set_postfix(postfix, refresh=False)
