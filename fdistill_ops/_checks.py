"""Argument checks of the fused operations and the reference: each names the argument and what is wrong with it, and all
of them run before any kernel and before any state changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from . import histogram as histograms
from ._call import LossCall, Operands, WeightCall
from ._options import DIFFERENCE, F_DIFFERENCE, F_DISTILL, MATCHING, SCORE_IDENTITY, WEIGHTS, complete
from ._torch import is_zero
from ._validation import (
    FLOATS,
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
from .divergences import get_divergence
from .params import NORMALIZERS, PREDICTION_ALIASES, PREDICTIONS, REDUCTIONS, RULES, LossParams, WeightParams

_NONFINITE = {"propagate": False, "zero": True}


def _like(x: Tensor, *named: tuple[str, Any]) -> None:
    """Each is a floating tensor of x's shape, on its device."""
    shape, device, plain = x.shape, x.device, type(x) in PLAIN_TYPES
    for name, value in named:
        if (
            plain
            and type(value) in PLAIN_TYPES
            and value.dtype in FLOATS
            and value.layout is torch.strided
            and not value.is_nested
            and value.shape == shape
            and value.device == device
        ):
            continue
        floating(value, name)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but x has shape {tuple(shape)}")
        same_device(value, name, x, "x")


def prediction_name(value: Any) -> str:
    """The prediction by its own name: diffusers' names are known too."""
    if isinstance(value, str):
        value = PREDICTION_ALIASES.get(value, value)
        if value in PREDICTIONS:
            return value
    unknown(value, "prediction", (*PREDICTIONS, *PREDICTION_ALIASES))


def _max_norm(value: Any) -> float:
    limit = number(value, "max_norm")
    if limit <= 0.0:
        raise ValueError(f"max_norm must be above 0, got {shown(value)}")
    return limit


def _eps_and_zero(options: Mapping[str, Any]) -> tuple[float, bool]:
    """eps, and whether what is not finite becomes zero."""
    eps, nonfinite = options["eps"], options["nonfinite"]
    zero = _NONFINITE.get(nonfinite) if isinstance(nonfinite, str) else None
    if zero is None:
        unknown(nonfinite, "nonfinite", _NONFINITE)
    if type(eps) is not float or not 0.0 <= eps < math.inf:
        eps = number(eps, "eps", low=0.0)
    return eps, zero


def loss(
    function: str, x: Any, teacher: Any, fake: Any, options: dict[str, Any], backend: str | None = None
) -> LossCall:
    """The call of a distribution-matching loss. ``backend``: the one that is to serve it; None: what is chosen."""
    options = complete(function, options, MATCHING)
    return _matching(x, teacher, fake, options, options["reduction"], None, backend)


def difference(
    function: str, x: Any, teacher: Any, fake: Any, options: dict[str, Any], backend: str | None = None
) -> tuple[LossCall, Tensor | None]:
    """The call of a score difference, and where it goes."""
    options = complete(function, options, DIFFERENCE)
    call = _matching(x, teacher, fake, options, "sum", None, backend)
    return call, _output(options["out"], call)


def f_distill(
    function: str,
    x: Any,
    teacher: Any,
    fake: Any,
    logits: Any,
    t: Any,
    options: dict[str, Any],
    backend: str | None = None,
) -> LossCall:
    """The call of an f-distill loss."""
    options = complete(function, options, F_DISTILL)
    weights = _weights(logits, t, options)
    return _matching(x, teacher, fake, options, options["reduction"], weights, backend)


def f_difference(
    function: str,
    x: Any,
    teacher: Any,
    fake: Any,
    logits: Any,
    t: Any,
    options: dict[str, Any],
    backend: str | None = None,
) -> tuple[LossCall, Tensor | None]:
    """The call of a score difference with f-weights, and where it goes."""
    options = complete(function, options, F_DIFFERENCE)
    weights = _weights(logits, t, options)
    call = _matching(x, teacher, fake, options, "sum", weights, backend)
    return call, _output(options["out"], call)


def f_weights(
    function: str, logits: Any, t: Any, options: dict[str, Any], backend: str | None = None
) -> tuple[WeightCall, str]:
    """The call of f_weights, and the back end that serves it."""
    call = _weights(logits, t, complete(function, options, WEIGHTS))
    return call, chosen(call.logits, backend)


