"""Argument checks of the fused operations and the reference: each names the argument and what is wrong with it, and all
of them run before any kernel and before any state changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import histogram as histograms
from ._torch import is_zero
from ._validation import (
    PLAIN_TYPES,
    broadcasts,
    call_named,
    dense,
    flag,
    floating,
    has_memory,
    is_fake,
    number,
    per_sample,
    real,
    rows,
    same_device,
    shown,
    unknown,
)
from .divergences import Divergence, get_divergence
from .histogram import RatioHistogram
from .params import NORMALIZERS, PREDICTION_ALIASES, PREDICTIONS, REDUCTIONS, LossParams, WeightParams

_NONFINITE = {"propagate": False, "zero": True}

OptionalTensors = tuple[
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]
"""In the order of OPTIONAL_NAMES, which every layer keeps."""
OPTIONAL_NAMES = ("weight", "teacher_uncond", "guidance_scale", "mask", "x_t", "alpha", "sigma", "normalizer")
LOSS_NAMES = ("x", "teacher", "fake", *OPTIONAL_NAMES)


def named(x: Tensor, teacher: Tensor, fake: Tensor, tensors: OptionalTensors) -> dict[str, Tensor | None]:
    """The operands of a loss by the names of its arguments."""
    return dict(zip(LOSS_NAMES, (x, teacher, fake, *tensors), strict=True))


def compute_dtype(*inputs: Tensor | None) -> torch.dtype:
    """The type of the arithmetic on these inputs, and of a loss: float64 where one of them is, else float32."""
    for tensor in inputs:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def _like(value: Any, name: str, x: Tensor) -> Tensor:
    floating(value, name)
    if value.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but x has shape {tuple(x.shape)}")
    same_device(value, name, x, "x")
    return value


def nonfinite_rule(value: Any) -> bool:
    """True where non-finite values are to become zero."""
    zero = _NONFINITE.get(value) if isinstance(value, str) else None
    if zero is None:
        unknown(value, "nonfinite", _NONFINITE)
    return zero


def prediction_name(value: Any) -> str:
    """The prediction by its own name: diffusers' names are known too."""
    if isinstance(value, str):
        value = PREDICTION_ALIASES.get(value, value)
        if value in PREDICTIONS:
            return value
    unknown(value, "prediction", (*PREDICTIONS, *PREDICTION_ALIASES))


def max_norm(value: Any) -> float | None:
    if value is None:
        return None
    limit = number(value, "max_norm")
    if limit <= 0.0:
        raise ValueError(f"max_norm must be above 0, got {shown(value)}")
    return limit


def _eps(value: Any) -> float:
    if type(value) is float and 0.0 <= value < math.inf:
        return value
    return number(value, "eps", low=0.0)


def distribution_matching(
    x: Any,
    teacher: Any,
    fake: Any,
    weight: Any = None,
    teacher_uncond: Any = None,
    guidance_scale: Any = None,
    mask: Any = None,
    prediction: Any = "x0",
    x_t: Any = None,
    alpha: Any = None,
    sigma: Any = None,
    normalizer: Any = "mean_abs",
    eps: Any = 1e-6,
    nonfinite: Any = "propagate",
    reduction: Any = "mean",
    return_stats: Any = False,
    identity_alpha: float = 1.0,
) -> tuple[OptionalTensors, LossParams]:
    """Checks the arguments of a loss. Returns its optional tensors and its numbers."""
    floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have a batch dimension, got a tensor without dimensions")
    _like(teacher, "teacher", x)
    _like(fake, "fake", x)
    if weight is not None:
        weight = rows(weight, "weight", x)

    scale, scale_tensor = 1.0, None
    if teacher_uncond is not None:
        _like(teacher_uncond, "teacher_uncond", x)
        if guidance_scale is None:
            raise ValueError("guidance_scale is missing: teacher_uncond needs a float or a tensor of shape [B]")
        if not isinstance(guidance_scale, Tensor):
            scale = number(guidance_scale, "guidance_scale")
        elif guidance_scale.ndim == 0:
            scale_tensor = rows(guidance_scale, "guidance_scale", x)
        else:
            scale_tensor = per_sample(guidance_scale, "guidance_scale", x)
    elif guidance_scale is not None:
        raise ValueError("teacher_uncond is missing: guidance_scale needs the unconditional prediction")
    if mask is not None:
        mask = _mask(mask, x)

    prediction = prediction_name(prediction)
    given = (("x_t", x_t), ("alpha", alpha), ("sigma", sigma))
    if prediction != "x0":
        for name, value in given:
            if value is None:
                raise ValueError(f"{name} is missing: prediction={prediction!r} needs x_t, alpha and sigma")
        _like(x_t, "x_t", x)
        alpha, sigma = rows(alpha, "alpha", x), rows(sigma, "sigma", x)
    else:
        for name, value in given:
            if value is not None:
                raise ValueError(f"{name} has no use with prediction='x0'")

    eps, normalizer_tensor = _eps(eps), None
    if isinstance(normalizer, Tensor):
        normalizer, normalizer_tensor = "tensor", per_sample(normalizer, "normalizer", x)
    elif normalizer is None:
        eps = 0.0  # the factor is the weight
    elif not (isinstance(normalizer, str) and normalizer == "mean_abs"):
        raise ValueError(f"normalizer must be 'mean_abs', None or a tensor [B]; got {shown(normalizer)}")
    if not (isinstance(reduction, str) and reduction in REDUCTIONS):
        unknown(reduction, "reduction", REDUCTIONS)

    params = LossParams(
        scale,
        PREDICTIONS[prediction],
        NORMALIZERS[normalizer],
        eps,
        nonfinite_rule(nonfinite),
        REDUCTIONS[reduction],
        identity_alpha,
        flag(return_stats, "return_stats"),
    )
    return (weight, teacher_uncond, scale_tensor, mask, x_t, alpha, sigma, normalizer_tensor), params


