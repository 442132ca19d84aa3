"""What a finished run has trained: ``fdistill-train sample`` draws from it, ``fdistill-train export`` writes its
weights to files that need nothing of this trainer but its networks."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import device_name, integer
from . import edm, figures
from .checkpoints import Checkpoints
from .config import Config
from .data import Data
from .distill import guided, student_levels, student_samples
from .evaluate import in_batches
from .files import reason, say, to_json, whole_file, write_text
from .mixtures import MIXTURES
from .networks import Denoiser
from .training import TrainingError

NAME = "models.json"  # in the folder of a finished run
SHOWN = 100  # samples in the picture


def write(config: Config, data: Data, checkpoints: dict[str, Checkpoints]) -> None:
    """Says where a finished run's networks are, and how they were made: what ``Run`` reads."""
    out, cache = config.out.resolve(), config.cache.resolve()
    network = {"shape": data.shape, "classes": data.classes, "width": config.width, "depth": config.depth}
    content = {
        "network": network | {"sigma_data": data.sigma_data},
        "cache": str(cache.relative_to(out) if cache.is_relative_to(out) else cache),
        "models": {name: {"stage": one.stage, "key": one.key} for name, one in checkpoints.items()},
        "settings": config.settings(),
    }
    write_text(config.out / NAME, to_json(content, indent=1) + "\n")


