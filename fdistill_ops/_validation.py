"""Primitives of the argument checks: each takes a value and the name of the argument it came as, and raises an error
that names it. Of the library nothing but PyTorch's names is imported here."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._torch import TAKES_REAL_ONES, functorch_level, is_functional, is_lazy

# Tuples: the dynamo of PyTorch 2.6 and 2.8 looks for no class in a frozenset.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_REALS = (
    *FLOATS,
    *(getattr(torch, name) for name in ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")),
)
_NUMBERS = (numbers.Real, torch.SymInt, torch.SymFloat)
_BOOLS = (bool, torch.SymBool)
_SHOWN = 60  # characters of a value in a message


def shown(value: Any) -> str:
    """The value as a message shows it: never long, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python prints, say
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def unknown(value: Any, name: str, known: Iterable[Any]) -> NoReturn:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {shown(value)}")


# ------------------------------------------------------------------------------------------------------------- numbers


def is_number(value: Any) -> bool:
    """A real number of Python's, NumPy's or a trace's, and no bool."""
    return isinstance(value, _NUMBERS) and not isinstance(value, _BOOLS)


def number(value: Any, name: str, *, low: float = -math.inf, finite: bool = True) -> float:
    """A real number, or a tensor or array of one element on the host, as a float."""
    if not is_number(value):
        _refuse_as_number(value, name)
    try:
        result = float(value)
    except OverflowError:  # an integer, or a fraction, beyond the largest float
        raise ValueError(f"{name} must be in the range of a float, got {shown(value)}") from None
    except Exception:  # whatever a number of somebody's own raises
        raise TypeError(f"{name} must be a number, got {shown(value)}") from None
    if not (-math.inf < result < math.inf if finite else -math.inf <= result <= math.inf):  # comparisons alone trace
        raise ValueError(f"{name} must be {'finite' if finite else 'a number'}, got {shown(value)}")
    if result < low:
        raise ValueError(f"{name} must be at least {low:g}, got {shown(value)}")
    return result


def _refuse_as_number(value: Any, name: str) -> None:
    """Unless it holds one real number and can be read without waiting for a device."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not isinstance(shape, tuple) or shape != () or dtype is None:
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise TypeError(
                f"{name} must be a number, got a tensor on {value.device}: reading it would wait for the device"
            )
        if dtype is torch.bool or dtype.is_complex:
            raise TypeError(f"{name} must be a number, got a tensor of {dtype}")
    elif getattr(dtype, "kind", "O") not in "iuf":
        raise TypeError(f"{name} must be a number, got {shown(value)}")


def positive_integer(value: Any, name: str, high: int = (1 << 63) - 1) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or int(value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {shown(value)}")
    if int(value) > high:
        raise ValueError(f"{name} must be at most {high:,}, got {shown(value)}")
    return int(value)


def flag(value: Any, name: str) -> bool:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


# ------------------------------------------------------------------------------------------------------------- tensors


def dense(value: Any, name: str) -> Tensor:
    """A strided, non-distributed tensor, or a TypeError that names the argument."""
    if type(value) not in PLAIN_TYPES:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if is_lazy(value):
            raise TypeError(f"{name} is a {type(value).__name__}, which has no values yet")
        for kind, instead in (("DTensor", "to_local"), ("MaskedTensor", "get_data")):
            if _is_a(kind, value):
                raise TypeError(f"{name} is a {kind}, which is not supported: pass {name}.{instead}()")
    if value.layout is not torch.strided or value.is_nested:
        kind = "is nested" if value.is_nested else f"has the layout {value.layout}"
        raise TypeError(f"{name} {kind}, which is not supported: pass a dense, strided tensor ({name}.to_dense())")
    return value


def floating(value: Any, name: str) -> Tensor:
    if dense(value, name).dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    return value


def real(value: Any, name: str) -> Tensor:
    """A tensor of floating-point numbers or integers."""
    dtype = dense(value, name).dtype
    if dtype not in _REALS:
        raise TypeError(f"{name} must be of a real dtype, got {dtype}")
    return value


def device_named(device: Any) -> torch.device:
    """A device that is there."""
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a device or its name, got {shown(device)}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a device or its name, got {shown(device)}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {shown(device)} is not there: PyTorch sees {torch.cuda.device_count()} CUDA device(s)"
        )
    return found


def same_device(value: Tensor, name: str, x: Tensor, x_name: str) -> None:
    """Both on one device, and both fake or neither."""
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device}, but {x_name} is on {x.device}")
    if type(value) is not type(x):
        for one, its_name, other, other_name in ((value, name, x, x_name), (x, x_name, value, name)):
            if is_fake(one) and not is_fake(other) and not _takes_real_ones(one):
                raise TypeError(f"{its_name} is a FakeTensor, but {other_name} is none")


def call_named(function: Callable[..., Any], named: Mapping[str, Tensor | None], *rest: Any) -> Any:
    """function(*named.values(), *rest).

    Raises:
        TypeError: it failed with operands of types that what is called may know nothing of; the message names them.
    """
    try:
        return function(*named.values(), *rest)
    except Exception as error:
        refuse_functional(named)
        odd = {name: _oddity(value) for name, value in named.items() if value is not None and _oddity(value)}
        if not odd or torch.compiler.is_compiling():
            raise
        names = ", ".join(f"{name} ({what})" for name, what in odd.items())
        first = next(iter(str(error).strip().splitlines()), "")
        raise TypeError(
            f"{names}: such tensors cannot be used in this call ({type(error).__name__}: {first})"
        ) from error


def _oddity(value: Tensor) -> str:
    """What PyTorch's operations may not expect of it; empty where there is nothing."""
    if type(value) not in PLAIN_TYPES:
        return type(value).__name__
    return f"{value.ndim} dimensions" if value.ndim > 64 else ""


