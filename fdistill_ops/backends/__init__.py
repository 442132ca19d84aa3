"""The back ends and the choice among them.

A back end is a module with ``name`` and the functions ``f_weights``, ``distribution_matching``, ``difference``,
``f_distill`` and ``score_identity``, which take checked tensors and the records of :mod:`fdistill_ops.params`, and
``scale_gradient``, with which backward multiplies a saved gradient by the incoming one. ``backends/cpu.py`` is the pattern. The
reference has none of these: the public functions then evaluate :mod:`fdistill_ops.reference` itself.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from .. import _native

NAMES = ("reference", "cpu")
_REFERENCE = SimpleNamespace(name="reference")
_DEFAULT = {"cpu": "cpu"}
_override: str | None = None
_loaded: dict[str, Any] = {"reference": _REFERENCE}


def _load(name: str) -> Any:
    """The back end, or a RuntimeError that says why it is not there."""
    if name == "cpu":
        if _native.module() is None:
            raise RuntimeError(f"the back end 'cpu' is not available: {_native.reason()}")
        from . import cpu

        _loaded[name] = cpu
    return _loaded[name]


def available_backends() -> tuple[str, ...]:
    """Names of the back ends that can run here. :func:`build_info` says why another cannot."""
    return tuple(name for name in NAMES if name != "cpu" or _native.module() is not None)


def set_backend(name: str | None) -> None:
    """Makes every call use that back end; None restores the default (cpu for CPU tensors).

    Raises:
        ValueError: unknown name.
        RuntimeError: that back end is not available here; the message says why.
    """
    global _override
    if name is not None:
        _check_name(name, "name")
        _load(name)
    _override = name
    _selected.clear()


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """:func:`set_backend` for the length of a ``with`` block."""
    previous = _override
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def _check_name(name: str, argument: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, NAMES))}; got {name!r}")


_selected: dict[str, Any] = {}


def select(device: torch.device) -> Any:
    """The back end that serves tensors on this device.

    Raises:
        RuntimeError: the chosen or default one cannot.
    """
    found = _selected.get(device.type)
    return found if found is not None else _select(device.type)


def _select(device_type: str) -> Any:
    name = _override
    if name is None and (name := os.environ.get("FDISTILL_BACKEND") or None):
        _check_name(name, "FDISTILL_BACKEND")
    if name is None:
        name = _DEFAULT.get(device_type)
        if name is None:
            raise RuntimeError(
                f"no fused back end serves {device_type} tensors yet; fd.set_backend('reference') runs them in plain PyTorch"
            )
        if name == "cpu" and _native.module() is None:
            warnings.warn(
                f"fdistill_ops runs in plain PyTorch on CPU tensors, slowly: {_native.reason()}", RuntimeWarning, stacklevel=4
            )
            name = "reference"
    elif name != "reference" and name != device_type:
        raise RuntimeError(f"the back end {name!r} cannot serve {device_type} tensors")
    _selected[device_type] = _load(name)
    return _selected[device_type]


def empty_cache() -> int:
    """Gives the memory that finished gradients left for the next ones back to the system. Returns its bytes."""
    return _load("cpu").empty_cache() if _native.module() is not None else 0
