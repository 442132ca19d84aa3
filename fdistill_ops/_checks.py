"""Argument checks shared by the fused operations and the reference: each names the argument and what is wrong with it,
and all of them run before any kernel and before any state changes."""

from __future__ import annotations

import math
import numbers
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .divergences import Divergence, get_divergence
from .params import NORMALIZERS, PREDICTIONS, REDUCTIONS, LossParams, WeightParams

if TYPE_CHECKING:
    from .weights import RatioHistogram

FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
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
"""weight, teacher_uncond, guidance_scale, mask, x_t, alpha, sigma, normalizer: the order every layer keeps."""


def compute_dtype(*inputs: Tensor | None) -> torch.dtype:
    """The type of the arithmetic on these inputs, and of a loss: float64 where one of them is, else float32."""
    for tensor in inputs:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def dense(value: Any, name: str) -> Tensor:
    """A strided, non-distributed tensor, or a TypeError that names the argument."""
    if type(value) not in _PLAIN_TYPES:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if any(base.__name__ == "DTensor" for base in type(value).__mro__):
            raise TypeError(f"{name} is a DTensor, which is not supported: pass {name}.to_local()")
    if value.layout is not torch.strided or value.is_nested:
        kind = "is nested" if value.is_nested else f"has the layout {value.layout}"
        raise TypeError(f"{name} {kind}, which is not supported: pass a dense, strided tensor ({name}.to_dense())")
    return value


def floating(value: Any, name: str) -> Tensor:
    if dense(value, name).dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    return value


def _same_device(value: Tensor, name: str, x: Tensor, x_name: str) -> None:
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, but {x_name} is on {x.device}")


def _like(value: Any, name: str, x: Tensor) -> Tensor:
    floating(value, name)
    if value.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but x has shape {tuple(x.shape)}")
    _same_device(value, name, x, "x")
    return value


def leading(value: Any, name: str, x: Tensor, x_name: str = "x") -> Tensor:
    """A number, or a tensor whose shape is a leading part of x's."""
    if isinstance(value, numbers.Real):
        return torch.full((), float(value), dtype=torch.float64, device=x.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    floating(value, name)
    if value.shape != x.shape[: value.ndim]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which is no leading part of {x_name}'s shape {tuple(x.shape)}"
        )
    _same_device(value, name, x, x_name)
    return value


def number(value: Any, name: str, *, low: float = -math.inf, finite: bool = True) -> float:
    try:
        result = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not (-math.inf < result < math.inf if finite else -math.inf <= result <= math.inf):  # comparisons alone trace
        raise ValueError(f"{name} must be {'finite' if finite else 'a number'}, got {value!r}")
    if result < low:
        raise ValueError(f"{name} must be at least {low:g}, got {value!r}")
    return result


def _unknown(value: Any, name: str, known: Any) -> NoReturn:
    raise ValueError(f"{name} must be one of {', '.join(repr(k) for k in known)}; got {value!r}")


def nonfinite_rule(value: Any) -> bool:
    """True where non-finite values are to become zero."""
    zero = _NONFINITE.get(value) if isinstance(value, str) else None
    if zero is None:
        _unknown(value, "nonfinite", _NONFINITE)
    return zero


