"""The CUDA kernels on CPU tensors, in the emulator of csrc/emulator: for tests alone, and only where it was built
(FDISTILL_EMULATOR=1)."""

from __future__ import annotations

from .. import _native
from ._cuda import Cuda

name = "cuda-emulated"

backend = Cuda(name, _native.emulator(), lambda device: 0, lambda: False, lambda device: device, lambda device: device)
