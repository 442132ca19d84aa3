"""What every training here shares: random numbers, batches, optimizer, moving average, and the loop."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._torch import foreach_lerp_
from . import ranks
from .checkpoints import Checkpoints, State
from .config import Config
from .data import Data
from .files import Log, Record, say
from .interruption import Interrupted, deferred
from .progress import bar

Module = TypeVar("Module", bound=nn.Module)
Betas = tuple[float, float]


class TrainingError(RuntimeError):
    """A training that went wrong, as one line for the user."""


def random_numbers(config: Config, stage: str) -> torch.Generator:
    """The random numbers of one stage: the same whether the stages before it ran or came from the cache."""
    digest = hashlib.sha256(f"{config.seed} {stage}".encode()).digest()
    return torch.Generator(config.device).manual_seed(int.from_bytes(digest[:7], "big"))


def initialised(config: Config, build: Callable[[], Module]) -> Module:
    """A module whose parameters depend on the seed alone; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build().to(config.device)


def batch(data: Data, count: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training images and classes, drawn with replacement."""
    index = torch.randint(len(data.train), (count,), generator=gen, device=gen.device)
    return data.train[index], data.train_labels[index]


def autocast(config: Config) -> torch.autocast:
    """The precision of the networks; the losses stay in float32."""
    kind = torch.device(config.device).type
    return torch.autocast(kind, getattr(torch, config.precision), enabled=config.precision != "float32")


class Optimizer:
    """Adam with a short warm-up, then linear decay to a tenth; in float16 with a GradScaler.

    Args:
        rates: the modules to train, each with its learning rate.
    """

    def __init__(self, rates: Sequence[tuple[nn.Module, float]], steps: int, betas: Betas, config: Config) -> None:
        self.steps, self.rates = steps, [rate for _, rate in rates]
        groups: list[dict[str, Any]] = [{"params": list(module.parameters())} for module, _ in rates]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        if config.cuda_graph:  # where the rates have to be read from the device
            for group in groups:
                group["lr"] = torch.tensor(0.0, device=config.device)
        self.adam = torch.optim.Adam(groups, betas=betas, fused=True, capturable=config.cuda_graph)
        self.scaler = torch.amp.GradScaler(torch.device(config.device).type, enabled=config.precision == "float16")

    def schedule(self, step: int) -> None:
        factor = min(1.0, (step + 1) / 50) * (1 - 0.9 * step / self.steps)
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * factor)
            else:
                group["lr"] = rate * factor

    def update(self, loss: Tensor) -> None:
        """Gradients for the own parameters alone, whatever else the loss came through."""
        self.adam.zero_grad()
        self.scaler.scale(loss).backward(inputs=self.parameters)
        self.scaler.step(self.adam)
        self.scaler.update()

    def state_dict(self) -> State:
        return {"adam": self.adam.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.adam.load_state_dict(state["adam"])
        for group in self.adam.param_groups:
            if isinstance(group["lr"], Tensor):  # on the CPU, where the file was read
                group["lr"] = group["lr"].to(self.parameters[0].device)
        self.scaler.load_state_dict(state["scaler"])


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """One step of an exponential moving average of the parameters; its memory is shorter at first."""
    rate = 1 - min(decay, (step + 1) / (step + 10))
    foreach_lerp_(list(average.parameters()), list(module.parameters()), rate)


class Training:
    """Something trained in steps. A subclass sets the attributes and defines ``update``.

    Attributes:
        stage: its name, in the log and the checkpoints.
        gen: its random numbers.
        parts: all else that a step changes, by name: modules and optimizers.
        records: what was logged so far.
    """

    stage: str
    steps: int
    gen: torch.Generator
    parts: dict[str, Any]

    def __init__(self, config: Config, data: Data) -> None:
        self.config, self.data = config, data
        self.records: list[Record] = []

    def update(self, step: int) -> Callable[[], dict[str, float]]:
        """One step. What it returns reads the losses from the device, "loss" among them, by one copy."""
        raise NotImplementedError

    def postfix(self, values: Record) -> dict[str, str]:
        """What the progress bar shows of a record."""
        return {"loss": f"{values['loss']:.3f}"}

    def state(self) -> State:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return {"parts": parts, "random": self.gen.get_state(), "records": self.records}

    def load(self, state: State) -> None:
        if set(state["parts"]) != set(self.parts):
            raise ValueError("it holds other networks")
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        self.gen.set_state(state["random"])
        self.records = list(state["records"])


def train(training: Training, checkpoints: Checkpoints, log: Log) -> None:
    """The steps that the newest checkpoint leaves. A record goes to the log every ``log_every`` steps; all state to a
    checkpoint every ``checkpoint_every``, at the end, and where a signal ends the training.

    Raises:
        TrainingError: where a loss is not finite.
        Interrupted: on Ctrl-C and SIGTERM to any rank, once everything is saved.
    """
    config, stage, steps = training.config, training.stage, training.steps
    first = _resume(training, checkpoints)
    log.repeat(stage, training.records)
    if ranks.is_main() and first:
        say(f"{stage}: " + (f"from {checkpoints.path(first)}" if first == steps else f"goes on after step {first}"))
    if first == steps:
        return
    with deferred() as signals, bar(stage, total=steps, first=first) as progress:
        for done in range(first + 1, steps + 1):
            read = training.update(done - 1)
            signal = ranks.largest(signals[0] if signals else 0)
            due = done % config.log_every == 0 or done == steps
            save = done % config.checkpoint_every == 0 or done == steps or signal
            if due or save:
                record = {"step": done} | ranks.combined(ranks.gathered(read()))
                if not math.isfinite(record["loss"]):
                    raise TrainingError(f"{stage}: the loss is {record['loss']} at step {done}")
            if due:
                training.records.append(record)
                log.write(stage, record)
                progress.set_postfix(training.postfix(record), refresh=False)
            if save and ranks.is_main():
                checkpoints.save(done, training.state())
            if signal:
                raise Interrupted(signal)
            progress.update()


def _resume(training: Training, checkpoints: Checkpoints) -> int:
    """The step of the newest checkpoint that fits, which every rank loads; 0 without one."""
    found = ranks.from_main(_newest(training, checkpoints) if ranks.is_main() else None)
    if found is None:
        return 0
    step, state = found
    training.load(state)
    return step


def _newest(training: Training, checkpoints: Checkpoints) -> tuple[int, State] | None:
    before = copy.deepcopy(training.state())
    for step, state in checkpoints.newest_first():
        try:
            if step > training.steps:
                raise ValueError(f"its step is beyond the last, {training.steps}")
            training.load(state)
        except Exception as error:  # whatever modules and optimizers say of a state that is not theirs
            checkpoints.refuse(checkpoints.path(step), error)
            training.load(before)
        else:
            checkpoints.stands_at(step)
            return step, state
    return None
