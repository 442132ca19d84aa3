"""Compiling ahead of the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from . import _checks
from .divergences import Divergence
from .losses import f_distill_loss
from .weights import RatioHistogram


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
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shapes, dtypes = [tuple(shape) for shape in shapes], list(dtypes)
    for shape in shapes:
        if not shape or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"shapes must hold shapes [B, ...] of whole numbers, got {shape!r}")
    for dtype in dtypes:
        if dtype not in _checks.FLOATS:
            raise ValueError(f"dtypes must be float32, float64, bfloat16 or float16, got {dtype!r}")
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be a positive integer, got {heads!r}")
    histogram = None if bins is None else RatioHistogram(0.0, 1.0, bins).to(device)
    logits = torch.zeros((2, heads) if heads > 1 else (2,), device=device)
    t = None if histogram is None else torch.zeros(2, device=device)
    for shape in shapes:
        for dtype in dtypes:
            x = torch.zeros((2, *shape[1:]), dtype=dtype, device=device, requires_grad=True)
            other = torch.zeros_like(x, requires_grad=False)
            extra: dict[str, Any] = {}
            if guidance:
                extra |= {"teacher_uncond": other, "guidance_scale": 1.0}
            if mask:
                extra["mask"] = torch.ones_like(x, dtype=torch.bool)
            if prediction != "x0":
                schedule = torch.ones(2, dtype=torch.float64, device=device)
                extra |= {"prediction": prediction, "x_t": other, "alpha": schedule, "sigma": schedule}
            loss = f_distill_loss(
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
            if return_stats:
                loss, _ = loss
            loss.sum().backward()
