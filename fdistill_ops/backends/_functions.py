"""The functions of a back end with kernels (:class:`fdistill_ops.backends.Backend`), over its two entries, the loss and
the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._call import LossCall, LossResult, Needs, WeightCall, WeightResult, compute_dtype
from ..params import REDUCTIONS
from ..stats import FIELDS
from ._shared import in_dtype_of, mark_changed

_SAMPLE = REDUCTIONS["sample"]
Gradients = Sequence[Tensor | None]  # with respect to x, teacher, fake


class Results(NamedTuple):
    """What a kernel fills beside the gradients."""

    loss: Tensor
    scale: Tensor | None  # of float16 gradients
    stats: Tensor | None


class Functions:
    def gradient_like(self, x: Tensor) -> Tensor:
        """Uninitialised, with x's shape, dtype and (where they are dense) strides."""
        return torch.empty_like(x)

    def weight_arguments(self, call: WeightCall) -> tuple[Any, Tensor | None]:
        """The call as the entries take it; and the new histogram, which they fill."""
        raise NotImplementedError

    def compute_weights(self, arguments: Any, weights: Tensor, ratio_stats: Tensor) -> None:
        """Fills ``weights`` [B] and ``ratio_stats`` [3]."""
        raise NotImplementedError

    def compute_loss(self, call: LossCall, gradients: Gradients, results: Results, weight_arguments: Any) -> None:
        """Fills the gradients and the results. The weights are those of ``weight_arguments``, unless that is None."""
        raise NotImplementedError

    def run(self, call: LossCall, gradients: Gradients, weight_arguments: Any = None, scaled: bool = True) -> Results:
        """Runs the kernel. ``scaled``: whether float16 gradients are stored without a scale of their own."""
        x, params = call.operands.x, call.params
        dtype, device = call.operands.compute_dtype(), x.device
        loss = torch.empty(x.shape[:1] if params.reduction == _SAMPLE else (), dtype=dtype, device=device)
        scale = stats = None
        if scaled:
            for gradient in gradients:
                if gradient is not None and gradient.dtype is torch.float16:
                    scale = torch.empty(x.shape[:1], dtype=dtype, device=device)
                    break
        if params.need_stats:
            stats = torch.empty(len(FIELDS), dtype=dtype, device=device)
        results = Results(loss, scale, stats)
        self.compute_loss(call, gradients, results, weight_arguments)
        return results

    def f_weights(self, call: WeightCall) -> WeightResult:
        arguments, new_bins = self.weight_arguments(call)
        logits = call.logits
        weights = torch.empty(logits.shape[:1], dtype=compute_dtype(logits), device=logits.device)
        ratio_stats = torch.empty(3, dtype=torch.float64, device=logits.device)
        self.compute_weights(arguments, weights, ratio_stats)
        return WeightResult(weights, in_dtype_of(call.bins, new_bins), ratio_stats)

    def loss(self, call: LossCall, needs: Needs) -> LossResult:
        weights, arguments, new_bins = call.weights, None, None
        if weights is not None:
            arguments, new_bins = self.weight_arguments(weights)
        x, teacher, fake = call.operands[:3]
        gradients = (
            self.gradient_like(x) if needs[0] else None,
            self.gradient_like(teacher) if needs[1] else None,
            self.gradient_like(fake) if needs[2] else None,
        )
        results = self.run(call, gradients, arguments)
        bins = None if weights is None or new_bins is None else in_dtype_of(weights.bins, new_bins)
        return LossResult(results.loss, gradients, results.scale, results.stats, bins)

    def difference(self, call: LossCall, out: Tensor | None) -> Tensor:
        """g: the gradient of the sum (params.reduction)."""
        g = self.gradient_like(call.operands.x) if out is None else out
        self.run(call, (g, None, None), scaled=False)
        if out is not None:
            mark_changed(out)
        return g
