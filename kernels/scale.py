"""Backward: a saved gradient times the incoming one."""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import narrow, widen


@triton.jit(
    do_not_specialize=["upstream_stride", "chunks", "total"],
    do_not_specialize_on_alignment=["upstream", "scale"],  # views of anything, read one by one
)
def scale_kernel(
    gradient,  # [B, N], dense; scaled in place
    upstream,  # [] (its stride 0) or [B]
    upstream_stride,
    scale,  # [B], or None: what a float16 gradient was stored without
    N,
    chunks,  # of a sample
    total,  # chunks of all samples
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Chunk after chunk in as many programs as run at once. Reads and writes nothing but the factor where that is 1."""
    for index in range(tl.program_id(0), total, tl.num_programs(0)):
        b = tl.cast(index // chunks, tl.int64)
        factor = widen(tl.load(upstream + b * upstream_stride), C)
        if scale is not None:
            factor *= widen(tl.load(scale + b), C)
        if factor != 1.0:
            start = tl.cast(index % chunks, tl.int64) * BLOCK
            lane = tl.arange(0, BLOCK)
            inside = lane < N - start
            at = gradient + b * N + start + lane
            value = widen(tl.load(at, mask=inside, other=0.0), C) * factor
            tl.store(at, narrow(value, gradient.dtype.element_ty), mask=inside)