def prediction_code(value: Any) -> int:
    code = PREDICTIONS.get(value) if isinstance(value, str) else None
    if code is None:
        _unknown(value, "prediction", PREDICTIONS)
    return code


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
        weight = leading(weight, "weight", x)

    scale, scale_tensor = 1.0, None
    if teacher_uncond is not None:
        _like(teacher_uncond, "teacher_uncond", x)
        if guidance_scale is None:
            raise ValueError("guidance_scale is missing: teacher_uncond needs a float or a tensor of shape [B]")
        if isinstance(guidance_scale, Tensor):
            scale_tensor = leading(guidance_scale, "guidance_scale", x)
            if scale_tensor.ndim > 1:
                raise ValueError(f"guidance_scale must be a float or of shape [B], got {tuple(scale_tensor.shape)}")
        else:
            scale = number(guidance_scale, "guidance_scale")
    elif guidance_scale is not None:
        raise ValueError("teacher_uncond is missing: guidance_scale needs the unconditional prediction")

    if mask is not None:
        dense(mask, "mask")
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.shape != x.shape:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, but x has shape {tuple(x.shape)}; "
                "mask.expand_as(x) costs no memory"
            )
        _same_device(mask, "mask", x, "x")

    code = PREDICTIONS.get(prediction) if isinstance(prediction, str) else None
    if code:
        for name, value in (("x_t", x_t), ("alpha", alpha), ("sigma", sigma)):
            if value is None:
                raise ValueError(f"{name} is missing: prediction={prediction!r} needs x_t, alpha and sigma")
        _like(x_t, "x_t", x)
        alpha, sigma = leading(alpha, "alpha", x), leading(sigma, "sigma", x)
    else:
        prediction_code(prediction)
        for name, value in (("x_t", x_t), ("alpha", alpha), ("sigma", sigma)):
            if value is not None:
                raise ValueError(f"{name} has no use with prediction='x0'")

    normalizer_tensor = None
    if isinstance(normalizer, Tensor):
        normalizer_tensor = floating(normalizer, "normalizer")
        if normalizer.shape != x.shape[:1]:
            raise ValueError(f"normalizer must have shape {tuple(x.shape[:1])}, got {tuple(normalizer.shape)}")
        _same_device(normalizer, "normalizer", x, "x")
        normalizer = "tensor"
    elif not (normalizer is None or normalizer == "mean_abs"):
        _unknown(normalizer, "normalizer", ("mean_abs", None, "a tensor [B]"))
    if not (isinstance(reduction, str) and reduction in REDUCTIONS):
        _unknown(reduction, "reduction", REDUCTIONS)
    if eps.__class__ is not float or not 0.0 <= eps < math.inf:
        eps = number(eps, "eps", low=0.0)

    params = LossParams(
        scale,
        code or 0,
        NORMALIZERS[normalizer],
        eps,
        nonfinite_rule(nonfinite),
        REDUCTIONS[reduction],
        identity_alpha,
        bool(return_stats),
    )
    return (weight, teacher_uncond, scale_tensor, mask, x_t, alpha, sigma, normalizer_tensor), params


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
) -> tuple[Tensor | None, Divergence, WeightParams]:
    """Checks the arguments of f_weights. Returns t as [B], the divergence and the
    numbers."""
    floating(logits, "logits")
    if logits.ndim not in (1, 2):
        raise ValueError(f"logits must have shape [B] or [B, K], got {tuple(logits.shape)}")
    if logits.ndim == 2 and logits.shape[1] == 0:
        raise ValueError(f"logits has no heads: shape {tuple(logits.shape)}")
    divergence = get_divergence(divergence)
    if normalize is not None and normalize != "mean":
        _unknown(normalize, "normalize", ("mean", None))
    zero = nonfinite_rule(nonfinite)
    if eps.__class__ is not float or not 0.0 <= eps < math.inf:
        eps = number(eps, "eps", low=0.0)

    clips = (logit_clip, ratio_clip)
    low, high = _DEFAULT_BOUNDS if clips == _DEFAULT_CLIPS else _clip_bounds(*clips)
    if t is not None:
        dense(t, "t")
        if t.dtype is torch.bool or t.dtype.is_complex:
            raise TypeError(f"t must be of a real dtype, got {t.dtype}")
        if t.ndim == 0 or t.shape[0] != logits.shape[0] or t.numel() != logits.shape[0]:
            raise ValueError(f"t must have shape [{logits.shape[0]}], one time per sample, got {tuple(t.shape)}")
        if t.ndim > 1:
            t = t.reshape(-1)
        _same_device(t, "t", logits, "logits")
    min_t, max_t, ema_rate = 0.0, 1.0, 0.0
    if histogram is not None:
        bins = getattr(histogram, "bins", None)
        if not isinstance(bins, Tensor) or not hasattr(histogram, "ema_rate"):
            raise TypeError(f"histogram must be a RatioHistogram, got {type(histogram).__name__}")
        if t is None:
            raise ValueError("t is missing: a histogram needs the time of every sample")
        _same_device(bins, "histogram", logits, "logits")
        min_t, max_t = histogram.min_t, histogram.max_t
        ema_rate = histogram.ema_rate if histogram.training else 1.0  # in eval mode this batch plays no part
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
    return t, divergence, params


