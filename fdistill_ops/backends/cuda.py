"""The CUDA C++ back end for CUDA tensors (csrc/cuda)."""

from __future__ import annotations

import torch

from .. import _native
from ._cuda import Cuda

name = "cuda"

_cuda = Cuda(
    _native.module().cuda,
    torch._C._cuda_getCurrentRawStream,
    torch._C._cuda_isCurrentStreamCapturing,
    torch._C._cuda_exchangeDevice,
    torch._C._cuda_maybeExchangeDevice,  # not where it would make a context on a device that has none
)
f_weights = _cuda.f_weights
distribution_matching = _cuda.distribution_matching
difference = _cuda.difference
f_distill = _cuda.f_distill
score_identity = _cuda.score_identity
scale_gradient = _cuda.scale_gradient
empty_cache = _cuda.empty_cache
