"""What was compiled, and what runs here."""

from __future__ import annotations

from typing import Any

from . import _native
from ._version import __version__
from .backends import available_backends, unavailable_backends


def build_info() -> dict[str, Any]:
    """What was compiled and what runs here.

    Returns:
        A dictionary: ``version``; ``compiled`` (bool) and, where it is False, ``reason``; ``compiler`` and ``isas``
        (instruction sets in the binary) from the build; ``cuda`` (nvcc's version and the compute capabilities) or
        ``cuda_skipped`` (why there are no CUDA kernels); ``isa`` (the one in use), ``threading`` (whose threads the
        kernels run on); ``backends`` (available names) and ``unavailable`` (why another is not, by name).
    """
    native = _native.module()
    info: dict[str, Any] = {"version": __version__, "compiled": native is not None, "reason": _native.reason()}
    info |= {key: value for key, value in _native.build_record().items() if key != "skipped"}
    if native is not None:
        info |= {"isa": native.isa(), "threading": native.threading()}
    return info | {"backends": available_backends(), "unavailable": unavailable_backends()}
