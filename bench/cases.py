"""What is measured: one operation on one shape, with its options."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SHAPES: dict[str, tuple[int, ...]] = {
    "cifar10": (256, 3, 32, 32),
    "imagenet64": (64, 3, 64, 64),
    "sd15": (32, 4, 64, 64),
    "sdxl": (8, 4, 128, 128),
    "sd3/flux": (8, 16, 128, 128),
    "wan-video": (1, 16, 21, 60, 104),
}
"""Batches that people train with, by model."""

MODES = ("forward", "forward+backward")
HEADS = 4
"""Of the discriminator: logits are [B, HEADS]."""


@dataclass(frozen=True)
class Case:
    """One row group of the table: every contender is timed on it, on the same inputs.

    ``guidance`` is the teacher's scale, None for no guidance. ``warm`` times the same tensors again and again; without
    it the calls rotate over copies of the inputs that no cache holds together.
    """

    op: str
    shape: tuple[int, ...]
    name: str = ""
    mode: str = "forward+backward"
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    divergence: str = "js"
    guidance: float | None = None
    mask: bool = False
    histogram: bool = True
    warm: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        """N: the bytes of one tensor like x."""
        return self.elements * self.torch_dtype.itemsize

    @property
    def label(self) -> str:
        return self.name or ",".join(map(str, self.shape))


def shape_of(text: str) -> tuple[str, tuple[int, ...]]:
    """Name and shape from a name of SHAPES, part of one between slashes (``flux``), or numbers: ``8,4,64,64``.

    Raises:
        ValueError: it is neither.
    """
    for name, shape in SHAPES.items():
        if text in (name, *name.split("/")):
            return name, shape
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"must be one of {', '.join(SHAPES)}, or sizes such as 8,4,64,64; got {text!r}") from None
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"must be at least two sizes, all of them positive, got {text!r}")
    return "", sizes


def size_sweep(largest: int, itemsize: int) -> dict[str, tuple[int, ...]]:
    """Batches of 8 rows whose tensors have 1 KiB, 4 KiB, 16 KiB, ... up to the largest bytes."""
    sizes: dict[str, tuple[int, ...]] = {}
    bytes_ = 1024
    while bytes_ <= largest:
        sizes[size_name(bytes_)] = (8, bytes_ // itemsize // 8)
        bytes_ *= 4
    return sizes


def batch_sweep(largest: int, itemsize: int) -> dict[str, tuple[int, ...]]:
    """sd15's samples in batches of 1, 2, 4, ... 1024, as far as a tensor has no more than the largest bytes."""
    sample = SHAPES["sd15"][1:]
    batches = [2**k for k in range(11) if 2**k * math.prod(sample) * itemsize <= largest]
    return {f"batch {batch}": (batch, *sample) for batch in batches}


def size_name(bytes_: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if bytes_ < 1024:
            return f"{bytes_:.4g} {unit}"
        bytes_ /= 1024
    return f"{bytes_:.4g} GiB"
