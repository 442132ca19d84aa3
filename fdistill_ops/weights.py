"""f-weights of a batch from discriminator logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import _checks, _composition
from ._options import WEIGHTS, WeightOptions, takes

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(WeightOptions, WEIGHTS)
def f_weights(logits: Tensor, t: Tensor | None = None, **options: Unpack[WeightOptions]) -> Tensor:
    """f-distill weights h(r) of a batch, from a discriminator's logits (f-distill, arXiv 2502.15681, Algorithm 1).

    Averages the heads, clips the log-ratio, divides by the histogram of the ratio over time, applies
    h(r) = f''(r) r^2 and divides by the batch mean.

    Args:
        logits: [B] or [B, ...] (K heads, or the map [B, 1, h, w] of a discriminator of patches; averaged): log density
            ratios log(teacher/student). Any floating dtype.
        t: [B] (or [B, 1, ...]), any real dtype: time of each sample, for the histogram, and only with one; clamped to
            its range. A NaN counts as a non-finite logit.
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
    return _composition.f_weights(*_checks.f_weights("f_weights", logits, t, {**options}))