def score_identity(
    function: str, x: Any, teacher: Any, fake: Any, options: dict[str, Any], backend: str | None = None
) -> LossCall:
    """The call of a score-identity loss."""
    options = complete(function, options, SCORE_IDENTITY)
    alpha = number(options.pop("alpha"), "alpha")
    call = _matching(x, teacher, fake, {**MATCHING, **options}, options["reduction"], None, backend)
    params = call.params._replace(identity_alpha=alpha, rule=RULES["score_identity"])
    not_reduced = params.reduction == REDUCTIONS["none"]  # which no kernel does
    return call._replace(params=params, backend="reference" if not_reduced else call.backend)


def chosen(tensor: Tensor, backend: str | None) -> str:
    """The back end of a call with this tensor. Compiled code runs operators, which choose when they run."""
    if backend is not None:
        return backend
    return "operators" if torch.compiler.is_compiling() else backends.choose(tensor.device)


def _matching(
    x: Any,
    teacher: Any,
    fake: Any,
    options: dict[str, Any],
    reduction: Any,
    weights: WeightCall | None,
    backend: str | None,
) -> LossCall:
    # Here and in _like: what nearly every tensor is, without a call.
    if type(x) not in PLAIN_TYPES or x.dtype not in FLOATS or x.layout is not torch.strided or x.is_nested:
        floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have a batch dimension, got a tensor without dimensions")
    _like(x, ("teacher", teacher), ("fake", fake))
    weight, mask, normalizer = options["weight"], options["mask"], options["normalizer"]
    uncond, guidance = options["teacher_uncond"], options["guidance_scale"]
    x_t, alpha, sigma = options["x_t"], options["alpha"], options["sigma"]
    if weight is not None:
        weight = rows(weight, "weight", x)

    scale = 1.0
    if uncond is not None:
        _like(x, ("teacher_uncond", uncond))
        if guidance is None:
            raise ValueError("guidance_scale is missing: teacher_uncond needs a float or a tensor of shape [B]")
        if not isinstance(guidance, Tensor):
            scale, guidance = number(guidance, "guidance_scale"), None
        elif guidance.ndim == 0:
            guidance = rows(guidance, "guidance_scale", x)
        else:
            guidance = per_sample(guidance, "guidance_scale", x)
    elif guidance is not None:
        raise ValueError("teacher_uncond is missing: guidance_scale needs the unconditional prediction")
    if mask is not None:
        mask = _mask(mask, x)

    prediction = options["prediction"]
    if type(prediction) is not str or prediction != "x0":
        prediction = prediction_name(prediction)
    if prediction == "x0":
        if x_t is not None or alpha is not None or sigma is not None:
            name = "x_t" if x_t is not None else "alpha" if alpha is not None else "sigma"
            raise ValueError(f"{name} has no use with prediction='x0'")
    else:
        for name, value in (("x_t", x_t), ("alpha", alpha), ("sigma", sigma)):
            if value is None:
                raise ValueError(f"{name} is missing: prediction={prediction!r} needs x_t, alpha and sigma")
        _like(x, ("x_t", x_t))
        alpha, sigma = rows(alpha, "alpha", x), rows(sigma, "sigma", x)

    (eps, zero), rows_given = _eps_and_zero(options), None
    if isinstance(normalizer, Tensor):
        normalizer, rows_given = "tensor", per_sample(normalizer, "normalizer", x)
    elif normalizer is None:
        eps = 0.0  # the factor is the weight
    elif not (isinstance(normalizer, str) and normalizer == "mean_abs"):
        raise ValueError(f"normalizer must be 'mean_abs', None or a tensor [B]; got {shown(normalizer)}")
    if not (isinstance(reduction, str) and reduction in REDUCTIONS):
        unknown(reduction, "reduction", REDUCTIONS)
    need_stats = options.get("return_stats", False)
    params = LossParams(
        guidance_scale=scale,
        prediction=PREDICTIONS[prediction],
        normalizer=NORMALIZERS[normalizer],
        eps=eps,
        zero_nonfinite=zero,
        reduction=REDUCTIONS[reduction],
        need_stats=need_stats if need_stats is False else flag(need_stats, "return_stats"),
    )
    if weights is not None:
        if weights.logits.shape[0] != x.shape[0]:
            raise ValueError(f"logits has {weights.logits.shape[0]} samples, but x has shape {tuple(x.shape)}")
        if weights.logits.device != x.device or type(weights.logits) is not type(x):
            same_device(weights.logits, "logits", x, "x")
    limit = options["max_norm"]
    if limit is not None:
        limit = _max_norm(limit)
    operands = Operands(x, teacher, fake, weight, uncond, guidance, mask, x_t, alpha, sigma, rows_given)
    return LossCall(operands, params, chosen(x, backend), weights, limit)


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


