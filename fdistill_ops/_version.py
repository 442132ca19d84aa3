"""The version: what the build wrote down (csrc/version.py, from git's tags) or, without a build, the next one."""

from __future__ import annotations

from ._native import build_record

NEXT = "0.1.0"
__version__: str = build_record().get("version", NEXT)
