"""f-weights of a batch from discriminator logits, and the time-binned history of the density ratio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _ops, backends, reference
from .divergences import Divergence


class RatioHistogram(torch.nn.Module):
    """Running mean of the density ratio per time bin, which f_weights divides the ratios by.

    The noise levels differ in how far student and teacher are apart; without this division the weights would mostly say
    which t was drawn (f-distill, arXiv 2502.15681, section 3.3). In eval mode it is used and not updated.

    With ``ema_rate=0`` a bin is the mean of the current batch: a sample alone in its bin gets a ratio of about 1,
    whatever its logit, so that small batches lose their weights. Use an ``ema_rate`` of 0.9 or more there.

    Args:
        min_t, max_t: the range of t; times outside count in the first or last bin.
        bins: how many bins of equal width; or a floating tensor [n], for a histogram that another module keeps and
            saves: it becomes the buffer itself and is updated in place.
        ema_rate: weight of the past, in [0, 1].

    Attributes:
        bins: buffer [bins], float32 and ones at first, or the tensor given. Never non-finite: an entry that is, or is
            negative (from a checkpoint written elsewhere, say), counts as never filled.

    Raises:
        TypeError, ValueError: naming the argument: no number, min_t not below max_t, bins < 1 or not of shape [n],
            ema_rate outside [0, 1].
    """

    bins: Tensor

    def __init__(self, min_t: float, max_t: float, bins: int | Tensor = 10, ema_rate: float = 0.0) -> None:
        super().__init__()
        self.min_t, self.max_t = _checks.number(min_t, "min_t"), _checks.number(max_t, "max_t")
        if self.min_t >= self.max_t:
            raise ValueError(f"min_t must be below max_t, got {min_t!r} and {max_t!r}")
        if isinstance(bins, Tensor):
            if _checks.floating(bins, "bins").ndim != 1 or bins.numel() == 0:
                raise ValueError(f"bins must have shape [n], n at least 1, got {tuple(bins.shape)}")
            if bins.requires_grad:
                raise ValueError("bins requires grad: pass a buffer, or bins.detach()")
        elif isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise ValueError(f"bins must be a positive integer, got {bins!r}")
        self.ema_rate = _checks.number(ema_rate, "ema_rate", low=0.0)
        if self.ema_rate > 1.0:
            raise ValueError(f"ema_rate must be at most 1, got {ema_rate!r}")
        self.register_buffer("bins", bins if isinstance(bins, Tensor) else torch.ones(bins))

    def record(self, bins: Tensor | None) -> None:
        """Takes over the histogram a batch produced (in training mode)."""
        if self.training and bins is not None:
            self.bins.copy_(bins)

    def extra_repr(self) -> str:
        return f"{self.min_t:g}, {self.max_t:g}, bins={len(self.bins)}, ema_rate={self.ema_rate:g}"


def f_weights(
    logits: Tensor,
    t: Tensor | None = None,
    *,
    divergence: str | Divergence = "js",
    logit_clip: float | None = 10.0,
    ratio_clip: tuple[float, float] | None = (0.1, 20.0),
    histogram: RatioHistogram | None = None,
    normalize: str | None = "mean",
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    group: Any = None,
) -> Tensor:
    """f-distill weights h(r) of a batch, from a discriminator's logits (f-distill, arXiv 2502.15681, Algorithm 1).

    Averages the heads, clips the log-ratio, divides by the histogram of the ratio over time, applies
    h(r) = f''(r) r^2 and divides by the batch mean.

    Args:
        logits: [B] or [B, K] (K heads, averaged): log density ratios log(teacher/student). Any floating dtype.
        t: [B] (or [B, 1, ...]), any real dtype: time of each sample, for the histogram; clamped to its range. A NaN
            counts as a non-finite logit.
        divergence: name, alias or Divergence; see :data:`fdistill_ops.DIVERGENCES`.
        logit_clip: bound on abs(log-ratio); None for none.
        ratio_clip: (low, high) bounds on the ratio, applied after logit_clip; None for none.
        histogram: running mean of the ratio per time bin, updated with this batch (in training mode), then divided by.
        normalize: ``"mean"`` divides by the mean weight of the finite samples (+ eps); None does not.
        eps: added to what is divided by: the histogram's bin and the mean.
        nonfinite: a sample with a non-finite logit has a weight of NaN (``"propagate"``) or 0 (``"zero"``); it is left
            out of every count, sum and mean either way.
        group: a torch.distributed process group over whose ranks the histogram and the mean are taken; None: this
            process alone.

    Returns:
        [B], float32 (float64 for float64 logits), on the logits' device, detached.

    Raises:
        TypeError, ValueError: naming the argument that is wrong; the histogram has not changed then.
    """
    t, divergence, params = _checks.f_weights(
        logits, t, divergence, logit_clip, ratio_clip, histogram, normalize, eps, nonfinite
    )
    bins = None if histogram is None else histogram.bins
    if needs_stages(logits, divergence, group):
        weights, bins, _ = reference.staged_f_weights(logits, t, bins, divergence, params, reference.all_reduce(group))
    else:
        weights, bins, _ = _ops.f_weights(logits, t, bins, params)
    if histogram is not None:
        histogram.record(bins)
    return weights


def needs_stages(logits: Tensor, divergence: Divergence, group: Any) -> bool:
    """Whether the B log-ratios go through PyTorch: for a registered divergence, whose h is a Python function; for
    sums over several ranks, between which a collective stands; and on the reference back end. The pass over the
    samples is the back end's in any case."""
    return divergence.kind is None or reference.ranks(group) > 1 or backends.choose(logits.device) == "reference"
