"""Where an operand's elements lie.

The elements of a sample are numbered 0 to N - 1, in the order in which the gradient lies in memory. An operand is
(pointer, strides), None where it is absent. It has one stride (from sample to sample: its elements then are dense in
that order, or, for a row operand, one number) or four, (sample, d1, d2, d3), over dimensions of sizes n1, n2, n3 whose
product is N.

``block`` is (b, start, lane [BLOCK], inside [BLOCK], n2, n3): the elements start + lane of sample b, those that exist.
b and start are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import narrow, widen


@triton.jit
def place(operand, block):
    """Addresses of the block's elements."""
    pointer, strides = operand
    b, start, lane, _, n2, n3 = block
    sample = pointer + b * strides[0]
    if len(strides) == 1:
        return sample + start + lane
    else:
        i = start + lane
        i1 = i // (tl.cast(n2, tl.int64) * n3)
        return sample + i1 * strides[1] + ((i // n3) % n2) * strides[2] + (i % n3) * strides[3]


@triton.jit
def elements(operand, block, C: tl.constexpr, EVICT: tl.constexpr):
    """[BLOCK] elements in the type computed in; 0 where there are none."""
    return widen(tl.load(place(operand, block), mask=block[3], other=0.0, eviction_policy=EVICT), C)


@triton.jit
def of_sample(operand, b, C: tl.constexpr):
    """A number for each sample."""
    return widen(tl.load(operand[0] + b * operand[1][0]), C)


@triton.jit
def row(operand, block, DEFAULT: tl.constexpr):
    """A coefficient, float64: a number where it is one for the sample, else [BLOCK]; DEFAULT where there is none."""
    if operand is None:
        return tl.full((), DEFAULT, tl.float64)
    elif len(operand[1]) == 1:
        return of_sample(operand, block[0], tl.float64)
    else:
        return widen(tl.load(place(operand, block), mask=block[3], other=1.0), tl.float64)


@triton.jit
def deliver(operand, block, value):
    """Stores a block, rounded."""
    tl.store(place(operand, block), narrow(value, operand[0].dtype.element_ty), mask=block[3])
