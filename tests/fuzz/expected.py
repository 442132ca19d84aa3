"""What a legal call of the losses must give, from the independent oracle (fdistill_ops/_oracle.py).

Everything is laid out as [B, N] for the oracle, rows of coefficients repeated. Where float32 may overflow or lose all
digits on the way, which the oracle's float64 does not, a sample is not compared; the others of the batch are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fdistill_ops import _oracle as oracle

from .compare import Array, Problems
from .contract import as_number, is_tensor
from .expected_weights import Weights, equal_terms, unit
from .rules import DIFFERENCES, prediction_of

LIKE_X = ("x", "teacher", "fake", "teacher_uncond", "x_t")
STRONG = {torch.float32: (1e-18, 1e18), torch.float64: (1e-150, 1e150)}


def computed_in(*values: Any) -> torch.dtype:
    doubles = [is_tensor(value) and value.dtype is torch.float64 for value in values]
    return torch.float64 if any(doubles) else torch.float32


@dataclass
class Losses:
    """The oracle's answer to a loss, as [B, N], and where it holds: ``sure`` by element, ``sure_rows`` by sample.
    ``elements``: the loss and its noise by element, where there is no reduction. ``arrays``: what the oracle was
    given. ``bounds_all``: float16 gradients are scaled by a bound on all derivatives of the score identity."""

    answer: oracle.Loss
    dtype: torch.dtype
    reduction: str
    sure: Array
    sure_rows: Array
    shape: tuple[int, ...]
    arrays: dict[str, Any]
    elements: tuple[Array, Array] | None = None
    bounds_all: bool = False

    @property
    def loss_shape(self) -> tuple[int, ...]:
        return {"sample": self.shape[:1], "none": self.shape}.get(self.reduction, ())


# ------------------------------------------------------------------------------------------------------------ operands


def rows(value: Any, numbers: Array | None, shape: tuple[int, ...], mask: bool = False) -> Any:
    """A coefficient, or a mask, as the oracle takes it: a number, or [B, N]."""
    if value is None or not is_tensor(value):
        return None if value is None else as_number(value)[0]
    if numbers is None:
        return None
    flat = (shape[0], math.prod(shape[1:]))
    ones, full = tuple(value.shape), len(shape)
    leads = ones == shape[: len(ones)]
    if mask:  # read from the right, as anywhere in PyTorch, unless it has the batch alone
        from_the_right = all(a in (1, b) for a, b in zip(reversed(ones), reversed(shape), strict=False))
        leads = leads and (len(ones) == 1 or not from_the_right)
    if leads:
        return np.repeat(numbers, math.prod(shape[len(ones) :])).reshape(flat)
    ones = (1,) * (full - len(ones)) + ones
    return torch.from_numpy(numbers).reshape(ones).expand(shape).reshape(flat).numpy()


def _operands(
    target: str, given: Mapping[str, Any], before: Mapping[str, Array], shape: tuple[int, ...]
) -> dict[str, Any]:
    flat = (shape[0], math.prod(shape[1:]))
    arrays: dict[str, Any] = {name: before[name].reshape(flat) for name in LIKE_X if name in before}
    if "mask" in before:
        arrays["mask"] = rows(given["mask"], before["mask"], shape, mask=True)
    for name in ("weight", "alpha", "sigma"):
        if given.get(name) is not None:
            arrays[name] = rows(given[name], before.get(name), shape)
    scale = given.get("guidance_scale")
    if scale is not None:
        arrays["guidance_scale"] = before["guidance_scale"] if is_tensor(scale) else as_number(scale)[0]
        if is_tensor(scale) and scale.ndim == 0:
            arrays["guidance_scale"] = float(before["guidance_scale"][0])
    normalizer = given.get("normalizer", "mean_abs")
    arrays["normalizer"] = before["normalizer"] if is_tensor(normalizer) else normalizer and "mean_abs"
    arrays["eps"] = 0.0 if normalizer is None else as_number(given.get("eps", 1e-6))[0]
    arrays["nonfinite"] = str(given.get("nonfinite", "propagate"))
    if target != "score_identity_loss":
        arrays["prediction"] = prediction_of(given)
    return arrays


def losses(
    target: str, given: Mapping[str, Any], before: Mapping[str, Array], weighted: Weights | None = None
) -> Losses:
    """The oracle's answer to the arguments, of which ``before`` holds the numbers as they were before the call."""
    shape = tuple(given["x"].shape)
    arrays = _operands(target, given, before, shape)
    reduction = "sum" if target in DIFFERENCES else str(given.get("reduction", "mean"))
    dtype = computed_in(*(given.get(name) for name in LIKE_X))
    identity = target == "score_identity_loss"
    noise = None if weighted is None else _times_weights(arrays, weighted)
    with np.errstate(all="ignore"):
        sure = np.ones((shape[0], 1), dtype=bool)
        if given.get("max_norm") is not None:
            noise, sure = _clip(arrays, as_number(given["max_norm"])[0] or 0.0, dtype, noise)
        reduced = "sum" if reduction == "none" else reduction
        answer = _answer(arrays | {"reduction": reduced}, dtype, identity, noise)
        elements = _elements(arrays, answer, dtype, identity) if reduction == "none" else None
        sure = sure & _sure(arrays, answer, dtype, identity)
        if weighted is not None:
            low, high = STRONG[torch.float64 if given["logits"].dtype is torch.float64 else torch.float32]
            w = np.abs(weighted.answer.weights[:, None])
            sure = sure & (weighted.strong & ((w == 0) | ~np.isfinite(w) | ((w > low) & (w < high))))
    zeros = any(is_tensor(value) and torch._is_zerotensor(value) for value in given.values())
    if zeros and not all(np.isfinite(array).all() for array in before.values()):
        sure = np.zeros_like(sure)  # PyTorch's product of such a zero with an infinity is 0
    halves = (is_half_leaf(given[name]) for name in ("teacher", "fake"))
    bounds_all = identity and any(halves)
    return Losses(answer, dtype, reduction, sure, sure.all(axis=1), shape, arrays, elements, bounds_all)