def _mask(mask: Any, x: Tensor) -> Tensor:
    """As PyTorch broadcasts it, and [B] or another leading part of x's shape, as the other arguments; in x's shape."""
    if dense(mask, "mask").dtype is not torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    same_device(mask, "mask", x, "x")
    if mask.shape == x.shape:
        return mask
    leads = mask.shape == x.shape[: mask.ndim]
    if (leads and mask.ndim == 1) or (leads and not broadcasts(mask, x)):
        ones = (1,) * (x.ndim - mask.ndim)
        mask = call_named(lambda v: v.reshape(v.shape + ones), {"mask": mask})
    elif not broadcasts(mask, x):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, which does not broadcast to x's shape {tuple(x.shape)}")
    return call_named(lambda v: v.expand(x.shape), {"mask": mask})


class WeightCall(NamedTuple):
    """What the f-weights of a call are made from, checked."""

    logits: Tensor  # [B] or [B, K]
    t: Tensor | None  # [B]
    histogram: RatioHistogram | None
    divergence: Divergence
    params: WeightParams
    group: Any

    # Methods: the dynamo of PyTorch 2.4 traces no property of a named tuple.

    def bins(self) -> Tensor | None:
        return None if self.histogram is None else self.histogram.bins

    def named(self) -> dict[str, Tensor | None]:
        """The arguments whose type the weights have."""
        return {"logits": self.logits, "t": self.t}

    def record(self, bins: Tensor | None) -> None:
        """The histogram takes over what this batch made of it."""
        if self.histogram is not None:
            self.histogram.record(bins)


def f_weights(
    logits: Any,
    t: Any,
    divergence: Any,
    logit_clip: Any,
    ratio_clip: Any,
    histogram: RatioHistogram | None,
    normalize: Any,
    eps: Any,
    nonfinite: Any,
    group: Any = None,
) -> WeightCall:
    """Checks the arguments of f_weights but the group."""
    floating(logits, "logits")
    if logits.ndim == 0:
        raise ValueError("logits must have shape [B] or [B, ...], got a tensor without dimensions")
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits has no heads: shape {tuple(logits.shape)}")
    if logits.ndim > 2:  # the map of a discriminator of patches: its places are heads
        logits = call_named(lambda v: v.detach().flatten(1), {"logits": logits})
    divergence = get_divergence(divergence)
    if normalize is not None and not (isinstance(normalize, str) and normalize == "mean"):
        unknown(normalize, "normalize", ("mean", None))
    zero = nonfinite_rule(nonfinite)
    eps = _eps(eps)
    low, high = _clip_bounds(logit_clip, ratio_clip)
    if t is not None:
        real(t, "t")
        if t.ndim == 0 or t.shape[0] != logits.shape[0] or t.numel() != logits.shape[0]:
            raise ValueError(f"t must have shape [{logits.shape[0]}], one time per sample, got {tuple(t.shape)}")
        if t.ndim > 1:
            t = call_named(lambda v: v.reshape(-1), {"t": t})
        same_device(t, "t", logits, "logits")
        if histogram is None:
            raise ValueError("t has no use without a histogram, and would be ignored: pass histogram=, or leave it out")
    min_t, max_t, ema_rate = 0.0, 1.0, 0.0
    if histogram is not None:
        min_t, max_t, ema_rate = histograms.checked(histogram)
        if t is None:
            raise ValueError("t is missing: a histogram needs the time of every sample")
        same_device(histogram.bins, "histogram", logits, "logits")
        if not histogram.training:
            ema_rate = 1.0  # this batch plays no part
    params = WeightParams(
        divergence.kind if divergence.kind is not None else -1,
        divergence.a if divergence.a is not None else 0.0,
        low,
        high,
        min_t,
        max_t,
        ema_rate,
        normalize is not None,
        eps,
        zero,
    )
    return WeightCall(logits, t, histogram, divergence, params, group)


