"""The f-distill loss as a module that holds its histogram."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import _checks
from ._options import FDistillOptions
from .divergences import Divergence, get_divergence
from .histogram import RatioHistogram
from .losses import f_distill_loss
from .stats import LossStats
from .weights import f_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FDistillLoss(torch.nn.Module):
    """:func:`fdistill_ops.f_distill_loss` with its settings and its :class:`~fdistill_ops.RatioHistogram`.

    Under torch.distributed the histogram and the mean weight are taken over all ranks, as in SyncBatchNorm; in eval
    mode the histogram is used and not updated, and the ranks only share the mean.

    Args:
        divergence, logit_clip, ratio_clip, normalize, eps, nonfinite, normalizer, reduction: as in
            :func:`fdistill_ops.f_distill_loss`.
        histogram: a RatioHistogram, or None for none. Its buffer is part of this module's state.
        process_group: ranks to reduce over; None: all, where torch.distributed is initialised.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    def __init__(
        self,
        divergence: str | Divergence = "js",
        *,
        histogram: RatioHistogram | None = None,
        logit_clip: float | None = 10.0,
        ratio_clip: tuple[float, float] | None = (0.1, 20.0),
        normalize: str | None = "mean",
        normalizer: str | None = "mean_abs",
        eps: float = 1e-6,
        nonfinite: str = "propagate",
        reduction: str = "mean",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(normalizer, Tensor):
            raise TypeError("normalizer must be 'mean_abs' or None here; pass a tensor [B] to the call")
        if histogram is not None and not isinstance(histogram, RatioHistogram):
            raise TypeError(f"histogram must be a RatioHistogram, got {type(histogram).__name__}")
        self.divergence = get_divergence(divergence)
        self.histogram = histogram
        self.process_group = process_group
        self.settings: dict[str, Any] = {
            "logit_clip": logit_clip,
            "ratio_clip": ratio_clip,
            "normalize": normalize,
            "normalizer": normalizer,
            "eps": eps,
            "nonfinite": nonfinite,
            "reduction": reduction,
        }
        probe, settings = torch.zeros(1), {"divergence": divergence, **self.settings}
        _checks.f_distill("FDistillLoss", *(probe,) * 4, None, settings, "reference")  # which serves any device

    @overload
    def forward(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        logits: Tensor,
        t: Tensor | None = ...,
        *,
        return_stats: Literal[False] = ...,
        **arguments: Unpack[FDistillOptions],
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        logits: Tensor,
        t: Tensor | None = ...,
        *,
        return_stats: Literal[True],
        **arguments: Unpack[FDistillOptions],
    ) -> tuple[Tensor, LossStats]: ...
    def forward(
        self, x: Tensor, teacher: Tensor, fake: Tensor, logits: Tensor, t: Tensor | None = None, **arguments: Any
    ) -> Any:
        """The loss; ``arguments`` are the remaining ones of :func:`fdistill_ops.f_distill_loss` (weight, guidance,
        mask, prediction, return_stats), or override a setting."""
        return f_distill_loss(
            x,
            teacher,
            fake,
            logits,
            t,
            **{"divergence": self.divergence, "histogram": self.histogram, **self.settings, **arguments},
            group=self._group(),
        )

    if TYPE_CHECKING:
        __call__ = forward

    def weights(self, logits: Tensor, t: Tensor | None = None) -> Tensor:
        """The weights [B] that forward would use: :func:`fdistill_ops.f_weights` with this module's settings. In
        training mode the histogram is updated, as by forward."""
        names = ("logit_clip", "ratio_clip", "normalize", "eps", "nonfinite")
        return f_weights(
            logits,
            t,
            divergence=self.divergence,
            histogram=self.histogram,
            group=self._group(),
            **{name: self.settings[name] for name in names},
        )

    def _group(self) -> Any:
        if self.process_group is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.group.WORLD
        return self.process_group

    def extra_repr(self) -> str:
        return ", ".join([repr(self.divergence), *(f"{key}={value!r}" for key, value in self.settings.items())])