def is_half_leaf(tensor: Any) -> bool:
    return is_tensor(tensor) and tensor.dtype is torch.float16 and tensor.requires_grad


def _answer(arrays: dict[str, Any], dtype: torch.dtype, identity: bool, weight_noise: Array | None) -> oracle.Loss:
    if identity:
        return oracle.score_identity(**arrays, u=unit(dtype))
    return oracle.distribution_matching(**arrays, u=unit(dtype), weight_noise=weight_noise)


def _times_weights(arrays: dict[str, Any], weighted: Weights) -> Array:
    """Puts the f-weights, times a weight that was given, into the arrays. Returns their noise."""
    weights = weighted.answer.weights[:, None]
    noise = weighted.answer.noise[:, None] + oracle.U32 * np.abs(weights)
    given = arrays.get("weight")
    arrays["weight"] = weights if given is None else weights * given
    return noise if given is None else noise * np.abs(given)


def _clip(arrays: dict[str, Any], limit: float, dtype: torch.dtype, noise: Array | None) -> tuple[Array, Array]:
    """Scales the weight of each sample whose g is longer than ``limit`` over the mask. Returns the weight's noise, and
    where the length is beyond doubt."""
    answer = _answer(arrays | {"reduction": "sum"}, dtype, False, noise)
    used = np.ones(arrays["x"].shape, dtype=bool) if arrays.get("mask") is None else arrays["mask"]
    norm = np.sqrt(np.sum(np.where(used, answer.g, 0.0) ** 2, axis=1, keepdims=True))
    spread = np.sqrt(np.sum(np.where(used, answer.g_noise, 0.0) ** 2, axis=1, keepdims=True))
    relative = spread / norm + (oracle.growth(used.shape[1]) + 8) * unit(dtype) + equal_terms(dtype, 4 * used.size)
    factor = np.where(norm > 0, np.minimum(1.0, limit / norm), 1.0)
    weight = np.ones_like(norm) if arrays.get("weight") is None else arrays["weight"]
    before = unit(dtype) * np.abs(weight) if noise is None else noise
    low, high = STRONG[dtype]
    sure = (norm == 0) | ((norm > low) & (norm < high) & (relative < 0.25))
    touched = np.where(norm > 0, np.where(norm * (1 + relative) > limit, relative, 0.0), 0.0)
    arrays["weight"] = weight * factor
    return factor * before + np.abs(weight) * factor * touched, sure