def _weights(logits: Any, t: Any, options: dict[str, Any]) -> WeightCall:
    if (
        type(logits) not in PLAIN_TYPES
        or logits.dtype not in FLOATS
        or logits.layout is not torch.strided
        or logits.is_nested
    ):
        floating(logits, "logits")
    if logits.ndim == 0:
        raise ValueError("logits must have shape [B] or [B, ...], got a tensor without dimensions")
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits has no heads: shape {tuple(logits.shape)}")
    if logits.ndim > 2:  # the map of a discriminator of patches: its places are heads
        logits = call_named(lambda v: v.detach().flatten(1), {"logits": logits})
    divergence = get_divergence(options["divergence"])
    histogram, normalize, group = options["histogram"], options["normalize"], options["group"]
    if normalize is not None and not (isinstance(normalize, str) and normalize == "mean"):
        unknown(normalize, "normalize", ("mean", None))
    eps, zero = _eps_and_zero(options)
    low, high = _clip_bounds(options["logit_clip"], options["ratio_clip"])
    if t is not None:
        real(t, "t")
        if t.ndim == 0 or t.shape[0] != logits.shape[0] or t.numel() != logits.shape[0]:
            raise ValueError(f"t must have shape [{logits.shape[0]}], one time per sample, got {tuple(t.shape)}")
        if t.ndim > 1:
            t = call_named(lambda v: v.reshape(-1), {"t": t})
        same_device(t, "t", logits, "logits")
        if histogram is None:
            raise ValueError("t has no use without a histogram, and would be ignored: pass histogram=, or leave it out")
    bins, min_t, max_t, ema_rate = None, 0.0, 1.0, 0.0
    if histogram is not None:
        min_t, max_t, ema_rate = histograms.checked(histogram)
        if t is None:
            raise ValueError("t is missing: a histogram needs the time of every sample")
        bins = histogram.bins
        same_device(bins, "histogram", logits, "logits")
        if not histogram.training:
            ema_rate = 1.0  # this batch plays no part
    params = WeightParams(
        kind=divergence.kind if divergence.kind is not None else -1,
        a=divergence.a if divergence.a is not None else 0.0,
        low=low,
        high=high,
        min_t=min_t,
        max_t=max_t,
        ema_rate=ema_rate,
        normalize=normalize is not None,
        eps=eps,
        zero_nonfinite=zero,
    )
    return WeightCall(logits, t, bins, divergence, params, histogram, group)


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


def _output(out: Any, call: LossCall) -> Tensor | None:
    """out can take g: x's shape and dtype, no part of another input (except exactly that input)."""
    if out is None:
        return None
    x, inputs = call.operands.x, call.operands
    floating(out, "out")
    if out.shape != x.shape or out.dtype != x.dtype:
        want, got = (tuple(x.shape), x.dtype), (tuple(out.shape), out.dtype)
        raise ValueError(f"out must have x's shape and dtype {want}, got {got}")
    same_device(out, "out", x, "x")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires grad: pass out.detach()")
    if torch.compiler.is_compiling():  # g is then computed first and copied
        return out
    others = () if call.weights is None else call.weights.named().values()
    kinds = {type(value) for value in (*inputs, *others)} - {*PLAIN_TYPES, type(None)}
    if type(out) not in PLAIN_TYPES and any(not isinstance(out, kind) for kind in kinds):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise TypeError(f"out is a {type(out).__name__}, which cannot take what is computed from operands of {names}")
    if out.is_neg():
        raise ValueError("out is a lazily negated view: pass a tensor of its own")
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError("out is an inference tensor: it can be written in inference mode alone")
    if is_fake(out):
        return out
    if not has_memory(out):
        if is_zero(out) or (type(out) in PLAIN_TYPES and out.numel()):
            raise ValueError("out has no memory of its own to write to")
        return out  # nothing to write, or a wrapper, which knows where its memory is
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"out has elements that share memory: shape {tuple(out.shape)}, strides {out.stride()}")
        reach += (size - 1) * stride
    storage = out.untyped_storage().data_ptr()
    for value in inputs:
        if value is None or is_fake(value) or not has_memory(value) or _storage(value) != storage:
            continue
        same = value.data_ptr() == out.data_ptr() and value.stride() == out.stride() and value.dtype == out.dtype
        if not same and _spans_overlap(value, out):
            raise ValueError("out overlaps an input without being that input")
    return out


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
