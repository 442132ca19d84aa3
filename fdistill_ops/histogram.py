"""The time-binned history of the density ratio."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._validation import floating, number, positive_integer, shown

MAX_BINS = 1 << 20  # a bin and more for each step of any schedule


class RatioHistogram(torch.nn.Module):
    """Running mean of the density ratio per time bin, which f_weights divides the ratios by.

    The noise levels differ in how far student and teacher are apart; without this division the weights would mostly say
    which t was drawn (f-distill, arXiv 2502.15681, section 3.3). In eval mode it is used and not updated.

    With ``ema_rate=0`` a bin is the mean of the current batch: a sample alone in its bin gets a ratio of about 1,
    whatever its logit, so that small batches lose their weights.

    Args:
        min_t, max_t: the range of t; times outside count in the first or last bin.
        bins: how many bins of equal width; or a floating tensor [n], for a histogram that another module keeps and
            saves: it becomes the buffer itself and is updated in place.
        ema_rate: weight of the past, in [0, 1].

    Attributes:
        min_t, max_t, ema_rate: may be changed; each call checks them.
        bins: buffer [bins], float32 and ones at first, or the tensor given. Never non-finite: an entry that is, or is
            negative (from a checkpoint written elsewhere, say), counts as never filled.

    Raises:
        TypeError, ValueError: naming the argument: no number, min_t not below max_t, bins < 1 or not of shape [n],
            ema_rate outside [0, 1].
    """

    bins: Tensor

    def __init__(self, min_t: float, max_t: float, bins: int | Tensor = 10, ema_rate: float = 0.9) -> None:
        super().__init__()
        self.min_t, self.max_t, self.ema_rate = _settings(min_t, max_t, ema_rate)
        if isinstance(bins, Tensor):
            _check_bins(bins, "bins")
        else:
            bins = torch.ones(positive_integer(bins, "bins", MAX_BINS))
        self.register_buffer("bins", bins)

    def record(self, bins: Tensor | None) -> None:
        """Takes over the histogram a batch produced (in training mode)."""
        if self.training and bins is not None:
            self.bins.copy_(bins)

    def extra_repr(self) -> str:
        return f"{self.min_t:g}, {self.max_t:g}, bins={len(self.bins)}, ema_rate={self.ema_rate:g}"


def checked(histogram: Any) -> tuple[float, float, float]:
    """min_t, max_t and ema_rate of a histogram as it is now: its attributes may have been set since it was made.

    Raises:
        TypeError, ValueError: it is none, or an attribute is wrong; the message names it.
    """
    if not isinstance(histogram, RatioHistogram):
        raise TypeError(f"histogram must be a RatioHistogram, got {type(histogram).__name__}")
    _check_bins(histogram.bins, "histogram.bins")
    min_t, max_t, ema_rate = histogram.min_t, histogram.max_t, histogram.ema_rate
    if (
        type(min_t) is type(max_t) is type(ema_rate) is float
        and -math.inf < min_t < max_t < math.inf
        and 0.0 <= ema_rate <= 1.0
    ):
        return min_t, max_t, ema_rate
    return _settings(min_t, max_t, ema_rate, "histogram.")


def _settings(min_t: Any, max_t: Any, ema_rate: Any, prefix: str = "") -> tuple[float, float, float]:
    low, high = number(min_t, f"{prefix}min_t"), number(max_t, f"{prefix}max_t")
    if low >= high:
        raise ValueError(f"{prefix}min_t must be below max_t, got {shown(min_t)} and {shown(max_t)}")
    if high - low == math.inf:
        raise ValueError(f"{prefix}max_t is too far from min_t, got {shown(min_t)} and {shown(max_t)}")
    rate = number(ema_rate, f"{prefix}ema_rate", low=0.0)
    if rate > 1.0:
        raise ValueError(f"{prefix}ema_rate must be at most 1, got {shown(ema_rate)}")
    return low, high, rate


def _check_bins(bins: Any, name: str) -> None:
    if floating(bins, name).ndim != 1 or not 1 <= bins.numel() <= MAX_BINS:
        raise ValueError(f"{name} must have shape [n], n from 1 to {MAX_BINS:,}, got {tuple(bins.shape)}")
    if bins.requires_grad:
        raise ValueError(f"{name} requires grad: pass a buffer, or bins.detach()")