def _elements(arrays: dict[str, Any], answer: oracle.Loss, dtype: torch.dtype, identity: bool) -> tuple[Array, Array]:
    """The loss of each element, and its noise."""
    u = unit(dtype)
    used = np.ones(arrays["x"].shape, dtype=bool) if arrays.get("mask") is None else arrays["mask"]
    if not identity:
        g, noise = answer.g, answer.g_noise
        loss, noise = 0.5 * g**2, np.abs(g) * noise + noise**2 + 4 * u * g**2 + oracle._tiny(u)
    else:
        k, d = answer.gradients["x"], arrays["teacher"] - arrays["fake"]  # k: -w d / (n + eps)
        inner = arrays["teacher"] - arrays["x"] - arrays.get("alpha", 1.0) * d
        size = np.abs(arrays["teacher"]) + np.abs(arrays["x"]) + (1 + 2 * abs(arrays.get("alpha", 1.0))) * np.abs(d)
        loss = -k * inner
        if arrays["nonfinite"] == "zero":
            loss = np.where(np.isfinite(loss), loss, 0.0)
        noise = answer.gradient_noise["x"] * size + 16 * u * np.abs(k) * size + oracle._tiny(u)
    return np.where(used, loss, 0.0), np.where(used, noise, 0.0)


def _sure(arrays: Mapping[str, Any], answer: oracle.Loss, dtype: torch.dtype, identity: bool) -> Array:
    """By sample, as [B, N]: nothing on the way can leave the range of the type computed in."""
    low, high = STRONG[dtype]

    def tame(value: Array) -> Array:
        size = np.abs(value)
        return (size == 0) | ((size > low) & (size < high)) | ~np.isfinite(size)

    x, teacher, fake = arrays["x"], arrays["teacher"], arrays["fake"]
    size = np.abs(teacher)
    guided = arrays.get("teacher_uncond") is not None
    if guided:
        size = (size + np.abs(arrays["teacher_uncond"])) * (1 + np.abs(oracle.rows(arrays["guidance_scale"], 2)))
    fine = tame(x) & tame(teacher) & tame(fake) & tame(size)
    c: Any = 1.0
    converted = arrays.get("prediction", "x0") != "x0"
    if converted:
        a, c = oracle.x0_coefficients(arrays["prediction"], arrays["alpha"], arrays["sigma"])
        fine = fine & tame(a) & tame(c) & tame(arrays["x_t"])
        size = np.abs(a * arrays["x_t"]) + np.abs(c) * size
    distance = np.abs(x) + size
    n = answer.n[:, None] + arrays["eps"]
    k = np.abs(1.0 if arrays.get("weight") is None else arrays["weight"]) / n
    reach = np.abs(c) * (np.abs(fake) + size)
    if identity:
        reach = (np.abs(x) + size + np.abs(fake)) * (1 + 2 * abs(arrays.get("alpha", 1.0)))
        fine = fine & tame(k * reach * reach)
    fine = fine & tame(distance) & tame(reach) & tame(k) & tame(k * reach) & tame(k * c)
    # A normaliser that is nearly 0, of a difference that was rounded: any quotient may come out.
    if (guided or converted) and isinstance(arrays["normalizer"], str):
        rounding = 64 * unit(dtype) * distance.mean(axis=1, keepdims=True) if distance.size else 0.0
        fine = fine & (~np.isfinite(n) | (rounding < n))
    by_sample = np.broadcast_to(fine, x.shape).all(axis=1) if x.size else np.ones(x.shape[0], dtype=bool)
    return np.broadcast_to(by_sample[:, None], x.shape)


# -------------------------------------------------------------------------------------------------------------- checks


