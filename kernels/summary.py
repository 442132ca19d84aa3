"""The loss of a batch and its statistics, from what was kept of each sample: in one program, in the samples' order."""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import is_finite, widen

# Rows of the scratch ``samples`` [FIELDS, B], float64:
#   0 the sample's part of the loss     4 its elements on the mask
#   1 sum of g^2                        5 its normaliser
#   2 sum of |g|                        6 its weight, where the kernel has made it
#   3 elements of g that are not finite
FIELDS = 7


@triton.jit
def column_sum(samples, FIELD: tl.constexpr, B):
    """Sum of a row of the scratch."""
    lane = tl.arange(0, 1024)
    result = tl.zeros((), tl.float64)
    for first in range(0, B, 1024):
        at = tl.cast(first, tl.int64) + lane
        result += tl.sum(tl.load(samples + FIELD * B + at, mask=at < B, other=0.0, cache_modifier=".cg"))
    return result


@triton.jit
def spread(values, n, default):
    """Minimum, maximum, sum, sum of squares and number of the finite ones of n values; of n times the default where
    there are none."""
    lane = tl.arange(0, 1024)
    low = tl.full((), float("inf"), tl.float64)
    high = tl.full((), -float("inf"), tl.float64)
    sum_ = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    number = tl.zeros((), tl.float64)
    for first in range(0, n, 1024):
        at = tl.cast(first, tl.int64) + lane
        inside = at < n
        v = tl.full([1024], default, tl.float64)
        if values is not None:
            v = widen(tl.load(values + at, mask=inside, other=0.0, cache_modifier=".cg"), tl.float64)
        finite = inside & is_finite(v)
        low = tl.minimum(low, tl.min(tl.where(finite, v, float("inf"))))
        high = tl.maximum(high, tl.max(tl.where(finite, v, -float("inf"))))
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
    return tl.where(number > 0, value, float("nan"))


@triton.jit
def summarize(
    loss_out,
    stats,
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
    loss = column_sum(samples, 0, B)
    if REDUCTION == "sample":
        loss = tl.where(B > 0, loss / B, 0.0)
    else:
        tl.store(loss_out, loss.to(loss_out.dtype.element_ty))
    if stats is not None:
        count = tl.maximum(column_sum(samples, 4, B), 1.0)
        put(stats, 0, loss)
        put(stats, 1, tl.sqrt(column_sum(samples, 1, B)))
        put(stats, 2, column_sum(samples, 2, B) / count)
        low, high, sum_, squares, number = spread(samples + 5 * B, B, 1.0)
        put(stats, 3, or_nan(low, number))
        put(stats, 4, sum_ / number)
        put(stats, 5, or_nan(high, number))
        if OWN_WEIGHTS:
            low, high, sum_, squares, number = spread(samples + 6 * B, B, 1.0)
        else:
            low, high, sum_, squares, number = spread(weight_rows, n_weight_rows, 1.0)
        put(stats, 6, or_nan(low, number))
        put(stats, 7, sum_ / number)
        put(stats, 8, or_nan(high, number))
        for i in tl.static_range(3):
            ratio = tl.full((), float("nan"), tl.float64)
            if ratio_stats is not None:
                ratio = tl.load(ratio_stats + i, cache_modifier=".cg")
            put(stats, 9 + i, ratio)
        put(stats, 12, sum_ * sum_ / squares)
        put(stats, 13, column_sum(samples, 3, B))
