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