def check_loss(problems: Problems, want: Losses, loss: Any) -> None:
    found = problems.tensor(loss, "loss", want.loss_shape, want.dtype)
    if want.elements is not None:
        value, noise = want.elements
        noise = noise + equal_terms(want.dtype, 4 * want.sure.size) * np.abs(value)
        problems.close(found, value, noise, "loss", want.dtype, 1.0, want.sure.reshape(-1))
        return
    sure = want.sure_rows if want.reduction == "sample" else np.asarray([want.sure_rows.all()])
    noise = want.answer.loss_noise + equal_terms(want.dtype, 4 * want.sure.size) * np.abs(want.answer.loss)
    problems.close(found, want.answer.loss, noise, "loss", want.dtype, 1.0, sure)


def check_difference(problems: Problems, want: Losses, g: Any, dtype: torch.dtype, expression: str, out: Any) -> None:
    found = problems.tensor(g, expression, want.shape, dtype)
    if not (is_tensor(out) and out.requires_grad):  # which is what is returned
        problems.same(bool(g.requires_grad), False, f"{expression}.requires_grad")
    noise = want.answer.g_noise + equal_terms(want.dtype, 4 * want.sure.size) * np.abs(want.answer.g)
    if want.dtype is torch.float64 and dtype in (torch.float16, torch.bfloat16):  # PyTorch rounds by way of float32
        noise = noise + oracle.U32 * np.abs(want.answer.g)
    problems.close(found, want.answer.g, noise, expression, dtype, 0.5, want.sure.reshape(-1))


def check_gradient(
    problems: Problems, want: Losses, name: str, leaf: Any, got: Any, upstream: Array, expression: str, times: int = 1
) -> None:
    """``upstream``: the incoming gradient, of the loss's shape, flat. ``times``: how often it was added."""
    if got is None:
        problems.add("value", f"{expression} is None", f"type({expression}).__name__", "'Tensor'")
        return
    found = problems.tensor(got, expression, want.shape, leaf.dtype)
    if found is None:
        return
    factor = upstream.reshape(want.sure.shape if want.elements is not None else (-1, 1)) * times
    info = torch.finfo(leaf.dtype)
    with np.errstate(all="ignore"):
        gradient = want.answer.gradients[name]
        exact = bool((np.frexp(factor)[0] == 0.5).all())
        value = gradient * factor
        noise = want.answer.gradient_noise[name] * np.abs(factor) + 2 * unit(leaf.dtype) * np.abs(value)
        noise = noise + equal_terms(want.dtype, 4 * want.sure.size) * np.abs(value)
        if not exact or leaf.dtype is torch.float16 or times > 1:  # rounded once more
            noise = noise + info.eps / 2 * np.abs(value) * times
        noise = noise + 4 * np.abs(factor) * info.smallest_normal * info.eps
        # A product with a saved zero or a saved infinity is not defined by the formula.
        plain = np.isfinite(factor) & (np.isfinite(gradient) | (factor != 0))
        if leaf.dtype is not torch.float16:  # nor is one with a gradient beyond what the leaf's dtype holds
            plain = plain & ~(np.abs(gradient) > info.max / 2)
        sure = want.sure & plain
        if leaf.dtype is torch.float16:  # stored with the range of float16, relative to the largest of the sample
            finite = np.isfinite(gradient)
            bound = np.abs(np.where(finite, gradient, 0.0))
            if want.bounds_all:  # |k d| (1 + 2 |alpha|) + |k (T - x)|, by way of the derivatives
                of_x, of_fake = (np.abs(want.answer.gradients[name]) for name in ("x", "fake"))
                bounds = of_x * (1 + 4 * abs(want.arrays.get("alpha", 1.0))) + of_fake
                bound = np.where(np.isfinite(bounds), bounds, bound)
            largest = bound.max(axis=1, initial=0.0)[:, None]
            noise = noise + np.abs(factor) * largest * 2.0**-38
            sure = sure & finite.all(axis=1, keepdims=True)
    problems.close(found, value, noise, expression, leaf.dtype, 0.5, np.broadcast_to(sure, gradient.shape).reshape(-1))
