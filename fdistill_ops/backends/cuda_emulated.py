"""The CUDA kernels on CPU tensors, in the emulator of csrc/emulator: for tests alone, and only where it was built
(FDISTILL_EMULATOR=1)."""

from __future__ import annotations

from .. import _native
from ._cuda import Cuda

name = "cuda-emulated"

_emulated = Cuda(_native.emulator(), lambda device: 0, lambda: False, lambda device: device, lambda device: device)
f_weights = _emulated.f_weights
distribution_matching = _emulated.distribution_matching
difference = _emulated.difference
f_distill = _emulated.f_distill
score_identity = _emulated.score_identity
scale_gradient = _emulated.scale_gradient
empty_cache = _emulated.empty_cache
