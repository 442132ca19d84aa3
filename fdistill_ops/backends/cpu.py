"""The C++ back end for CPU tensors (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._checks import OptionalTensors, compute_dtype
from ..params import REDUCTIONS, LossParams, WeightParams
from ..stats import FIELDS

name = "cpu"

_C = _native.module()
_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.uint8: 5,
    torch.int8: 6,
    torch.int16: 7,
    torch.int32: 8,
    torch.int64: 9,
}
_CPU = torch.device("cpu")  # a name would be parsed in every call
_POOLED_BYTES = 1 << 20
_SAMPLE = REDUCTIONS["sample"]
_from_dlpack = torch._C._from_dlpack
_is_batched = torch._C._functorch.is_batchedtensor
_is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor


def _record(tensor: Tensor | None) -> tuple[int, int, tuple[int, ...], Tensor] | None:
    """(address, dtype, strides), and the tensor itself, which keeps the memory alive."""
    if tensor is None:
        return None
    if tensor.is_neg():  # a view whose memory holds the negated values
        tensor = tensor.resolve_neg()
    address = tensor.data_ptr()
    if address == 0 and tensor.numel() > 0:  # a zero tensor without memory, as automatic differentiation makes them
        tensor = tensor.clone()
        address = tensor.data_ptr()
    return address, _DTYPES[tensor.dtype], tensor.stride(), tensor


def _gradient_like(x: Tensor) -> Tensor:
    """Uninitialised, with x's shape, dtype and (where they are dense) strides. Large ones reuse the memory of earlier
    gradients: fresh memory costs more in page faults than the gradient takes to write."""
    bytes_ = x.numel() * x.itemsize
    if bytes_ < _POOLED_BYTES or not (x.is_contiguous() or _is_dense(x)):
        return torch.empty_like(x)
    return _from_dlpack(_C.pooled_empty(tuple(x.shape), x.stride(), _DTYPES[x.dtype], bytes_))


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in whatever order (channels_last, say)."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _weight_arguments(
    logits: Tensor, t: Tensor | None, bins: Tensor | None, params: WeightParams
) -> tuple[tuple[Any, ...], Tensor | None]:
    new_bins, bins_address, n_bins = None, 0, 0
    if bins is not None:
        bins = bins if bins.dtype == torch.float32 and bins.is_contiguous() else bins.float().contiguous()
        new_bins = torch.empty_like(bins)
        bins_address, n_bins = bins.data_ptr(), bins.numel()
    if t is not None and t.dtype not in _DTYPES:
        t = t.double()
    heads = logits.shape[1] if logits.ndim == 2 else 1
    new_address = 0 if new_bins is None else new_bins.data_ptr()
    arguments = (logits.shape[0], heads, _record(logits), _record(t), bins_address, n_bins, new_address, params)
    return (*arguments, bins), new_bins  # the last only to be kept alive


def f_weights(
    logits: Tensor, t: Tensor | None, bins: Tensor | None, params: WeightParams
) -> tuple[Tensor, Tensor | None, Tensor]:
    arguments, new_bins = _weight_arguments(logits, t, bins, params)
    weights = torch.empty(logits.shape[:1], dtype=compute_dtype(logits), device=_CPU)
    ratio_stats = torch.empty(3, dtype=torch.float64, device=_CPU)
    _C.f_weights(arguments, weights.data_ptr(), ratio_stats.data_ptr())
    return weights, _in_dtype_of(bins, new_bins), ratio_stats


def _in_dtype_of(bins: Tensor | None, new_bins: Tensor | None) -> Tensor | None:
    if bins is None or new_bins is None or bins.dtype == new_bins.dtype:
        return new_bins
    return new_bins.double().clamp(max=torch.finfo(bins.dtype).max).to(bins.dtype)


def _loss(
    inputs: Sequence[Tensor],
    tensors: OptionalTensors,
    params: LossParams,
    gradients: Sequence[Tensor | None],
    weight_arguments: tuple[Any, ...] | None,
    score_identity: bool,
    scaled: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Runs the kernel. The loss, the scale of float16 gradients (None without such), the statistics (None unless
    wanted)."""
    x, teacher, fake = inputs
    weight, uncond, guidance, mask, x_t, alpha, sigma, normalizer = tensors
    dtype = compute_dtype(x, teacher, fake, uncond, x_t)
    per_sample = params.reduction == _SAMPLE
    loss = torch.empty(x.shape[:1] if per_sample else (), dtype=dtype, device=_CPU)
    scale = stats = None
    if scaled and any(g is not None and g.dtype is torch.float16 for g in gradients):
        scale = torch.empty(x.shape[:1], dtype=dtype, device=_CPU)
    if params.need_stats:
        stats = torch.empty(len(FIELDS), dtype=dtype, device=_CPU)
    operands = (
        _record(x),
        _record(teacher),
        _record(fake),
        _record(uncond),
        _record(x_t),
        _record(mask),
        _record(weight),
        _record(alpha),
        _record(sigma),
        *[_record(gradient) for gradient in gradients],
    )
    _C.loss(
        tuple(x.shape),
        operands,
        _record(guidance),
        _record(normalizer),
        params,
        weight_arguments,
        score_identity,
        dtype is torch.float64,
        loss.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if stats is None else stats.data_ptr(),
        torch.get_num_threads(),
    )
    return loss, scale, stats