def has_memory(tensor: Tensor) -> bool:
    """Whether there is an address to read from. The storage of a zero that automatic differentiation makes, or of a
    functional tensor, begins at address 0; one without elements counts as having none."""
    address = tensor.data_ptr()
    return address != 0 and address != tensor.storage_offset() * tensor.itemsize


def without_memory(name: str) -> TypeError:
    return TypeError(f"{name} has no memory of its own: a tensor of this kind cannot be used in this call")


def refuse_functional(named: Mapping[str, Tensor | None]) -> None:
    """Functional tensors outside the transform that makes them do not mix with others, and PyTorch does not say which
    they are."""
    if torch.compiler.is_compiling() or functorch_level() is not None:
        return
    for name, value in named.items():
        if value is not None and type(value) in PLAIN_TYPES and is_functional(value):
            raise without_memory(name)


def is_fake(value: Tensor) -> bool:
    return type(value) not in PLAIN_TYPES and _is_a("FakeTensor", value)


def _takes_real_ones(fake: Any) -> bool:
    return torch.compiler.is_compiling() or getattr(fake.fake_mode, TAKES_REAL_ONES)


def _is_a(kind: str, value: Any) -> bool:
    """By the name of its class: the modules that define these are not imported for it."""
    return any(base.__name__ == kind for base in type(value).__mro__)


def rows(value: Any, name: str, x: Tensor, x_name: str = "x") -> Tensor:
    """A finite number, or a tensor whose shape is a leading part of x's or, with as many dimensions, broadcasts to it.
    Returned with a leading part of x's shape."""
    if not isinstance(value, Tensor):
        if not is_number(value):
            raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
        return torch.full((), number(value, name), dtype=torch.float64, device=x.device)
    floating(value, name)
    same_device(value, name, x, x_name)
    if value.shape == x.shape[: value.ndim]:
        return value
    if value.ndim != x.ndim or not broadcasts(value, x):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, which is no leading part of {x_name}'s shape {tuple(x.shape)} and "
            "does not broadcast to it"
        )
    covered = x.ndim  # trailing dimensions of size 1 stand for whole rows
    while covered and value.shape[covered - 1] == 1:
        covered -= 1
    return call_named(lambda v: v.reshape(v.shape[:covered]).expand(x.shape[:covered]), {name: value})


def broadcasts(value: Tensor, x: Tensor) -> bool:
    """Whether it has a shape that PyTorch would expand to x's."""
    return value.ndim <= x.ndim and all(
        size in (1, full) for size, full in zip(reversed(value.shape), reversed(x.shape), strict=False)
    )


def per_sample(value: Any, name: str, x: Tensor) -> Tensor:
    """A tensor [B], or one that holds as much: [B, 1, ..., 1] in as many dimensions as x."""
    floating(value, name)
    same_device(value, name, x, "x")
    if value.shape == x.shape[:1]:
        return value
    if value.shape != (x.shape[0],) + (1,) * (x.ndim - 1):
        raise ValueError(f"{name} must have shape {[x.shape[0]]}, got {tuple(value.shape)}")
    return call_named(lambda v: v.reshape(x.shape[:1]), {name: value})
