"""The one lazy loader of the compiled module. It remembers why it failed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

_module: Any = None
_reason: str | None = None
_tried = False


def module() -> Any:
    """The compiled module fdistill_ops._C, or None; :func:`reason` then says why."""
    global _module, _reason, _tried
    if not _tried:
        _tried = True
        try:
            _module = importlib.import_module("fdistill_ops._C")
        except ImportError as error:
            _reason = _build_record().get("skipped") or f"the compiled module does not load: {error}"
    return _module


def reason() -> str | None:
    """Why there is no compiled module; None where there is one."""
    module()
    return _reason


def _build_record() -> dict[str, Any]:
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
        (instruction sets in the binary) from the build; ``isa`` (the one in use), ``threading`` (whose threads the
        kernels run on); ``backends`` (available names) and ``unavailable`` (why another is not, by name).
    """
    from . import __version__
    from .backends import available_backends, unavailable_backends

    native = module()
    info: dict[str, Any] = {"version": __version__, "compiled": native is not None, "reason": _reason}
    info |= {key: value for key, value in _build_record().items() if key != "skipped"}
    if native is not None:
        info |= {"isa": native.isa(), "threading": native.threading()}
    return info | {"backends": available_backends(), "unavailable": unavailable_backends()}