def distribution_matching(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    tensors: OptionalTensors,
    params: LossParams,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    gradient = _gradient_like(x) if need_grad else None
    loss, scale, stats = _loss((x, teacher, fake), tensors, params, (gradient, None, None), None, False)
    return loss, gradient, scale, stats


def difference(
    x: Tensor, teacher: Tensor, fake: Tensor, tensors: OptionalTensors, params: LossParams, out: Tensor | None
) -> Tensor:
    """g: the gradient of the sum (params.reduction)."""
    g = _gradient_like(x) if out is None else out
    _loss((x, teacher, fake), tensors, params, (g, None, None), None, False, scaled=False)
    return g


def f_distill(
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
    arguments, new_bins = _weight_arguments(logits, t, bins, weight_params)
    gradient = _gradient_like(x) if need_grad else None
    loss, scale, stats = _loss((x, teacher, fake), tensors, params, (gradient, None, None), arguments, False)
    return loss, gradient, scale, stats, _in_dtype_of(bins, new_bins)


def score_identity(
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
    gradients = [_gradient_like(tensor) if need else None for tensor, need in zip(inputs, need_grads, strict=True)]
    tensors = (weight, None, None, mask, None, None, None, normalizer)
    loss, scale, stats = _loss(inputs, tensors, params, gradients, None, True)
    return loss, *gradients, scale, stats


def scale_gradient(gradient: Tensor, scale: Tensor | None, upstream: Tensor, keep: bool) -> Tensor:
    """A saved gradient times the incoming one (0-dimensional or [B]): the saved tensor itself where the factor is 1
    and the graph is not kept, scaled in place where it is not 1, a new tensor where the graph is kept. ``scale`` [B]
    is what float16 gradients were stored without (csrc/cpu/loss.cpp). Reading the factor costs nothing: it is in
    host memory."""
    factor = upstream if scale is None or gradient.dtype is not torch.float16 else upstream * scale
    if _is_batched(factor) or _is_legacy_batched(factor):  # several incoming gradients at once
        return (gradient * factor.reshape(factor.shape + (1,) * (gradient.ndim - factor.ndim))).to(gradient.dtype)
    if factor.ndim == 0:
        number = factor.item()
        if number == 1.0:
            return gradient.clone() if keep else gradient
        return gradient * number if keep else gradient.mul_(number)
    if bool((factor == 1.0).all()):
        return gradient.clone() if keep else gradient
    rows = factor.reshape(factor.shape + (1,) * (gradient.ndim - 1))
    return (gradient * rows).to(gradient.dtype) if keep else gradient.mul_(rows)
