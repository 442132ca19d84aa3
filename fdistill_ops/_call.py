"""The records of a call: made by the checks (:mod:`fdistill_ops._checks`), taken by every layer below them. Numbers are
those of :mod:`fdistill_ops.params`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergences import Divergence
from .histogram import RatioHistogram
from .params import LossParams, WeightParams

Needs = tuple[bool, bool, bool]
"""Whether the derivative with respect to x, teacher and fake is wanted."""


class Operands(NamedTuple):
    """The tensors of a loss by the names of its arguments, in the order of the operators' schemas. The compiled modules
    name the order that they take them in."""

    x: Tensor  # [B, ...], the shape of all that say nothing else
    teacher: Tensor
    fake: Tensor
    weight: Tensor | None = None  # a leading part of x's shape
    teacher_uncond: Tensor | None = None
    guidance_scale: Tensor | None = None  # [B] or []
    mask: Tensor | None = None
    x_t: Tensor | None = None
    alpha: Tensor | None = None  # as weight
    sigma: Tensor | None = None
    normalizer: Tensor | None = None  # [B]

    # Methods: the dynamo of PyTorch 2.4 traces no property of a named tuple.

    def named(self) -> dict[str, Tensor | None]:
        return dict(zip(NAMES, self, strict=True))

    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.x, self.teacher, self.fake, self.teacher_uncond, self.x_t)


NAMES = Operands._fields


class WeightCall(NamedTuple):
    """What f-weights are made from."""

    logits: Tensor  # [B] or [B, K]
    t: Tensor | None  # [B]
    bins: Tensor | None  # [n], of the histogram
    divergence: Divergence
    params: WeightParams
    histogram: RatioHistogram | None = None
    group: object = None

    def named(self) -> dict[str, Tensor | None]:
        return {"logits": self.logits, "t": self.t, "histogram": self.bins}

    def record(self, bins: Tensor | None) -> None:
        """The histogram takes over what this batch made of it."""
        if self.histogram is not None:
            self.histogram.record(bins)


class WeightResult(NamedTuple):
    weights: Tensor  # [B]
    bins: Tensor | None  # the histogram after this batch; None or empty without one
    ratio_stats: Tensor  # [ratio mean, clipped low, clipped high], float64


class LossCall(NamedTuple):
    """A loss, or its score difference. ``backend``: the name of the one that serves it; "operators" while it is traced
    by torch.compile."""

    operands: Operands
    params: LossParams
    backend: str
    weights: WeightCall | None = None  # what operands.weight is made from
    max_norm: float | None = None


class LossResult(NamedTuple):
    """What a back end makes of a LossCall."""

    loss: Tensor
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]  # with respect to x, teacher, fake
    scale: Tensor | None  # [B], what float16 gradients are stored without
    stats: Tensor | None
    bins: Tensor | None = None  # as in WeightResult


def compute_dtype(*inputs: Tensor | None) -> torch.dtype:
    """The type of the arithmetic on these inputs, and of a loss: float64 where one of them is, else float32."""
    for tensor in inputs:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32
