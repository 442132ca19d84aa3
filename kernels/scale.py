"""Backward: a saved gradient times the incoming one."""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import narrow, widen


@triton.jit(do_not_specialize=["chunks"])
def scale_kernel(
    gradient,  # [B, N], dense; scaled in place
    upstream,  # [] (its stride 0) or [B]
    upstream_stride,
    scale,  # [B], or None: what a float16 gradient was stored without
    N,
    chunks,  # programs per sample
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Reads and writes nothing but the factor where that is 1."""
    index = tl.program_id(0).to(tl.int64)
    b = index // chunks
    factor = widen(tl.load(upstream + b * upstream_stride), C)
    if scale is not None:
        factor *= widen(tl.load(scale + b), C)
    if factor != 1.0:
        start = (index % chunks) * BLOCK
        lane = tl.arange(0, BLOCK)
        inside = lane < N - start
        at = gradient + b * N + start + lane
        value = widen(tl.load(at, mask=inside, other=0.0), C) * factor
        tl.store(at, narrow(value, gradient.dtype.element_ty), mask=inside)
