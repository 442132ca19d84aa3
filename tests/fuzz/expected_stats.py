"""What the statistics of a loss must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fdistill_ops import _oracle as oracle
from fdistill_ops.stats import FIELDS

from .compare import Array, Problems
from .contract import is_tensor
from .expected import Losses
from .expected_weights import Weights, unit

_RATIO = ("ratio_mean", "clipped_low", "clipped_high")


def check_stats(
    problems: Problems,
    want: Losses,
    given: Mapping[str, Any],
    before: Mapping[str, Array],
    stats: Any,
    weighted: Weights | None,
) -> None:
    """Where everything is compared and finite."""
    found = problems.tensor(stats.vector, "stats.vector", (len(FIELDS),), want.dtype)
    answer = want.answer
    if found is None or not want.sure_rows.all() or not want.sure.size:
        return
    if not all(np.isfinite(v).all() for v in (answer.g, answer.g_noise, answer.loss, answer.loss_noise, answer.n)):
        return
    fields = dict(zip(FIELDS, found.tolist(), strict=True))
    relative = 1e-11 if want.dtype is torch.float64 else 4e-6
    used = want.arrays.get("mask")
    noise = answer.g_noise if used is None else answer.g_noise[used]
    values, allowed = dict(answer.stats), _of_the_normalizer(want)
    allowed |= {
        "grad_norm": float(np.sqrt(np.sum(noise**2))),
        "grad_mean_abs": float(np.mean(noise)) if noise.size else 0.0,
    }
    if want.elements is None:
        allowed["loss"] = float(np.mean(answer.loss_noise))
    else:  # as of the mean
        values["loss"] = float(np.sum(want.elements[0]) / max(noise.size, 1))
        allowed["loss"] = float(np.sum(want.elements[1]) / max(noise.size, 1))
        if not math.isfinite(allowed["loss"]):  # an element that is set to 0 was not known
            del values["loss"]
    by_weight = _of_the_weights(want, given, before, weighted, values, relative)
    if weighted is None:
        values |= dict.fromkeys(_RATIO, math.nan)
    else:
        values["ratio_mean"] = weighted.answer.ratio_mean
        allowed["ratio_mean"] = 1e-4 * abs(weighted.answer.ratio_mean)
        if weighted.shares:
            values |= {"clipped_low": weighted.answer.clipped_low, "clipped_high": weighted.answer.clipped_high}
    for name, value in values.items():
        if want.dtype is not torch.float64 and abs(value) > np.finfo(np.float32).max:  # a weight given as a number, say
            value = math.copysign(math.inf, value)
        size = by_weight if name.startswith(("weight", "effective")) else relative
        tolerance = size * abs(value) + allowed.get(name, 0.0) + 1e-37 if math.isfinite(value) else 0.0
        problems.number(fields[name], value, tolerance, f"stats.{name}.item()")


def _of_the_normalizer(want: Losses) -> dict[str, float]:
    """How far the normaliser's statistics may be off: by the roundings of what it is a mean of."""
    spread = 0.0
    for name in ("x", "teacher", "teacher_uncond", "x_t"):
        if want.arrays.get(name) is not None:
            spread = max(spread, float(np.max(np.abs(want.arrays[name]), initial=0.0)))
    if want.arrays.get("guidance_scale") is not None:
        spread *= 1 + 2 * float(np.max(np.abs(want.arrays["guidance_scale"]), initial=0.0))
    if want.arrays.get("prediction", "x0") != "x0":
        a, c = oracle.x0_coefficients(want.arrays["prediction"], want.arrays["alpha"], want.arrays["sigma"])
        spread *= 1 + float(np.max(np.abs(a), initial=0.0) + np.max(np.abs(c), initial=0.0))
    names = ("normalizer_min", "normalizer_mean", "normalizer_max")
    return dict.fromkeys(names, 16 * unit(want.dtype) * spread)


def _of_the_weights(
    want: Losses,
    given: Mapping[str, Any],
    before: Mapping[str, Array],
    weighted: Weights | None,
    values: dict[str, float],
    relative: float,
) -> float:
    """Puts the statistics of the weight over its rows into the values, or takes them out where they are not known.
    Returns how far they may be off, relatively."""
    weight, clipped = given.get("weight"), given.get("max_norm") is not None
    w = np.asarray(1.0 if want.arrays.get("weight") is None else want.arrays["weight"])
    w = w[np.isfinite(w)]
    if not w.size:
        for name in ("weight_min", "weight_mean", "weight_max", "effective_sample_size"):
            values.pop(name, None)
        return relative
    values |= {"weight_min": float(w.min()), "weight_mean": float(w.mean()), "weight_max": float(w.max())}
    # Over rows as they are given, which the oracle's arrays repeat.
    if weighted is not None and weight is None and not clipped:
        rows = weighted.answer.weights[np.isfinite(weighted.answer.weights)]
    elif weighted is None and is_tensor(weight) and not clipped:
        rows = before["weight"][np.isfinite(before["weight"])]
    else:
        rows = np.zeros(0)
    with np.errstate(all="ignore"):
        total, squares = rows.sum(), (rows**2).sum()
    if squares and not (rows < 0).any():
        values["effective_sample_size"] = float(total**2 / squares)
    else:
        values.pop("effective_sample_size", None)
    if is_tensor(weight) and tuple(weight.shape) != want.shape[: weight.ndim]:
        values.pop("effective_sample_size", None)
    if clipped:
        relative = max(relative, 1e-3)
    if weighted is not None:
        finite = np.isfinite(weighted.answer.weights)
        size = np.maximum(weighted.answer.weights[finite], 1e-300)
        relative = max(relative, 4 * float(np.max(weighted.answer.noise[finite] / size, initial=0.0)))
        if given["logits"].dtype is not torch.float64:
            relative = max(relative, 4e-7)
    return relative
