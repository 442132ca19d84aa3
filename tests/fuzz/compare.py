"""Results beside what they should be: numbers within a bound, and the list of what is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


@dataclass
class Problem:
    """``what`` is wrong, in words, and of what kind that is. For a script: the ``expression`` that shows it, what that
    should be (numbers, or text for other values) and how far from it the numbers may be."""

    kind: str
    what: str
    expression: str = ""
    want: Any = None
    allowed: Any = None


REAL = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16}
REAL |= {torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2}


def plain_of(value: Any) -> Tensor | None:
    """The tensor with memory that a tensor stands for; None where there is none."""
    if not issubclass(type(value), Tensor) or type(value).__name__ in ("UninitializedParameter", "FakeTensor"):
        return None
    while True:
        name = type(value).__name__
        if name == "TwoTensor":
            value = value.a
        elif name == "MaskedTensor":
            if not hasattr(value, "_masked_data"):
                return None
            value = value.get_data()
        elif torch._is_functional_tensor(value):
            torch._sync(value)
            value = torch._from_functional_tensor(value)
        else:
            break
    if value.device.type == "meta" or value.layout is not torch.strided or value.is_nested or value.dtype not in REAL:
        return None
    if type(value).__name__ == "FakeTensor":
        return None
    return value.detach().as_subclass(Tensor)


def numbers_of(value: Any) -> Array | None:
    """As a flat float64 (or bool) array of its own."""
    value = plain_of(value)
    if value is None:
        return None
    if value.numel() == 0 or torch._is_zerotensor(value):  # zeros without memory
        return np.zeros(value.numel(), dtype=bool if value.dtype is torch.bool else np.float64)
    value = value.reshape(-1)
    if value.dtype is torch.bool:
        return value.numpy().copy()
    return np.array(value.double().resolve_neg().numpy())


_INFO = {d: torch.finfo(d) for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


def ulp(value: Array, dtype: torch.dtype) -> Array:
    """Distance between the numbers of that dtype around each value."""
    info = _INFO[dtype]
    magnitude = np.clip(np.nan_to_num(np.abs(value), nan=0.0, posinf=info.max), info.tiny, info.max)
    return np.ldexp(info.eps, np.frexp(magnitude)[1] - 1)


def off(got: Array, want: Array, allowed: Array, largest: float) -> Array:
    """Where got is not want within allowed. A want that is not finite asks for one that is not, an allowed that is not
    for nothing; beyond the largest number of the dtype, infinity is right."""
    with np.errstate(all="ignore"):
        close = np.abs(got - want) <= allowed
        overflow = np.isinf(got) & (np.abs(want) + allowed >= largest)
    finite = np.isfinite(want)
    return ~np.where(finite, close | overflow | ~np.isfinite(allowed), ~np.isfinite(got) | np.isnan(allowed))


@dataclass
class Problems:
    """What was found wrong with one call."""

    found: list[Problem] = field(default_factory=list)

    def add(self, kind: str, what: str, expression: str = "", want: Any = None, allowed: Any = None) -> None:
        self.found.append(Problem(kind, what, expression, want, allowed))

    def same(self, got: Any, want: Any, expression: str) -> bool:
        """A dtype, a shape, a flag."""
        if got == want:
            return True
        self.add("value", f"{expression} is {got}, not {want}", expression, repr(want))
        return False

    def tensor(self, value: Any, expression: str, shape: tuple[int, ...], dtype: torch.dtype) -> Array | None:
        """Its shape and dtype; its numbers, where they are right and it has any."""
        if not issubclass(type(value), Tensor):
            self.add("value", f"{expression} is no tensor but {type(value).__name__}", f"type({expression}).__name__")
            return None
        right = self.same(tuple(value.shape), shape, f"tuple({expression}.shape)")
        right &= self.same(value.dtype, dtype, f"{expression}.dtype")
        return numbers_of(value) if right else None

    def close(
        self,
        got: Array | None,
        want: Any,
        noise: Any,
        expression: str,
        dtype: torch.dtype,
        ulps: float = 0.5,
        sure: Any = True,
    ) -> bool:
        """Numbers within ``ulps`` and ``noise`` of what they should be, where that is known for ``sure``."""
        if got is None:
            return False
        noise = np.broadcast_to(np.asarray(noise, dtype=np.float64), np.shape(want)).reshape(-1)
        want = np.asarray(want, dtype=np.float64).reshape(-1)
        if want.size != got.size:
            raise ValueError(f"{expression}: {got.size} numbers, expected {want.size}")
        with np.errstate(all="ignore"):
            allowed = ulps * ulp(want, dtype) + noise
        allowed = np.where(np.isnan(allowed), np.inf, allowed)
        allowed = np.where(np.broadcast_to(np.asarray(sure), want.shape), allowed, np.nan)
        wrong = off(got, want, allowed, _INFO[dtype].max)
        if not wrong.any():
            return True
        first = int(np.argmax(wrong))
        self.add(
            "value",
            f"{int(wrong.sum())} of {wrong.size} elements of {expression} are wrong: the one at {first} is "
            f"{got[first]!r} and should be {want[first]!r} within {allowed[first]:.3g}",
            expression,
            [float(v) for v in want],
            [float(v) for v in allowed],
        )
        return False

    def number(self, got: float, want: float, tolerance: float, expression: str) -> None:
        """One number, of the statistics."""
        if math.isnan(want) and math.isnan(got):
            return
        if not abs(got - want) <= tolerance and got != want:
            text = f"{expression} is {got!r} and should be {want!r} within {tolerance:.3g}"
            self.add("value", text, expression, [float(want)], [float(tolerance)])