def _clip_bounds(logit_clip: Any, ratio_clip: Any) -> tuple[float, float]:
    """clamp to +-logit_clip, then to log ratio_clip: both as one pair of bounds on the log-ratio."""
    if type(logit_clip) is float and type(ratio_clip) is tuple and len(ratio_clip) == 2:
        low, high = ratio_clip
        if type(low) is type(high) is float and (logit_clip, low, high) == _DEFAULT_CLIPS:
            return _DEFAULT_BOUNDS
    limit = math.inf if logit_clip is None else number(logit_clip, "logit_clip", low=0.0, finite=False)
    if ratio_clip is None:
        return -limit, limit
    if not isinstance(ratio_clip, Sequence) or isinstance(ratio_clip, str | bytes) or len(ratio_clip) != 2:
        raise TypeError(f"ratio_clip must be a pair (low, high) or None, got {shown(ratio_clip)}")
    return _bounds(limit, *ratio_clip)


def _bounds(limit: float, ratio_low: Any, ratio_high: Any) -> tuple[float, float]:
    ratio_low = number(ratio_low, "ratio_clip[0]", low=0.0, finite=False)
    ratio_high = number(ratio_high, "ratio_clip[1]", low=0.0, finite=False)
    if ratio_low > ratio_high:
        raise ValueError(f"ratio_clip is reversed: its low {ratio_low:g} is above its high {ratio_high:g}")
    if ratio_high == 0.0 or ratio_low == math.inf:
        raise ValueError(f"ratio_clip must leave some finite positive ratio, got ({ratio_low:g}, {ratio_high:g})")
    low = math.log(ratio_low) if ratio_low > 0 else -math.inf
    high = math.log(ratio_high)
    return min(max(-limit, low), high), max(min(limit, high), low)


_DEFAULT_CLIPS = (10.0, 0.1, 20.0)
_DEFAULT_BOUNDS = _bounds(*_DEFAULT_CLIPS)


def same_batch(logits: Tensor, x: Tensor) -> None:
    if logits.shape[0] != x.shape[0]:
        raise ValueError(f"logits has {logits.shape[0]} samples, but x has shape {tuple(x.shape)}")
    same_device(logits, "logits", x, "x")


def output(out: Any, x: Tensor, *inputs: Tensor | None, call: WeightCall | None = None) -> None:
    """out can take g: x's shape and dtype, no part of another input (except exactly that input). ``call``: what g's
    weights are made from."""
    floating(out, "out")
    if out.shape != x.shape or out.dtype != x.dtype:
        want, got = (tuple(x.shape), x.dtype), (tuple(out.shape), out.dtype)
        raise ValueError(f"out must have x's shape and dtype {want}, got {got}")
    same_device(out, "out", x, "x")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires grad: pass out.detach()")
    if torch.compiler.is_compiling():  # g is then computed first and copied
        return
    others = () if call is None else (call.logits, call.t, call.bins())
    kinds = {type(value) for value in (x, *inputs, *others)} - {*PLAIN_TYPES, type(None)}
    if type(out) not in PLAIN_TYPES and any(not isinstance(out, kind) for kind in kinds):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"out is a {type(out).__name__}, which cannot take what is computed from operands of {names}")
    if out.is_neg():
        raise ValueError("out is a lazily negated view: pass a tensor of its own")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out is an inference tensor: it can be written in inference mode alone")
    if is_fake(out):
        return
    if not has_memory(out):
        if is_zero(out) or (type(out) in PLAIN_TYPES and out.numel()):
            raise ValueError("out has no memory of its own to write to")
        return  # nothing to write, or a wrapper, which knows where its memory is
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"out has elements that share memory: shape {tuple(out.shape)}, strides {out.stride()}")
        reach += (size - 1) * stride
    storage = out.untyped_storage().data_ptr()
    for value in (x, *inputs):
        if value is None or is_fake(value) or not has_memory(value) or _storage(value) != storage:
            continue
        same = value.data_ptr() == out.data_ptr() and value.stride() == out.stride() and value.dtype == out.dtype
        if not same and _spans_overlap(value, out):
            raise ValueError("out overlaps an input without being that input")


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # it has none of its own
        return 0


def _spans_overlap(a: Tensor, b: Tensor) -> bool:
    def span(tensor: Tensor) -> tuple[int, int]:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        return start, start + (reach + 1) * tensor.element_size()

    (a_start, a_end), (b_start, b_end) = span(a), span(b)
    return a_start < b_end and b_start < a_end
