"""The CUDA C++ back end for CUDA tensors (csrc/cuda)."""

from __future__ import annotations

from .. import _native
from .._torch import capturing, exchange_device, raw_stream, restore_device
from ._cuda import Cuda

name = "cuda"

assert raw_stream is not None and capturing is not None  # PyTorch finds a GPU
assert exchange_device is not None and restore_device is not None
backend = Cuda(name, _native.module().cuda, raw_stream, capturing, exchange_device, restore_device)
