"""What f_weights must give, and the histogram, from the independent oracle (fdistill_ops/_oracle.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fdistill_ops import _oracle as oracle

from .compare import Array, Problems, numbers_of
from .contract import as_number
from .rules import divergence_of


def unit(dtype: torch.dtype) -> float:
    return oracle.U64 if dtype is torch.float64 else oracle.U32


def equal_terms(dtype: torch.dtype, count: int) -> float:
    """Relative error of a float64 sum of equal terms beside that of independent ones: they are rounded alike. Sums of
    float32 terms are float64."""
    return oracle.U64 * count if dtype is torch.float64 else 0.0


@dataclass
class Weights:
    """The oracle's answer; ``strong``: whether the weights are to be compared, and the histogram."""

    answer: oracle.Weights
    strong: bool
    shares: bool  # whether the clipped fractions are beyond doubt


def _bin_centres(t: Array, low: float, high: float, count: int) -> Array:
    """Times in the middle of the bins that these belong to by the documented formula, in float64: the oracle's exact
    arithmetic may differ on an edge."""
    with np.errstate(all="ignore"):
        width = (high - low) / count
        index = np.clip(np.floor(np.nan_to_num((t - low) / width, nan=0.0)), 0, count - 1)
    return np.where(np.isnan(t), np.nan, low + (index + 0.5) * width)


def weights(given: Mapping[str, Any], before: Mapping[str, Array], bins: Array | None) -> Weights:
    """``bins``: the histogram before the call."""
    shape = tuple(given["logits"].shape)
    logits = before["logits"].reshape(shape if len(shape) == 1 else (shape[0], math.prod(shape[1:])))
    name, a = divergence_of(given.get("divergence", "js")) or ("js", 0.5)
    logit_clip, ratio_clip = given.get("logit_clip", 10.0), given.get("ratio_clip", (0.1, 20.0))
    limit = None if logit_clip is None else as_number(logit_clip)[0]
    pair = None if ratio_clip is None else tuple(as_number(bound)[0] for bound in ratio_clip)
    eps = as_number(given.get("eps", 1e-6))[0] or 0.0
    options: dict[str, Any] = {"divergence": name, "a": a, "logit_clip": limit, "ratio_clip": pair, "eps": eps}
    options["normalize"] = None if given.get("normalize", "mean") is None else "mean"
    options["nonfinite"] = str(given.get("nonfinite", "propagate"))
    strong, histogram, t = True, given.get("histogram"), before.get("t")
    if pair is not None and pair[1] == math.inf:
        options["ratio_clip"] = (pair[0], 1e300)
    log_ratio = _clipped(logits, limit, pair)
    if histogram is not None and bins is not None and t is not None:
        low, high, rate = (as_number(getattr(histogram, key))[0] or 0.0 for key in ("min_t", "max_t", "ema_rate"))
        bins = np.where(np.isfinite(bins) & (bins >= 0), bins, 1.0)
        width = (high - low) / len(bins)
        strong = 1e-200 < width < 1e200 and bool(np.abs(log_ratio).max(initial=0.0) < 80.0)
        strong &= bool(bins.min() + eps > 1e-30)
        spaced = high - low > 1e-9 * max(abs(low), abs(high))
        strong &= spaced
        centres = _bin_centres(t, low, high, len(bins)) if spaced else np.where(np.isnan(t), t, low)
        options |= {"bins": bins, "min_t": low, "max_t": high, "ema_rate": rate, "training": histogram.training}
        options["t"] = centres
    else:
        options["t"] = t
    reach = oracle.elasticity(name, a) * (np.abs(log_ratio).max(initial=0.0) + (80.0 if histogram is not None else 0.0))
    if reach > 600.0 or not math.isfinite(eps):
        strong = False
    if not strong:
        options |= {"logit_clip": 1.0, "ratio_clip": None, "eps": 1e-6, "bins": None, "divergence": "js"}
    answer = oracle.f_weights(logits, u=unit(given["logits"].dtype), **options)
    return Weights(answer, strong, _beyond_doubt(logits, limit, pair))


def _means(logits: Array) -> Array:
    with np.errstate(all="ignore"):
        means = logits.mean(axis=1) if logits.ndim == 2 else logits
    return means[np.isfinite(means)]


def _bounds(limit: float | None, pair: Any) -> tuple[float, float]:
    low, high = (-math.inf, math.inf) if limit is None else (-limit, limit)
    if pair is not None:
        ratio_low = math.log(pair[0]) if pair[0] > 0 else -math.inf
        ratio_high = math.log(pair[1])
        low, high = min(max(low, ratio_low), ratio_high), max(min(high, ratio_high), ratio_low)
    return low, high


def _clipped(logits: Array, limit: float | None, pair: Any) -> Array:
    return np.clip(_means(logits), *_bounds(limit, pair))


def _beyond_doubt(logits: Array, limit: float | None, pair: Any) -> bool:
    means = _means(logits)
    for bound in _bounds(limit, pair):
        with np.errstate(all="ignore"):
            near = np.abs(means - bound) < 1e-4 * (1 + abs(bound))
        exact = (means == bound) & (logits.ndim == 1)
        if math.isfinite(bound) and bool((near & ~exact).any()):
            return False
    return True


def check_weights(problems: Problems, given: Mapping[str, Any], want: Weights, got: Any, expression: str) -> None:
    logits = given["logits"]
    dtype = torch.float64 if logits.dtype is torch.float64 else torch.float32
    found = problems.tensor(got, expression, tuple(logits.shape[:1]), dtype)
    problems.same(bool(got.requires_grad), False, f"{expression}.requires_grad")
    if found is not None and want.strong:
        noise = want.answer.noise + equal_terms(dtype, found.size) * np.abs(want.answer.weights)
        problems.close(found, want.answer.weights, noise, expression, dtype)
    elif found is not None and given.get("nonfinite") == "zero":
        problems.same(bool(np.isfinite(found).all()), True, f"bool({expression}.isfinite().all())")


def check_histogram(problems: Problems, given: Mapping[str, Any], want: Weights, bins: Array | None) -> None:
    """The buffer after the call; in eval mode nothing may have changed, which is looked at with the other operands."""
    histogram = given.get("histogram")
    if histogram is None or not histogram.training:
        return
    after = numbers_of(histogram.bins)
    if after is None:
        return
    dtype = histogram.bins.dtype
    problems.same(bool(np.isfinite(after).all()), True, "bool(histogram.bins.isfinite().all())")
    if want.strong and want.answer.bins is not None:
        largest = torch.finfo(dtype).max
        expected = np.minimum(want.answer.bins, largest)
        noise = want.answer.bins_noise + (oracle.U32 * expected if dtype is torch.float64 else 0.0)  # read as float32
        problems.close(after, expected, noise, "histogram.bins", dtype)
