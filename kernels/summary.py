"""The loss of a batch and its statistics, from what was kept of each sample: in one program, in the samples' order."""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import INFINITY, is_finite, widen

# Rows of the scratch ``samples`` [FIELDS, B], float64.
TERMS = tl.constexpr(0)  # the sample's part of the loss
SQUARES = tl.constexpr(1)  # sum of g^2
ABSOLUTE = tl.constexpr(2)  # sum of |g|
BAD = tl.constexpr(3)  # elements of g that are not finite
COUNT = tl.constexpr(4)  # elements on the mask
NORMALIZER_OF = tl.constexpr(5)
WEIGHT_OF = tl.constexpr(6)
FIELDS = tl.constexpr(7)

SAMPLE = tl.constexpr(2)  # reduction: fdistill_ops/params.py
ROWS = tl.constexpr(1024)


@triton.jit
def column_sum(samples, FIELD: tl.constexpr, B):
    """Sum of a row of the scratch."""
    lane = tl.arange(0, ROWS)
    result = tl.zeros((), tl.float64)
    for first in range(0, B, ROWS):
        at = tl.cast(first, tl.int64) + lane
        result += tl.sum(tl.load(samples + FIELD * B + at, mask=at < B, other=0.0, cache_modifier=".cg"))
    return result


@triton.jit
def spread(values, n, default):
    """Minimum, maximum, sum, sum of squares and number of the finite ones of n values; of n times the default where
    there are none."""
    lane = tl.arange(0, ROWS)
    low = tl.full((), INFINITY, tl.float64)
    high = tl.full((), -INFINITY, tl.float64)
    sum_ = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    number = tl.zeros((), tl.float64)
    for first in range(0, n, ROWS):
        at = tl.cast(first, tl.int64) + lane
        inside = at < n
        v = tl.full([ROWS], default, tl.float64)
        if values is not None:
            v = widen(tl.load(values + at, mask=inside, other=0.0, cache_modifier=".cg"), tl.float64)
        finite = inside & is_finite(v)
        low = tl.minimum(low, tl.min(tl.where(finite, v, INFINITY)))
        high = tl.maximum(high, tl.max(tl.where(finite, v, -INFINITY)))
        v = tl.where(finite, v, 0.0)
        sum_ += tl.sum(v)
        squares += tl.sum(v * v)
        number += tl.sum(finite.to(tl.float64))
    return low, high, sum_, squares, number


@triton.jit
def put(stats, i, value):
    tl.store(stats + i, value.to(stats.dtype.element_ty))


@triton.jit
def or_nan(value, number):
    return tl.where(number > 0, value, INFINITY - INFINITY)


@triton.jit
def summarize(
    results,
    samples,
    weight_rows,
    n_weight_rows,
    ratio_stats,
    B,
    N,
    REDUCTION: tl.constexpr,
    OWN_WEIGHTS: tl.constexpr,
):
    """Stores the loss, unless each sample has its own, and the statistics in the order of fdistill_ops/stats.py. Those
    of the weights are of the scratch's, if the kernel has made its own, else of weight_rows, else of B ones."""
    loss = column_sum(samples, TERMS, B)
    if REDUCTION == SAMPLE:
        loss = tl.where(B > 0, loss / B, 0.0)
    else:
        tl.store(results[0], loss.to(results[0].dtype.element_ty))
    stats = results[2]
    if stats is not None:
        count = tl.maximum(column_sum(samples, COUNT, B), 1.0)
        put(stats, 0, loss)
        put(stats, 1, tl.sqrt(column_sum(samples, SQUARES, B)))
        put(stats, 2, column_sum(samples, ABSOLUTE, B) / count)
        low, high, sum_, squares, number = spread(samples + NORMALIZER_OF * B, tl.where(N > 0, B, 0), 1.0)
        put(stats, 3, or_nan(low, number))
        put(stats, 4, sum_ / number)
        put(stats, 5, or_nan(high, number))
        if OWN_WEIGHTS:
            low, high, sum_, squares, number = spread(samples + WEIGHT_OF * B, B, 1.0)
        else:
            low, high, sum_, squares, number = spread(weight_rows, n_weight_rows, 1.0)
        put(stats, 6, or_nan(low, number))
        put(stats, 7, sum_ / number)
        put(stats, 8, or_nan(high, number))
        for i in tl.static_range(3):
            ratio = tl.full((), INFINITY - INFINITY, tl.float64)
            if ratio_stats is not None:
                ratio = tl.load(ratio_stats + i, cache_modifier=".cg")
            put(stats, 9 + i, ratio)
        put(stats, 12, sum_ * sum_ / squares)
        put(stats, 13, column_sum(samples, BAD, B))
