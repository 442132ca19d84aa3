"""The back ends and the choice among them.

A back end is a file here that ends with ``backend``, a :class:`Backend`, and a line in ``_UNAVAILABLE``. ``cpu.py`` is
the pattern.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _native
from .._call import LossCall, LossResult, Needs, WeightCall, WeightResult
from .._validation import unknown


class Backend(Protocol):
    """What computes calls that are checked, on tensors that are not traced."""

    name: str

    def f_weights(self, call: WeightCall) -> WeightResult: ...

    def loss(self, call: LossCall, needs: Needs) -> LossResult:
        """The loss, and those of its derivatives that are needed, each in the dtype and strides of its input."""

    def difference(self, call: LossCall, out: Tensor | None) -> Tensor:
        """g itself, in out where that is given: the derivative with respect to x of the sum."""

    def scale_gradient(self, gradient: Tensor, scale: Tensor | None, upstream: Tensor, keep: bool) -> Tensor:
        """A derivative times the incoming one (0-dimensional or [B]) and, in float16, the scale [B] it was stored
        without. ``keep``: the derivative will be asked for again, and must stay as it is."""

    def empty_cache(self) -> int:
        """Gives memory that is kept for the next call back. Returns its bytes, as far as they are many."""


_EMULATED = "cuda-emulated"  # tests alone: set_backend knows it where it was built
_DEFAULT = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the first that can
_OLDEST_TRITON = (3, 4)  # 3.2 takes no tuples into a kernel; 3.3 compiles none with a None in it
_environment = os.environ.get("FDISTILL_BACKEND") or None
_UNSET: Any = object()
_of_process: str | None = None
_of_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("fdistill_backend", default=_UNSET)
_loaded: dict[str, Backend] = {}
_warned = False


def _why_not(name: str) -> str | None:
    """Why a back end cannot run here; None where it can."""
    reason = _UNAVAILABLE[name]() if name in _UNAVAILABLE else None
    return None if reason is None else f"the back end {name!r} is not available: {reason}"


def _why_not_cuda() -> str | None:
    reason = _native.cuda_reason()
    if reason is None and not torch.cuda.is_available():
        reason = "PyTorch finds no GPU"
    if reason is None:
        capability = torch.cuda.get_device_capability()
        archs = [divmod(int(arch.rstrip("af")), 10) for arch in _native.cuda_archs()]
        if not any(arch[0] == capability[0] and arch <= capability for arch in archs) and capability < archs[-1]:
            reason = f"it was not built for a GPU of compute capability {capability[0]}.{capability[1]}"
    return reason


def _why_not_triton() -> str | None:
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed (pip install triton)"
    elif (version := _triton_version()) is not None and _numbers(version) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        reason = f"its kernels need Triton {oldest} or newer (PyTorch 2.8 brings it), and Triton {version} is installed"
    elif not _triton_interprets() and not torch.cuda.is_available():
        reason = "PyTorch finds no GPU (TRITON_INTERPRET=1 does without, slowly)"
    return reason


# Of each back end: why it cannot run here, or None.
_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpu": _native.reason,
    "cuda": _why_not_cuda,
    "triton": _why_not_triton,
}
NAMES = tuple(_UNAVAILABLE)


@functools.cache
def _triton_version() -> str | None:
    """Of the installed distribution, without importing it; None where it goes by a name that is not known here."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """Of "3.4.0+git": (3, 4)."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version)[:2])


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def known_names() -> tuple[str, ...]:
    """What :func:`set_backend` takes."""
    return NAMES if _native.emulator() is None else (*NAMES, _EMULATED)


def serves(name: str, device_type: str) -> bool:
    """Whether a back end takes tensors on such a device, if it is available."""
    if name == "reference":
        return True
    if interprets(name):
        return device_type == "cpu"
    return device_type == ("cuda" if name == "triton" else name)


def interprets(name: str) -> bool:
    """Whether that back end's kernels for GPUs run on the CPU, slowly."""
    return name == _EMULATED or (name == "triton" and _triton_interprets())


def available_backends() -> tuple[str, ...]:
    """Names of the back ends that can run here. :func:`build_info` says why another cannot."""
    return tuple(name for name in NAMES if _why_not(name) is None)


def unavailable_backends() -> dict[str, str]:
    """Why each of the others cannot run here."""
    return {name: reason for name in NAMES if (reason := _why_not(name)) is not None}


def set_backend(name: str | None) -> None:
    """Makes every call of this process use that back end, but for those within a :func:`use_backend` block. None
    restores the environment variable FDISTILL_BACKEND or, without one, the default (cpu for CPU tensors; cuda for CUDA
    tensors where it was built for that GPU, else triton).

    Raises:
        ValueError: unknown name.
        RuntimeError: that back end is not available here; the message says why.
    """
    global _of_process
    _of_process = usable(name)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Makes every call in a ``with`` block use that back end; None: as if neither this nor :func:`set_backend` had been
    called. It holds for the thread, or asyncio task, that the block runs in, and no other. Compiled code asks for
    the back end whenever it runs.

    Raises:
        ValueError, RuntimeError: as :func:`set_backend`.
    """
    token = _of_context.set(usable(name))
    try:
        yield
    finally:
        _of_context.reset(token)


def usable(name: str | None, argument: str = "name") -> str | None:
    """The name, if it is one of a back end that can run here; the errors of :func:`set_backend` if not."""
    if name is not None:
        _check_name(name, argument)
        if reason := _why_not(name):
            raise RuntimeError(reason)
    return name


def _check_name(name: str, argument: str) -> None:
    if not isinstance(name, str) or name not in known_names():
        unknown(name, argument, known_names())


def choose(device: torch.device) -> str:
    """The name of the back end that serves tensors on this device. A call asks once.

    Raises:
        RuntimeError: the chosen or default one cannot.
    """
    wanted = _of_context.get()
    key = (_of_process if wanted is _UNSET else wanted, device.type)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _decide(*key)
    return found


_chosen: dict[tuple[str | None, str], str] = {}


def _decide(override: str | None, device_type: str) -> str:
    global _warned
    name = override
    if name is None and _environment is not None:
        name = _environment
        _check_name(name, "FDISTILL_BACKEND")
    if name is not None:
        if not serves(name, device_type):
            raise RuntimeError(f"the back end {name!r} cannot serve {device_type} tensors")
        if reason := _why_not(name):
            raise RuntimeError(reason)
        return name
    names = _DEFAULT.get(device_type)
    if names is None:
        raise RuntimeError(
            f"no fused back end serves {device_type} tensors; fd.set_backend('reference') runs them in plain PyTorch"
        )
    reasons = [_why_not(name) for name in names]
    if None in reasons:
        return names[reasons.index(None)]
    if not _warned:
        _warned = True
        why = "; ".join(filter(None, reasons))
        warnings.warn(f"fdistill_ops runs in plain PyTorch, slowly: {why}", RuntimeWarning, stacklevel=5)
    return "reference"


def kernels(name: str) -> Backend:
    """The back end of that name."""
    found = _loaded.get(name)
    if found is None:
        found = _loaded[name] = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").backend
    return found


def empty_cache() -> int:
    """Gives the memory that finished gradients left for the next ones back to the system. Returns its bytes."""
    return sum(found.empty_cache() for found in list(_loaded.values()))