@dataclass(frozen=True)
class Run:
    """A finished run, from its folder.

    Attributes:
        network: the arguments of its Denoisers.
        models: "teacher", and the divergence of every student.
    """

    config: Config
    network: dict[str, Any]
    models: dict[str, dict[str, str]]

    @classmethod
    def read(cls, folder: Path, device: str) -> Run:
        """Raises TrainingError where the folder is not one of a finished run."""
        try:
            content = json.loads((folder / NAME).read_text(encoding="utf-8"))
            settings = content["settings"] | {"device": device, "out": folder, "cache": folder / content["cache"]}
            return cls(Config(**settings), content["network"], content["models"])
        except FileNotFoundError:
            what = "no such folder" if not folder.is_dir() else f"no finished run's: it has no {NAME}"
            raise TrainingError(f"{folder}: {what}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"{folder / NAME}: cannot be used: {reason(error)}") from None

    def parts(self, name: str) -> dict[str, Any]:
        """The state of a training at its end."""
        if name not in self.models:
            raise TrainingError(f"{name!r} is not in {self.config.out}, which has {', '.join(self.models)}")
        checkpoints = Checkpoints(self.config.cache, **self.models[name])
        for _, state in checkpoints.newest_first():
            return state["parts"]
        raise TrainingError(f"{self.config.cache}: no checkpoint of {name} is left")

    def sampler(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        """Samples from unit noise and classes, by the moving average of the parameters."""
        config, parts = self.config, self.parts(name)
        model = Denoiser(**self.network).requires_grad_(False)
        model.load_state_dict(parts["average"])
        model.to(config.device)
        if name != "teacher":
            return lambda noise, labels: student_samples(model, config, noise, labels)
        limits = (config.sampler_steps, config.sigma_min, config.sigma_max)
        return lambda noise, labels: edm.heun(guided(model, config), noise, labels, *limits)


def sample(argv: Sequence[str]) -> Callable[[], None]:
    """What ``fdistill-train sample`` is asked to do."""
    parser = argparse.ArgumentParser("fdistill-train sample", description="Draws samples from a finished run.")
    add = _common(parser)
    add("--count", type=integer(1, 10**7), default=SHOWN, help="samples (default: %(default)s)")
    add("--seed", type=integer(0, 2**32), default=0, help="of their noise (default: %(default)s)")
    add(
        "--classes",
        type=_classes,
        help="comma-separated numbers; sample k has the k-th of them, in turn (default: all)",
    )
    add("--out", type=Path, help="file to write, .npy; a picture goes beside it (default: RUN/samples-MODEL.npy)")
    wanted = parser.parse_args(argv)
    out = wanted.out or wanted.run / f"samples-{_file_name(wanted.model)}.npy"
    if out.suffix != ".npy":
        parser.error(f"argument --out: must end in .npy, got {str(out)!r}")
    return lambda: _sample(wanted, out)


def _sample(wanted: argparse.Namespace, out: Path) -> None:
    run = Run.read(wanted.run, wanted.device)
    config, shape = run.config, tuple(run.network["shape"])
    classes = torch.tensor(wanted.classes or range(run.network["classes"]), device=config.device)
    if int(classes.max()) >= run.network["classes"]:
        raise TrainingError(
            f"--classes: there is no class {int(classes.max())}; they end at {run.network['classes'] - 1}"
        )
    sampler = run.sampler(wanted.model)
    labels = classes.repeat(-(-wanted.count // len(classes)))[: wanted.count]
    noise = edm.normal((wanted.count, *shape), torch.Generator(config.device).manual_seed(wanted.seed))
    samples = in_batches(sampler, noise, labels, stage="sampling").cpu()
    with whole_file(out) as file:
        np.save(file, samples.numpy())
    mixture = MIXTURES[config.data]() if config.data in MIXTURES else None
    shown, columns = samples[:SHOWN] if mixture is None else samples, min(config.grid_columns, len(samples))
    if mixture is None:
        shown = figures.filled(shown, -(-len(shown) // columns) * columns).unflatten(0, (-1, columns))
    figures.samples_png(out.with_suffix(".png"), shown, mixture)
    say(f"samples: {out}, {out.with_suffix('.png')}")


def export(argv: Sequence[str]) -> Callable[[], None]:
    """What ``fdistill-train export`` is asked to do."""
    parser = argparse.ArgumentParser(
        "fdistill-train export",
        description="Writes a network's weights as state dicts: MODEL.safetensors is the moving average, which the "
        "report is about, MODEL-last.safetensors the parameters after the last step; MODEL.json says how to build the "
        "network.",
    )
    add = _common(parser)
    add("--out", type=Path, help="folder to write to (default: RUN/export)")
    wanted = parser.parse_args(argv)
    return lambda: _export(wanted, wanted.out or wanted.run / "export")


def _export(wanted: argparse.Namespace, out: Path) -> None:
    try:
        from safetensors.torch import save
    except ImportError:
        raise TrainingError("export needs safetensors; pip install 'fdistill_ops[trainer]'") from None
    run = Run.read(wanted.run, wanted.device)
    parts, name = run.parts(wanted.model), _file_name(wanted.model)
    out.mkdir(parents=True, exist_ok=True)
    levels = None if wanted.model == "teacher" else student_levels(run.config)
    content = {"model": wanted.model, "network": run.network, "levels": levels, "settings": run.config.settings()}
    for part, suffix in (("average", ""), ("model" if wanted.model == "teacher" else "student", "-last")):
        weights = save({key: value.contiguous() for key, value in parts[part].items()})
        with whole_file(out / f"{name}{suffix}.safetensors") as file:
            file.write(weights)
    write_text(out / f"{name}.json", to_json(content, indent=1) + "\n")
    say(f"weights: {out / name}.safetensors; how to build the network: {out / name}.json")


def _common(parser: argparse.ArgumentParser) -> Callable[..., Any]:
    parser.add_argument("run", type=Path, metavar="RUN", help="the output folder of a finished run")
    what = "teacher, or a student by its divergence"
    parser.add_argument("--model", required=True, help=what)
    parser.add_argument("--device", type=device_name, default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    return parser.add_argument


def _classes(text: str) -> list[int]:
    return [integer(0, 2**31)(part.strip()) for part in text.split(",")]


def _file_name(model: str) -> str:
    return re.sub(r"[^a-zA-Z0-9.-]+", "_", model)
