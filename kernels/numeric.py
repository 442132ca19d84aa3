"""Numbers inside the kernels: conversions, what is finite, powers of two.

Kernels use few global constants: Triton compares every one with its value at compile time at each launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def number(value, C: tl.constexpr):
    """A scalar argument in the type computed in."""
    return tl.full((), value, C)


@triton.jit
def is_finite(v):
    return tl.abs(v) < float("inf")


@triton.jit
def widen(v, C: tl.constexpr):
    """Loaded elements in the type computed in."""
    if INTERPRETED and v.dtype == tl.bfloat16:  # whose own conversion loses subnormals
        v = (v.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return v.to(C)


@triton.jit
def narrow(v, T: tl.constexpr):
    """Rounded to the type to be stored, once and to nearest even."""
    if v.dtype == tl.float64 and (tl.bfloat16 == T or tl.float16 == T):
        v = rounded_to_odd(v)
    if INTERPRETED and tl.bfloat16 == T:  # whose own conversion truncates
        bits = v.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(v == v, rounded, bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(T)


@triton.jit
def rounded_to_odd(v):
    """float64 to float32 such that rounding again, to fewer bits, is right."""
    nearest = v.to(tl.float32)
    back = nearest.to(tl.float64)
    bits = nearest.to(tl.int32, bitcast=True)
    odd = (tl.where(tl.abs(back) > tl.abs(v), bits - 1, bits) | 1).to(tl.float32, bitcast=True)
    return tl.where((back == v) | (v != v) | (tl.abs(back) == float("inf")), nearest, odd)


@triton.jit
def exponent_of(v):
    """floor(log2 v) of positive, normal float64."""
    return (v.to(tl.int64, bitcast=True) >> 52) - 1023


@triton.jit
def power_of_two(k):
    """2^k for int64 k in [-1022, 1023], float64."""
    return ((k + 1023) << 52).to(tl.float64, bitcast=True)
