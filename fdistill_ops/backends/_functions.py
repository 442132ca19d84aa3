"""The functions of a back end with kernels (:mod:`fdistill_ops.backends`), over its two entries, the loss and the
weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import OptionalTensors, compute_dtype
from ..params import REDUCTIONS, LossParams, WeightParams
from ..stats import FIELDS
from ._shared import in_dtype_of, mark_changed

_SAMPLE = REDUCTIONS["sample"]


class Functions:
    def gradient_like(self, x: Tensor) -> Tensor:
        """Uninitialised, with x's shape, dtype and (where they are dense) strides."""
        return torch.empty_like(x)

    def weight_arguments(
        self, logits: Tensor, t: Tensor | None, bins: Tensor | None, params: WeightParams
    ) -> tuple[Any, Tensor | None]:
        """These as the entries take them; and the new histogram, which they fill."""
        raise NotImplementedError

    def compute_weights(self, arguments: Any, weights: Tensor, ratio_stats: Tensor) -> None:
        """Fills ``weights`` [B] and ``ratio_stats`` [3]."""
        raise NotImplementedError

    def compute_loss(
        self,
        inputs: Sequence[Tensor],
        tensors: OptionalTensors,
        params: LossParams,
        gradients: Sequence[Tensor | None],
        results: tuple[Tensor, Tensor | None, Tensor | None],
        weight_arguments: Any,
        score_identity: bool,
    ) -> None:
        """Fills the gradients and the results: the loss, the scale of float16 gradients, the statistics. The weights
        are those of ``weight_arguments``, unless that is None."""
        raise NotImplementedError

    def _loss(
        self,
        inputs: Sequence[Tensor],
        tensors: OptionalTensors,
        params: LossParams,
        gradients: Sequence[Tensor | None],
        weight_arguments: Any = None,
        score_identity: bool = False,
        with_scale: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Runs the kernel. The loss, the scale of float16 gradients (None without such), the statistics (None unless
        wanted)."""
        x, teacher, fake = inputs
        _, uncond, _, _, x_t, *_ = tensors
        dtype, device = compute_dtype(x, teacher, fake, uncond, x_t), x.device
        per_sample = params.reduction == _SAMPLE
        loss = torch.empty(x.shape[:1] if per_sample else (), dtype=dtype, device=device)
        scale = stats = None
        if with_scale and any(g is not None and g.dtype is torch.float16 for g in gradients):
            scale = torch.empty(x.shape[:1], dtype=dtype, device=device)
        if params.need_stats:
            stats = torch.empty(len(FIELDS), dtype=dtype, device=device)
        results = (loss, scale, stats)
        self.compute_loss(inputs, tensors, params, gradients, results, weight_arguments, score_identity)
        return results

    def f_weights(
        self, logits: Tensor, t: Tensor | None, bins: Tensor | None, params: WeightParams
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        arguments, new_bins = self.weight_arguments(logits, t, bins, params)
        weights = torch.empty(logits.shape[:1], dtype=compute_dtype(logits), device=logits.device)
        ratio_stats = torch.empty(3, dtype=torch.float64, device=logits.device)
        self.compute_weights(arguments, weights, ratio_stats)
        return weights, in_dtype_of(bins, new_bins), ratio_stats

    def distribution_matching(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        tensors: OptionalTensors,
        params: LossParams,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        gradient = self.gradient_like(x) if need_grad else None
        loss, scale, stats = self._loss((x, teacher, fake), tensors, params, (gradient, None, None))
        return loss, gradient, scale, stats

    def difference(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        tensors: OptionalTensors,
        params: LossParams,
        out: Tensor | None,
    ) -> Tensor:
        """g: the gradient of the sum (params.reduction)."""
        g = self.gradient_like(x) if out is None else out
        self._loss((x, teacher, fake), tensors, params, (g, None, None), with_scale=False)
        if out is not None:
            mark_changed(out)
        return g

    def f_distill(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        logits: Tensor,
        t: Tensor | None,
        bins: Tensor | None,
        tensors: OptionalTensors,
        weight_params: WeightParams,
        params: LossParams,
        need_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        arguments, new_bins = self.weight_arguments(logits, t, bins, weight_params)
        gradient = self.gradient_like(x) if need_grad else None
        loss, scale, stats = self._loss((x, teacher, fake), tensors, params, (gradient, None, None), arguments)
        return loss, gradient, scale, stats, in_dtype_of(bins, new_bins)

    def score_identity(
        self,
        x: Tensor,
        teacher: Tensor,
        fake: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        normalizer: Tensor | None,
        params: LossParams,
        need_grads: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        inputs = (x, teacher, fake)
        gradients = [
            self.gradient_like(tensor) if need else None for tensor, need in zip(inputs, need_grads, strict=True)
        ]
        tensors = (weight, None, None, mask, None, None, None, normalizer)
        loss, scale, stats = self._loss(inputs, tensors, params, gradients, score_identity=True)
        return loss, *gradients, scale, stats