def _clip_bounds(logit_clip: Any, ratio_clip: Any) -> tuple[float, float]:
    """clamp to +-logit_clip, then to log ratio_clip: both as one pair of bounds on the log-ratio."""
    limit = math.inf if logit_clip is None else number(logit_clip, "logit_clip", low=0.0, finite=False)
    if ratio_clip is None:
        return -limit, limit
    try:
        ratio_low, ratio_high = ratio_clip
    except (TypeError, ValueError):
        raise TypeError(f"ratio_clip must be a pair (low, high) or None, got {ratio_clip!r}") from None
    ratio_low = number(ratio_low, "ratio_clip[0]", low=0.0, finite=False)
    ratio_high = number(ratio_high, "ratio_clip[1]", low=0.0, finite=False)
    if ratio_low > ratio_high:
        raise ValueError(f"ratio_clip is reversed: its low {ratio_low:g} is above its high {ratio_high:g}")
    if ratio_high == 0.0 or ratio_low == math.inf:
        raise ValueError(f"ratio_clip must leave some finite positive ratio, got {ratio_clip!r}")
    low = math.log(ratio_low) if ratio_low > 0 else -math.inf
    high = math.log(ratio_high)
    return min(max(-limit, low), high), max(min(limit, high), low)


_DEFAULT_CLIPS = (10.0, (0.1, 20.0))
_DEFAULT_BOUNDS = _clip_bounds(*_DEFAULT_CLIPS)


def no_weight(loss_arguments: dict[str, Any]) -> None:
    if loss_arguments.get("weight") is not None:
        raise ValueError("weight: f_distill_loss computes the weight from the logits; leave it out")


def same_batch(logits: Tensor, x: Tensor) -> None:
    if logits.shape[0] != x.shape[0]:
        raise ValueError(f"logits has {logits.shape[0]} samples, but x has shape {tuple(x.shape)}")
    _same_device(logits, "logits", x, "x")


def output(out: Any, x: Tensor, *inputs: Tensor | None) -> None:
    """out can take g: x's shape and dtype, no part of another input (except exactly that input)."""
    floating(out, "out")
    if out.shape != x.shape or out.dtype != x.dtype:
        want, got = (tuple(x.shape), x.dtype), (tuple(out.shape), out.dtype)
        raise ValueError(f"out must have x's shape and dtype {want}, got {got}")
    _same_device(out, "out", x, "x")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires grad: pass out.detach()")
    if torch.compiler.is_compiling():  # g is then computed first and copied
        return
    if out.is_neg():
        raise ValueError("out is a lazily negated view: pass a tensor of its own")
    reach = 0
    for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"out has elements that share memory: shape {tuple(out.shape)}, strides {out.stride()}")
        reach += (size - 1) * stride
    storage = out.untyped_storage().data_ptr() if out.numel() else 0
    for value in (x, *inputs):
        if value is None or not value.numel() or value.untyped_storage().data_ptr() != storage:
            continue
        same = value.data_ptr() == out.data_ptr() and value.stride() == out.stride() and value.dtype == out.dtype
        if not same and _spans_overlap(value, out):
            raise ValueError("out overlaps an input without being that input")


def _spans_overlap(a: Tensor, b: Tensor) -> bool:
    def span(tensor: Tensor) -> tuple[int, int]:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr()
        return start, start + (reach + 1) * tensor.element_size()

    (a_start, a_end), (b_start, b_end) = span(a), span(b)
    return a_start < b_end and b_start < a_end
