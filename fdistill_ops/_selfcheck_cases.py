"""The calls of the self-check: their arguments, and what they must give by the formulas in float64 (``_oracle.py``).

A layout of the losses also settles their options, so that few calls reach much: ``contiguous`` is the plain loss,
``channels_last`` has guidance and a mask, ``sliced`` predictions of v and a loss for each sample, ``broadcast`` one
teacher for all, a mask [H, W] and an element that is not finite, ``large`` samples that no program holds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _oracle as oracle
from ._call import compute_dtype
from .histogram import RatioHistogram
from .testing import errors_and_tolerances, lay_out, ulp, unit_roundoff

Array = np.ndarray

DTYPES = {
    "float32": (torch.float32,) * 3,
    "float64": (torch.float64,) * 3,
    "bfloat16": (torch.bfloat16,) * 3,
    "float16": (torch.float16,) * 3,
    "mixed": (torch.bfloat16, torch.float32, torch.float16),
}
_SHAPES = {
    "contiguous": (4, 3, 32, 32),
    "channels_last": (3, 8, 10, 12),
    "sliced": (3, 5, 9, 11),
    "broadcast": (3, 4, 8, 10),
    "large": (2, 3, 380, 380),  # more than the blocks of a cluster hold, of float32
}
_PIECE = 1 << 15  # elements compared at once
_LARGE_DOUBLES = (2, 3, 280, 280)
_OF_LOGITS = {"contiguous": (64,), "stepped": (33, 4), "broadcast": (40,), "large": (5000, 2)}
_DIVERGENCES = dict(zip([*_SHAPES, "stepped"], ("js", "kl", "jf", "sh", "pearson", "sf"), strict=True))
_MATCHING = ("distribution_matching_loss", "f_distill_loss", "score_difference")
LOSSES = (*_MATCHING, "score_identity_loss")
GAN_LOSSES = ("gan_generator_loss", "gan_discriminator_loss")
OPERATIONS = ("f_weights", *LOSSES, *GAN_LOSSES)


@dataclass(frozen=True)
class Case:
    """One call, but for the seed."""

    operation: str
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.operation} {self.dtype} {self.layout}"

    @property
    def small(self) -> bool:
        """Whether an interpreter does it too in a moment."""
        return self.layout not in ("contiguous", "large")

    @property
    def first(self) -> bool:
        """Whether it is the one case of its operation and dtype: each in another layout."""
        layouts = layouts_of(self.operation, self.dtype)
        at = OPERATIONS.index(self.operation) + list(DTYPES).index(self.dtype)
        return self.layout == layouts[at % len(layouts)]


def layouts_of(operation: str, dtype: str) -> list[str]:
    if operation in LOSSES:
        return [layout for layout in _SHAPES if (layout, dtype) != ("large", "mixed")]
    return [layout for layout in _OF_LOGITS if layout != "large" or operation == "f_weights"]


def cases() -> Iterator[Case]:
    for operation in OPERATIONS:
        for dtype in DTYPES:
            if (operation, dtype) != ("gan_generator_loss", "mixed"):
                yield from (Case(operation, dtype, layout) for layout in layouts_of(operation, dtype))


# ----------------------------------------------------------------------------------------------------------- arguments


class _Draw:
    """Tensors of one generator, of which no other case and seed has the like."""

    def __init__(self, case: Case, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {case.name}".encode()))
        self.device = device

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        values = torch.randn(shape, generator=self.generator, dtype=wide)
        return lay_out(values.to(dtype).to(self.device), layout)

    def uniform(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """In [0.5, 1.5)."""
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.5
        return values.to(dtype).to(self.device)


def arguments(case: Case, seed: int, device: torch.device) -> dict[str, Any]:
    """Fresh ones, the same for the same case and seed."""
    draw = _Draw(case, seed, device)
    if case.operation in GAN_LOSSES:
        return _gan_arguments(draw, case)
    return _weight_arguments(draw, case) if case.operation == "f_weights" else _loss_arguments(draw, case)


def _gan_arguments(draw: _Draw, case: Case) -> dict[str, Any]:
    shape, (one, other, _) = _OF_LOGITS[case.layout], DTYPES[case.dtype]
    layout = "expanded" if case.layout == "broadcast" else case.layout
    names = ("logits",) if case.operation == "gan_generator_loss" else ("real_logits", "fake_logits")
    pairs = zip(names, (one, other), strict=False)
    return {name: draw.normal(shape, dtype, layout).requires_grad_() for name, dtype in pairs}


def _weight_arguments(draw: _Draw, case: Case) -> dict[str, Any]:
    shape, dtype = _OF_LOGITS[case.layout], DTYPES[case.dtype][0]
    layout = {"stepped": "stepped", "broadcast": "expanded"}.get(case.layout, "contiguous")
    found: dict[str, Any] = {"logits": draw.normal(shape, dtype, layout), "divergence": _DIVERGENCES[case.layout]}
    if case.layout == "large":
        found["logits"][7] = torch.nan
        found["nonfinite"] = "zero"
    if case.layout != "contiguous":
        found |= _times(draw, shape[0], torch.float64 if case.dtype == "mixed" else torch.float32)
    return found


def _times(draw: _Draw, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    histogram = RatioHistogram(0.5, 1.5, bins=10, ema_rate=0.75).to(draw.device)
    histogram.bins.copy_(draw.uniform((10,)))
    return {"t": draw.uniform((batch,), dtype), "histogram": histogram}


def _loss_arguments(draw: _Draw, case: Case) -> dict[str, Any]:
    layout, identity = case.layout, case.operation == "score_identity_loss"
    shape = _LARGE_DOUBLES if (layout, case.dtype) == ("large", "float64") else _SHAPES[layout]
    of_x, of_teacher, of_fake = DTYPES[case.dtype]
    memory = layout if layout in ("channels_last", "sliced") else "contiguous"
    wanted = case.operation != "score_difference"
    found: dict[str, Any] = {
        "x": draw.normal(shape, of_x, memory).requires_grad_(wanted),
        "teacher": draw.normal(shape, of_teacher, "expanded" if layout == "broadcast" else memory),
        "fake": draw.normal(shape, of_fake, memory),
    }
    if layout == "channels_last":
        found["mask"] = draw.normal(shape, torch.float32, memory) > -0.5
        if not identity:
            guidance = draw.uniform(shape[:1]) * 3
            found |= {"teacher_uncond": draw.normal(shape, of_teacher, memory), "guidance_scale": guidance}
    elif layout == "sliced":
        found["reduction"] = "sample"
        if not identity:
            schedule = {"alpha": draw.uniform(shape[:1], torch.float64), "sigma": draw.uniform(shape[:1])}
            found |= {"prediction": "v", "x_t": draw.normal(shape, of_x, memory), **schedule}
    elif layout == "broadcast":
        found["fake"].view(-1)[5] = torch.nan
        found |= {"mask": draw.normal(shape[2:], torch.float32) > -0.5, "nonfinite": "zero", "reduction": "sum"}
    if layout in ("broadcast", "large") and case.operation != "f_distill_loss":
        found["weight"] = draw.uniform(shape[: 2 if layout == "broadcast" else 1])
    if case.operation == "f_distill_loss":
        logits = draw.normal(shape[:1] if layout == "contiguous" else (shape[0], 3), of_teacher) * 2
        found |= {"logits": logits, "divergence": _DIVERGENCES[layout]}
        found |= {} if layout == "contiguous" else _times(draw, shape[0])
    elif case.operation == "score_difference":
        found.pop("reduction", None)
        if layout == "sliced":
            found["out"] = lay_out(torch.zeros(shape, dtype=of_x, device=draw.device), "sliced")
    elif identity:
        found["alpha"] = 1.25
        found["teacher"].requires_grad_(), found["fake"].requires_grad_()
    return found


# ------------------------------------------------------------------------------------------------------------- results


def incoming(case: Case, batch: int) -> Array | float:
    """The gradient that comes into backward: 1, or numbers by which a gradient is scaled with one more rounding."""
    if case.layout == "sliced":
        return (np.arange(batch) + 11.0) / 16
    return 1.0 if case.layout in ("contiguous", "large") else -0.6875


def results(case: Case, call: Callable[..., Any], given: dict[str, Any]) -> dict[str, Tensor]:
    """What the call gives: its value, the gradients of what requires one, the histogram."""
    value = call(**given)
    found = {"value": value.detach()}
    leaves = {name: v for name, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    if leaves:
        upstream = torch.as_tensor(incoming(case, len(value) if value.ndim else 1)).to(value)
        gradients = torch.autograd.grad(value, list(leaves.values()), upstream)
        found |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    if "histogram" in given:
        found["histogram"] = given["histogram"].bins
    return found


@dataclass
class Expected:
    """A result in float64, and what it may be off by: ``ulps`` of its own dtype and, absolutely, ``noise``."""

    value: Array
    noise: Array
    dtype: torch.dtype
    ulps: float = 0.5

    def error(self, found: Tensor) -> tuple[float, str]:
        """The largest error in units of its tolerance, and what is wrong if it is above 1."""
        if found.dtype is not self.dtype or found.shape != self.value.shape:
            shapes = f"{found.dtype} {tuple(found.shape)}, expected {self.dtype} {self.value.shape}"
            return float("inf"), shapes
        pieces = zip(*(tensor.reshape(-1).split(_PIECE) for tensor in (found, *self._tensors)), strict=True)
        worst, n_off, message = -1.0, 0, ""
        for i, (got, want, noise) in enumerate(pieces):
            error, allowed, share = errors_and_tolerances(got, want, ulps=self.ulps, terms=1, noise=noise)
            at = int(share.argmax())
            n_off += int((share > 1).sum())
            if float(share[at]) > worst:
                worst, where = float(share[at]), np.unravel_index(i * _PIECE + at, found.shape)
                message = (
                    f"at {tuple(map(int, where))} got {float(got[at])!r}, expected {float(want[at])!r}, "
                    f"error {float(error[at]):.3g}, allowed {float(allowed[at]):.3g}"
                )
        return worst, f"{n_off} of {found.numel()} elements are off; {message}"

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        value, noise = (np.array(numbers, dtype=np.float64) for numbers in (self.value, self.noise))
        return torch.from_numpy(value), torch.from_numpy(noise)


class Answer:
    """What a case must give."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.given = case, arguments(case, seed, torch.device("cpu"))

    @cached_property
    def expected(self) -> dict[str, Expected]:
        if self.case.operation in GAN_LOSSES:
            return self._gan()
        if self.case.operation == "f_weights":
            weights, found = self._weights()
            dtype = compute_dtype(self.given["logits"])
            return {"value": Expected(weights.weights, weights.noise, dtype)} | found
        return self._loss()

    def _gan(self) -> dict[str, Expected]:
        """exp, log1p and a sum: a few roundings of each term, all of one sign."""
        found, value, noise = {}, 0.0, 0.0
        for name, logits in self.given.items():
            sign = 1.0 if name == "fake_logits" else -1.0
            numbers, u, n = _array(logits), _unit(logits), logits.numel()
            mean = oracle.gan_generator(-sign * numbers)
            value, noise = value + mean, noise + (oracle.growth(n) + 8) * _unit(*self.given.values()) * mean
            derivative = sign / (1.0 + np.exp(-sign * numbers)) / n * incoming(self.case, 1)
            found[f"gradient of {name}"] = Expected(derivative, 12 * u * np.abs(derivative), logits.dtype, 1.0)
        dtype = compute_dtype(*self.given.values())
        return {"value": Expected(np.asarray(value), np.asarray(noise), dtype)} | found

    def _weights(self) -> tuple[oracle.Weights, dict[str, Expected]]:
        """The oracle's answer, and the histogram."""
        given, histogram = self.given, self.given.get("histogram")
        extra: dict[str, Any] = {}
        if histogram is not None:
            extra = {name: getattr(histogram, name) for name in ("min_t", "max_t", "ema_rate")}
            extra |= {"t": _array(given["t"]), "bins": _array(histogram.bins)}
        weights = oracle.f_weights(
            _array(given["logits"]),
            divergence=given["divergence"],
            nonfinite=given.get("nonfinite", "propagate"),
            u=_unit(given["logits"]),
            **extra,
        )
        if weights.bins is None or weights.bins_noise is None:
            return weights, {}
        return weights, {"histogram": Expected(weights.bins, weights.bins_noise, torch.float32)}

    def _loss(self) -> dict[str, Expected]:
        given, shape = self.given, self.given["x"].shape
        like_x = [given.get(name) for name in ("x", "teacher", "fake", "teacher_uncond", "x_t")]
        dtype = compute_dtype(*like_x)
        found: dict[str, Expected] = {}
        plain = {name: _array(value) for name, value in given.items() if name not in _NOT_OF_MATCHING}
        if "mask" in plain:
            plain["mask"] = np.broadcast_to(plain["mask"], shape)
        if self.case.operation == "f_distill_loss":
            weights, found = self._weights()
            plain |= {"weight": weights.weights, "weight_noise": weights.noise}
        if self.case.operation == "score_difference":
            plain["reduction"] = "sum"
        of = oracle.score_identity if self.case.operation == "score_identity_loss" else oracle.distribution_matching
        loss = of(**plain, u=_unit(*like_x))
        if self.case.operation == "score_difference":
            g, noise = loss.gradients["x"], loss.gradient_noise["x"]
            return {"value": Expected(g, noise, given["x"].dtype)}
        gradients = {
            f"gradient of {name}": self._scaled(loss.gradients[name], loss.gradient_noise[name], given[name].dtype)
            for name in loss.gradients
        }
        return {"value": Expected(loss.loss, loss.loss_noise, dtype, 1.0), **gradients, **found}

    def _scaled(self, gradient: Array, noise: Array, dtype: torch.dtype) -> Expected:
        """A stored gradient times the incoming one: a rounding to its dtype each, and the product's. float16 is stored
        without its scale, and rounded again when that comes in (docs/numerics.md)."""
        factor = oracle.rows(incoming(self.case, len(gradient)), gradient.ndim)
        if np.all(factor == 1.0):
            return Expected(gradient, noise, dtype, 1.0 if dtype is torch.float16 else 0.5)
        u = unit_roundoff(torch.float64 if dtype is torch.float64 else torch.float32)
        stored = noise + 0.5 * ulp(torch.from_numpy(gradient), dtype).numpy()
        value = gradient * factor
        return Expected(value, stored * np.abs(factor) + 2 * u * np.abs(value), dtype, 0.5)


_NOT_OF_MATCHING = frozenset({"logits", "t", "histogram", "divergence", "out"})


def _array(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.numpy() if value.dtype is torch.bool else value.double().numpy()


def _unit(*tensors: Tensor | None) -> float:
    """Of the arithmetic on them."""
    return unit_roundoff(compute_dtype(*tensors))
