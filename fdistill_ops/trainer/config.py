"""Every setting of a run, and the key under which what was trained with some of them is cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from .limits import Limits


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings; those that the command line does not offer were tuned on the digits."""

    data: str = "digits"  # a name in data.NAMES, or a path
    image_size: int | None = None  # to which images from a path are scaled and cropped
    max_pixels: int = Limits.pixels  # of one of them
    max_mib: int = Limits.mib  # of all of them
    hold_out: float = 0.25  # share of the images that is only compared with
    flip: bool = False  # mirror images are trained on too
    out: Path = Path("runs/digits")
    cache: Path = Path("runs/digits/cache")
    divergences: tuple[str, ...] = ("js", "reverse_kl")
    seed: int = 0
    threads: int = 1  # networks this small gain little from a second one, and lose all of it when the cores are shared
    device: str = "cpu"
    batch_size: int = 128  # of all ranks together
    precision: str = "float32"  # of the networks, by autocast; "bfloat16", or "float16" with a GradScaler
    compile: bool = False  # torch.compile of the distillation's losses
    cuda_graph: bool = False  # the student's update is captured
    checkpoint_every: int = 500  # steps
    ema: float = 0.98  # of the parameters, in every training

    width: int = 192  # hidden units of an MLP; a quarter of it are the channels of a U-Net
    depth: int = 4  # blocks of an MLP; a quarter of it are the layers of a U-Net at each resolution

    classifier_steps: int = 600
    classifier_lr: float = 1e-3
    classifier_batch: int = 128  # its own, so that batch_size does not change what judges the samples
    classifier_noise: float = 0.3

    teacher_steps: int = 2500
    teacher_lr: float = 2e-3
    noise_mean: float = -0.5  # of log(sigma), while the teacher is trained
    noise_std: float = 1.2
    sampler_steps: int = 18
    sigma_min: float = 0.02
    sigma_max: float = 20.0  # of the sampler, and of the noise that the student starts from

    distill_steps: int = 800
    student_steps: int = 1  # of the student's sampler
    guidance: float = 1.0  # scale of the teacher's classifier-free guidance; 1 is none
    fake_updates: int = 2  # updates of the fake score and the discriminator per update of the student
    student_lr: float = 1e-3
    fake_lr: float = 1e-3
    discriminator_lr: float = 1e-3
    gan_weight: float = 0.02
    distill_sigma_min: float = 0.1  # less is invisible: grey levels are 0.125 apart
    distill_sigma_max: float = 20.0
    ratio_bins: int = 10
    ratio_ema: float = 0.9

    evaluation_draws: int = 4  # of as many samples as images are held out
    evaluation_samples: int = 10_000  # in a draw at most
    mode_samples: int = 10**6  # at most, to count the modes by
    grid_columns: int = 10
    weight_samples: int = 4096
    gradient_batches: int = 32  # that the variance of a gradient is taken over
    log_every: int = 20

    @property
    def label_dropout(self) -> float:
        """How many of the teacher's training images have no class."""
        return 0.0 if self.guidance == 1 else 0.1

    def key(self, *names: str, **more: Any) -> str:
        """A hash of the named settings, of ``more``, and of what else decides every bit of a trained network."""
        always = {"format": 3, "torch": torch.__version__, "device": torch.device(self.device).type}
        named = {name: getattr(self, name) for name in ("seed", "threads", "precision", *names)}
        return hashlib.sha256(json.dumps(always | named | more, sort_keys=True).encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Any]:
        """What a report repeats: everything but the paths."""
        return {name: value for name, value in dataclasses.asdict(self).items() if not isinstance(value, Path)}


# Points in the plane: networks that fit in a cache, little noise, and more steps. gan_weight is DMD2's on ImageNet.
_POINTS: dict[str, Any] = {
    "width": 96,
    "depth": 3,
    "ema": 0.995,
    "teacher_steps": 4000,
    "noise_mean": -1.2,
    "noise_std": 1.4,
    "sigma_max": 5.0,
    "distill_steps": 2000,
    "student_lr": 5e-4,
    "gan_weight": 0.003,
    "distill_sigma_min": 0.03,
    "distill_sigma_max": 5.0,
}
# What was tuned on other data. Images of one's own get the settings of the patches.
DATA: dict[str, dict[str, Any]] = {
    "digits": {},
    "ring": _POINTS,
    "grid": _POINTS | {"width": 128, "teacher_steps": 6000, "teacher_lr": 3e-3},
    "patches": {  # where on a CPU every sample takes its time
        **{"width": 128, "batch_size": 32, "teacher_steps": 1500, "distill_steps": 250},
        **{"evaluation_draws": 2, "evaluation_samples": 250, "mode_samples": 1000, "weight_samples": 1024},
    },
}


def defaults(data: str, quick: bool = False) -> dict[str, Any]:
    """The settings for a data set, by name or path, that differ from Config's."""
    images = data not in DATA or data == "patches"
    return DATA["patches" if images else data] | (QUICK if quick else {}) | (QUICK_IMAGES if quick and images else {})


def shown(name: str) -> str:
    """A setting's default for --help: Config's, and that of each data set where it is another one."""
    default = getattr(Config, name)
    names = {"patches": "patches and own images"}
    others = [
        f"{names.get(data, data)}: {own[name]}" for data, own in DATA.items() if own.get(name, default) != default
    ]
    return "; ".join([str(default), *others])


# A run of few steps, to see that everything works; its samples are poor.
QUICK: dict[str, Any] = {
    "classifier_steps": 100,
    "teacher_steps": 150,
    "distill_steps": 30,
    "evaluation_draws": 2,
    "weight_samples": 1024,
    "gradient_batches": 8,
    "log_every": 5,
}
# Of images that may be large.
QUICK_IMAGES: dict[str, Any] = {
    **{"width": 32, "batch_size": 8, "teacher_steps": 30, "distill_steps": 5},
    **{"evaluation_draws": 1, "evaluation_samples": 32, "mode_samples": 200, "grid_columns": 4},
    **{"weight_samples": 256, "gradient_batches": 4},
}
