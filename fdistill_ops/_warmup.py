"""Compiling ahead of the first step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._validation import FLOATS, device_named, flag, positive_integer, shown
from .divergences import Divergence
from .histogram import RatioHistogram
from .losses import f_distill_loss


def warmup(
    shapes: Iterable[Sequence[int]],
    dtypes: Iterable[torch.dtype] = (torch.float32,),
    *,
    device: torch.device | str | None = None,
    divergence: str | Divergence = "js",
    heads: int = 1,
    bins: int | None = 10,
    normalize: str | None = "mean",
    guidance: bool = False,
    mask: bool = False,
    prediction: str = "x0",
    normalizer: str | None = "mean_abs",
    reduction: str = "mean",
    nonfinite: str = "propagate",
    return_stats: bool = False,
) -> None:
    """Compiles what :func:`fdistill_ops.f_distill_loss` and its backward need, so that the first step does not wait for
    it. Back ends that are compiled already have nothing to do.

    Runs the loss forward and backward on two samples of zeros for each shape and dtype; kernels are not compiled again
    for another batch size.

    Args:
        shapes: of x, [B, ...]; B does not matter.
        dtypes: of x, teacher and fake.
        device: where the training will run; None: the current GPU, where there is one, else the CPU.
        divergence, normalize, normalizer, reduction, nonfinite, prediction, return_stats: as the loss will be called.
        heads: K of logits [B, K], float32; 1 for [B].
        bins: of the RatioHistogram (t is float32); None for none.
        guidance, mask: whether there will be an unconditional prediction, a mask.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
        RuntimeError: no back end serves the device.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    target = device_named(device)
    sizes, kinds = _shapes(shapes), _dtypes(dtypes)
    heads = positive_integer(heads, "heads")
    flag(guidance, "guidance"), flag(mask, "mask"), flag(return_stats, "return_stats")
    prediction = _checks.prediction_name(prediction)
    probe = torch.zeros(1)
    weighting = {"divergence": divergence, "normalize": normalize, "nonfinite": nonfinite}
    _checks.f_weights("warmup", probe, None, weighting, "reference")  # whichever back end serves the target
    if isinstance(normalizer, Tensor):
        raise TypeError("normalizer must be 'mean_abs' or None here")
    _checks.loss("warmup", *(probe,) * 3, {"normalizer": normalizer, "reduction": reduction}, "reference")
    histogram = None if bins is None else RatioHistogram(0.0, 1.0, bins).to(target)
    logits = torch.zeros((2, heads) if heads > 1 else (2,), device=target)
    t = None if histogram is None else torch.zeros(2, device=target)
    for shape in sizes:
        for dtype in kinds:
            x = torch.zeros((2, *shape[1:]), dtype=dtype, device=target, requires_grad=True)
            other = torch.zeros_like(x, requires_grad=False)
            extra: dict[str, Any] = {}
            if guidance:
                extra |= {"teacher_uncond": other, "guidance_scale": 1.0}
            if mask:
                extra["mask"] = torch.ones_like(x, dtype=torch.bool)
            if prediction != "x0":
                schedule = torch.ones(2, dtype=torch.float64, device=target)
                extra |= {"prediction": prediction, "x_t": other, "alpha": schedule, "sigma": schedule}
            result = f_distill_loss(
                x,
                other,
                other,
                logits,
                t,
                divergence=divergence,
                histogram=histogram,
                normalize=normalize,
                normalizer=normalizer,
                reduction=reduction,
                nonfinite=nonfinite,
                return_stats=return_stats,
                **extra,
            )
            loss = result[0] if isinstance(result, tuple) else result
            loss.sum().backward()


def _shapes(shapes: Any) -> list[tuple[int, ...]]:
    try:
        found = [tuple(shape) for shape in shapes]
    except TypeError:
        raise TypeError(f"shapes must hold shapes [B, ...], got {shown(shapes)}") from None
    for shape in found:
        if not shape or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape):
            raise ValueError(f"shapes must hold shapes [B, ...] of whole numbers, got {shown(shape)}")
        if 2 * math.prod(shape[1:]) >= 1 << 60:
            raise ValueError(f"shapes holds one too large for any memory: {shown(shape)}")
    return found


def _dtypes(dtypes: Any) -> list[torch.dtype]:
    try:
        found = list(dtypes)
    except TypeError:
        raise TypeError(f"dtypes must hold dtypes, got {shown(dtypes)}") from None
    for dtype in found:
        if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
            raise ValueError(f"dtypes must be float32, float64, bfloat16 or float16, got {shown(dtype)}")
    return found
