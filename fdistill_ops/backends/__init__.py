"""The back ends and the choice among them.

A back end is a module with ``name`` and the functions ``f_weights``, ``distribution_matching``, ``difference``,
``f_distill`` and ``score_identity``, which take checked tensors and the records of :mod:`fdistill_ops.params`, and
``scale_gradient``, with which backward multiplies a saved gradient by the incoming one. ``backends/cpu.py`` is the
pattern. Public functions evaluate :mod:`fdistill_ops.reference` itself where that is chosen; ``backends/reference.py``
serves the operators (torch.compile, tracing).
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
from collections.abc import Iterator
from typing import Any

import torch

from .. import _native
from .._validation import unknown

NAMES = ("reference", "cpu", "cuda", "triton")
_EMULATED = "cuda-emulated"  # tests alone: set_backend knows it where it was built
_DEFAULT = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}  # the first that can
_OLDEST_TRITON = (3, 4)  # 3.2 takes no tuples into a kernel; 3.3 compiles none with a None in it
_environment = os.environ.get("FDISTILL_BACKEND") or None
_UNSET: Any = object()
_of_process: str | None = None
_of_context: contextvars.ContextVar[str | None] = contextvars.ContextVar("fdistill_backend", default=_UNSET)
_loaded: dict[str, Any] = {}
_warned = False


def _why_not(name: str) -> str | None:
    """Why a back end cannot run here; None where it can."""
    if name == "cpu" and _native.module() is None:
        return f"the back end 'cpu' is not available: {_native.reason()}"
    if name == "cuda":
        return _why_not_cuda()
    if name == "triton":
        return _why_not_triton()
    return None


def _why_not_cuda() -> str | None:
    reason = _native.cuda_reason()
    if reason is None and not torch.cuda.is_available():
        reason = "PyTorch finds no GPU"
    if reason is None:
        capability = torch.cuda.get_device_capability()
        archs = [divmod(int(arch.rstrip("af")), 10) for arch in _native.cuda_archs()]
        if not any(arch[0] == capability[0] and arch <= capability for arch in archs) and capability < archs[-1]:
            reason = f"it was not built for a GPU of compute capability {capability[0]}.{capability[1]}"
    return None if reason is None else f"the back end 'cuda' is not available: {reason}"


def _why_not_triton() -> str | None:
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed (pip install triton)"
    elif (version := _triton_version()) is not None and _numbers(version) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        reason = f"its kernels need Triton {oldest} or newer (PyTorch 2.8 brings it), and Triton {version} is installed"
    elif not _triton_interprets() and not torch.cuda.is_available():
        reason = "PyTorch finds no GPU (TRITON_INTERPRET=1 does without, slowly)"
    return None if reason is None else f"the back end 'triton' is not available: {reason}"


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


def kernels(name: str) -> Any:
    """The back end of that name, as a module of kernels."""
    found = _loaded.get(name)
    if found is None:
        found = _loaded[name] = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return found


def empty_cache() -> int:
    """Gives the memory that finished gradients left for the next ones back to the system. Returns its bytes."""
    for found in list(_loaded.values()):
        if hasattr(found, "empty_cache"):  # what a GPU's kernels keep on their streams: little, and not counted
            found.empty_cache()
    return _native.module().pool_trim() if _native.module() is not None else 0
