"""Which calls are legal: the documentation of the public functions once more, as rules over the arguments' values.

:func:`judge` knows nothing of how the package checks. It finds the arguments that are wrong, by any of whose names a
refusal may call, and those of which the documentation does not say whether they will do: either a right result or a
refusal by name is accepted then.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .compare import plain_of
from .operands import Sub

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter, Sub)
MOST_DIMENSIONS = 64


@dataclass
class State:
    """A RatioHistogram as it is to be when the call begins."""

    min_t: Any
    max_t: Any
    ema_rate: Any
    bins: Any
    training: bool


@dataclass
class Verdict:
    """``wrong`` and ``doubtful``: names of arguments, and other words by one of which a refusal may name them.
    ``why``: the rules broken, in words."""

    wrong: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)
    why: list[str] = field(default_factory=list)

    def fault(self, names: str, why: str) -> None:
        self.wrong |= set(names.split())
        self.why.append(f"{names.split()[0]} {why}")

    def doubt(self, name: str) -> None:
        self.doubtful.add(name)

    @property
    def legal(self) -> bool:
        return not self.wrong


def is_tensor(value: Any) -> bool:
    return issubclass(type(value), Tensor)


def is_wrapper(value: Any) -> bool:
    """A subclass of which it is not said that it is supported."""
    return is_tensor(value) and type(value) not in _PLAIN


# ---------------------------------------------------------------------------------------------------------- the values


def as_number(value: Any) -> tuple[float | None, bool]:
    """The real number that a value is, None where it is none; and whether it is beyond doubt that it is one."""
    kind = type(value)
    if kind in (bool, np.bool_) or issubclass(kind, str | bytes | complex | np.complexfloating):
        return None, True
    own = issubclass(kind, int | float) and kind.__float__ in (int.__float__, float.__float__)
    if own or issubclass(kind, np.floating | np.integer):
        certain = True
    elif issubclass(kind, Fraction | Decimal | int | float):
        certain = False
    elif is_tensor(value):
        if is_wrapper(value):
            value = plain_of(value)
        if value is None or not is_strided(value) or value.numel() != 1 or value.device.type == "meta":
            return None, True
        certain = False
    elif (kind is np.ndarray and value.size == 1) or (hasattr(kind, "__float__") and not issubclass(kind, np.ndarray)):
        certain = False
    else:
        return None, True
    try:
        if is_tensor(value) or kind is np.ndarray:
            value = value.item()
            if type(value) not in (int, float):
                return None, True
        if issubclass(kind, float):
            return float.__float__(value), certain
        return float(value), certain
    except Exception:
        return None, True


def judge_number(verdict: Verdict, value: Any, name: str, low: float = -math.inf, finite: bool = True) -> None:
    number, certain = as_number(value)
    if number is None:
        verdict.fault(name, "is no real number")
    elif not (math.isfinite(number) if finite else not math.isnan(number)):
        verdict.fault(name, "is not finite" if finite else "is NaN")
    elif number < low:
        verdict.fault(name, f"is below {low:g}")
    elif math.isinf(number) and type(value) is int:
        verdict.fault(name, "is too large for a float")
    elif not certain:
        verdict.doubt(name)


def judge_word(verdict: Verdict, value: Any, name: str, known: tuple[Any, ...]) -> bool:
    """Whether the value is one of the known ones."""
    if value is None and None in known:
        return True
    text = value.item() if type(value) is np.ndarray and value.size == 1 else value
    if issubclass(type(text), str) and str(text) in [k for k in known if k is not None]:
        if type(value) is not str:
            verdict.doubt(name)
        return True
    verdict.fault(name, "is not one of " + ", ".join(map(repr, known)))
    return False


def judge_flag(verdict: Verdict, value: Any, name: str) -> None:
    if type(value) is not bool:
        verdict.doubt(name)


# --------------------------------------------------------------------------------------------------------- the tensors


def is_strided(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_nested and not value.is_quantized


def judge_tensor(verdict: Verdict, value: Any, name: str, dtypes: Any = FLOATS) -> bool:
    """Whether it is a tensor whose shape and device can be asked for."""
    if not is_tensor(value):
        verdict.fault(name, "is no tensor")
        return False
    if type(value).__name__ == "UninitializedParameter":
        verdict.fault(name, "has no shape yet")
        return False
    if not is_strided(value):
        verdict.fault(name, "is not dense")
        return False
    if is_wrapper(value) or torch._is_functional_tensor(value):
        verdict.doubt(name)
    if value.dtype not in dtypes:
        verdict.fault(name, f"is {value.dtype}")
    if value.ndim > MOST_DIMENSIONS:
        verdict.doubt(name)
    return True


def same_device(verdict: Verdict, value: Tensor, name: str, x: Tensor, x_name: str) -> None:
    if value.device != x.device:
        verdict.fault(f"{name} {x_name}", f"is on another device than {x_name}")


def judge_like(verdict: Verdict, value: Any, name: str, x: Tensor | None, x_name: str, dtypes: Any = FLOATS) -> None:
    if not judge_tensor(verdict, value, name, dtypes) or x is None:
        return
    if value.shape != x.shape:
        verdict.fault(f"{name} {x_name}", f"has another shape than {x_name}")
    same_device(verdict, value, name, x, x_name)


def judge_rows(verdict: Verdict, value: Any, name: str, x: Tensor | None, x_name: str = "x") -> None:
    """A number; or a tensor of a leading part of x's shape, or one of as many dimensions that broadcasts to it."""
    if not is_tensor(value):
        judge_number(verdict, value, name)
        return
    if not judge_tensor(verdict, value, name) or x is None:
        return
    leads = value.shape == x.shape[: value.ndim]
    if not leads and not (value.ndim == x.ndim and broadcasts(value, x)):
        verdict.fault(f"{name} {x_name}", f"has a shape that is no leading part of {x_name}'s and does not broadcast")
    same_device(verdict, value, name, x, x_name)


def judge_per_sample(verdict: Verdict, value: Any, name: str, x: Tensor | None) -> None:
    """A tensor [B], or [B, 1, ..., 1] in as many dimensions as x."""
    if not judge_tensor(verdict, value, name) or x is None or x.ndim == 0:
        return
    if value.shape not in (x.shape[:1], torch.Size((x.shape[0], *[1] * (x.ndim - 1)))):
        verdict.fault(f"{name} x", "is not of shape [B]")
    same_device(verdict, value, name, x, "x")


def judge_mask(verdict: Verdict, value: Any, x: Tensor | None) -> None:
    """bool; broadcasts to x's shape, or has a leading part of it."""
    if not judge_tensor(verdict, value, "mask", (torch.bool,)) or x is None:
        return
    if not broadcasts(value, x) and value.shape != x.shape[: value.ndim]:
        verdict.fault("mask x", "has a shape that does not broadcast to x's")
    same_device(verdict, value, "mask", x, "x")


def broadcasts(value: Tensor, x: Tensor) -> bool:
    """Whether PyTorch would expand it to x's shape."""
    pairs = zip(reversed(value.shape), reversed(x.shape), strict=False)
    return value.ndim <= x.ndim and all(size in (1, whole) for size, whole in pairs)


def names_one(message: str, names: set[str]) -> bool:
    """Whether one of the names stands in the message as a word of its own."""
    return any(re.search(rf"(?<![\w.])(?<!n'){re.escape(name)}(?!\w)", message) for name in names)
