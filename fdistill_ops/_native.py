"""The one lazy loader of the compiled module. It remembers why it failed."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any


def module() -> Any:
    """The compiled module fdistill_ops._C, or None; :func:`reason` then says why."""
    return _load()[0]


def reason() -> str | None:
    """Why there is no compiled module; None where there is one."""
    return _load()[1]


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Both at once: a thread that asks while another imports waits for the module, and never finds neither."""
    try:
        return importlib.import_module("fdistill_ops._C"), None
    except ImportError as error:
        return None, build_record().get("skipped") or f"the compiled module does not load: {error}"


def emulator() -> Any:
    """The module fdistill_ops._C_emulated, which tests build; None without it."""
    try:
        return importlib.import_module("fdistill_ops._C_emulated")
    except ImportError:
        return None


def cuda_reason() -> str | None:
    """Why the compiled module has no CUDA kernels; None where it has."""
    if module() is None:
        return reason()
    if hasattr(module(), "cuda"):
        return None
    return build_record().get("cuda_skipped") or "the compiled module was built without CUDA"


def cuda_archs() -> list[str]:
    """Compute capabilities that the CUDA kernels were compiled for, such as "90"."""
    return build_record()["cuda"]["archs"]


def build_record() -> dict[str, Any]:
    """What the build wrote down: compiler, flags, and what was skipped and why."""
    path = Path(__file__).with_name("_build.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def build_info() -> dict[str, Any]:
    """What was compiled and what runs here.

    Returns:
        A dictionary: ``version``; ``compiled`` (bool) and, where it is False, ``reason``; ``compiler`` and ``isas``
        (instruction sets in the binary) from the build; ``cuda`` (nvcc's version and the compute capabilities) or
        ``cuda_skipped`` (why there are no CUDA kernels); ``isa`` (the one in use), ``threading`` (whose threads the
        kernels run on); ``backends`` (available names) and ``unavailable`` (why another is not, by name).
    """
    from . import __version__
    from .backends import available_backends, unavailable_backends

    native = module()
    info: dict[str, Any] = {"version": __version__, "compiled": native is not None, "reason": reason()}
    info |= {key: value for key, value in build_record().items() if key != "skipped"}
    if native is not None:
        info |= {"isa": native.isa(), "threading": native.threading()}
    return info | {"backends": available_backends(), "unavailable": unavailable_backends()}
