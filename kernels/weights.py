"""f-weights of a batch (f-distill, arXiv 2502.15681, Algorithm 1) and the histogram of the ratio over time.

The B log-ratios are few, so a program that needs a weight computes what the batch shares from all of them, in a fixed
order, in float64: no atomics, no second launch.

``source`` is (logits [B, heads], their strides, t [B] or None, its stride); ``numbers`` are the floats of WeightParams
(fdistill_ops/params.py), which a kernel takes one by one: (low, high, min_t, max_t, ema_rate, eps, a).

``histogram`` is None or (bins, new_bins, log_bins): the old and the new one, float32, and scratch [programs, n_bins],
float64, for log(bin + eps) of the new one before it is rounded. Of many bins a program holds but a part at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import is_finite, number, widen


@triton.jit
def h_of(KIND: tl.constexpr, log_r, a):
    """h(r) = f''(r) r^2 from l = log r; kinds as in fdistill_ops/divergences.py."""
    if KIND == 0:  # reverse KL: 1
        return tl.full(log_r.shape, 1.0, tl.float64)
    elif KIND == 1:  # forward KL: r
        return tl.exp(log_r)
    elif KIND == 2:  # Jensen-Shannon: r / (r+1)
        return sigmoid(log_r)
    elif KIND == 3:  # softened reverse KL: 1 / (r+1)
        return sigmoid(-log_r)
    elif KIND == 4:  # squared Hellinger: sqrt(r) / 4
        return tl.exp(log_r * 0.5) * 0.25
    elif KIND == 5:  # Jeffreys: r + 1
        return tl.exp(log_r) + 1.0
    elif KIND == 6:  # Neyman: 2 / r
        return 2.0 * tl.exp(-log_r)
    elif KIND == 7:  # Pearson: 2 r^2
        return 2.0 * tl.exp(2.0 * log_r)
    else:  # alpha: r^a
        return tl.exp(log_r * number(a, tl.float64))


@triton.jit
def sigmoid(log_r):
    e = tl.exp(-tl.abs(log_r))
    return tl.where(log_r < 0, e, 1.0) / (1.0 + e)


@triton.jit
def log_ratios(source, heads, numbers, samples, inside):
    """The mean logit of each sample, clamped, float64; whether it counts (is finite, with a time that is a number);
    whether it was below the bounds, above them."""
    at = source[0] + samples.to(tl.int64) * source[1][0]
    sum_ = tl.zeros(samples.shape, tl.float64)
    for k in range(heads):
        sum_ += widen(tl.load(at + tl.cast(k, tl.int64) * source[1][1], mask=inside, other=0.0), tl.float64)
    log_r = sum_ / heads
    if source[0].dtype.element_ty != tl.float64:
        log_r = log_r.to(tl.float32).to(tl.float64)
    counts = inside & is_finite(log_r)
    if source[2] is not None:
        t = times(source, samples, inside)
        counts = counts & (t == t)
    low, high = number(numbers[0], tl.float64), number(numbers[1], tl.float64)
    log_r = tl.where(counts, log_r, 0.0)
    return tl.minimum(tl.maximum(log_r, low), high), counts, counts & (log_r < low), counts & (log_r > high)


@triton.jit
def times(source, samples, inside):
    return widen(tl.load(source[2] + samples.to(tl.int64) * source[3], mask=inside, other=0), tl.float64)


@triton.jit
def time_bins(source, n_bins, numbers, samples, inside):
    """Which of n equal bins over [min_t, max_t] each sample is in; times outside count in the first or last one."""
    min_t, max_t = number(numbers[2], tl.float64), number(numbers[3], tl.float64)
    position = tl.floor((times(source, samples, inside) - min_t) / ((max_t - min_t) / n_bins))
    position = tl.where(position > 0, position, 0.0)  # NaN too
    return tl.where(position < n_bins, position, n_bins - 1.0).to(tl.int32)


@triton.jit
def total(values):
    return tl.sum(values.to(tl.float64), 0)


@triton.jit
def nothing():
    return tl.zeros((), tl.float64)


@triton.jit
def batch_statistics(
    source,
    histogram,
    ratio_stats,
    B,
    heads,
    n_bins,
    numbers,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BINS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What the weights of a batch share: the histogram, BINS of it at a time, and the divisor of h, which is returned.
    The first program also keeps the new bins and [ratio mean, fraction clamped from below, from above]."""
    lane = tl.arange(0, ROWS)
    eps = number(numbers[5], tl.float64)
    keeps = tl.program_id(0) == 0
    ratio_sum, n_below, n_above, n_counted = nothing(), nothing(), nothing(), nothing()
    for first_bin in range(0, tl.maximum(n_bins, 1), BINS):
        slot = first_bin + tl.arange(0, BINS)
        ratio_sum, n_below, n_above, n_counted = nothing(), nothing(), nothing(), nothing()  # as for the other bins
        bin_count = tl.zeros([BINS], tl.float64)
        bin_sum = tl.zeros([BINS], tl.float64)
        for first in range(0, B, ROWS):
            samples = first + lane
            inside = samples < B
            log_r, counts, below, above = log_ratios(source, heads, numbers, samples, inside)
            ratio = tl.where(counts, tl.exp(tl.minimum(log_r, 88.0)), 0.0)  # bounded, so that the sums stay finite
            ratio_sum += total(ratio)
            n_below += total(below)
            n_above += total(above)
            n_counted += total(counts)
            if histogram is not None:
                mine = time_bins(source, n_bins, numbers, samples, inside)
                member = (mine[:, None] == slot[None, :]) & counts[:, None]
                bin_count += total(member)
                bin_sum += total(tl.where(member, ratio[:, None], 0.0))
        if histogram is not None:  # bins[i] <- ema bins[i] + (1 - ema) mean_i where count_i > 0
            bins, new_bins, log_bins = histogram
            old = tl.load(bins + slot, mask=slot < n_bins, other=1.0).to(tl.float64)
            old = tl.where(is_finite(old) & (old >= 0), old, 1.0)  # otherwise never filled
            ema_rate = number(numbers[4], tl.float64)
            mixed = ema_rate * old + (1.0 - ema_rate) * (bin_sum / tl.maximum(bin_count, 1.0))
            new = tl.where(bin_count > 0, mixed, old)
            tl.store(own_bins(log_bins, n_bins) + slot, tl.log(new + eps), mask=slot < n_bins)
            tl.store(new_bins + slot, new.to(tl.float32), mask=(slot < n_bins) & keeps)
    tl.store(ratio_stats, ratio_sum / n_counted, mask=keeps)
    tl.store(ratio_stats + 1, n_below / n_counted, mask=keeps)
    tl.store(ratio_stats + 2, n_above / n_counted, mask=keeps)
    if histogram is not None:
        tl.debug_barrier()  # what a thread reads of the bins, others have written

    # w <- w / (mean w + eps)
    divisor = tl.full((), 1.0, tl.float64)
    if NORMALIZE:
        h_sum, n_finite = nothing(), nothing()
        for first in range(0, B, ROWS):
            samples = first + lane
            h, counts = unnormalized(source, histogram, heads, n_bins, numbers, samples, samples < B, KIND)
            counts = counts & is_finite(h)
            h_sum += total(tl.where(counts, h, 0.0))
            n_finite += total(counts)
        divisor = h_sum / tl.maximum(n_finite, 1.0) + eps
    return divisor


@triton.jit
def own_bins(log_bins, n_bins):
    """log(bin + eps) of every bin, as this program wrote them."""
    return log_bins + tl.program_id(0).to(tl.int64) * n_bins


@triton.jit
def unnormalized(source, histogram, heads, n_bins, numbers, samples, inside, KIND: tl.constexpr):
    """h of some samples, with the histogram of batch_statistics; and whether they count."""
    log_r, counts, _, _ = log_ratios(source, heads, numbers, samples, inside)
    if histogram is not None:
        mine = time_bins(source, n_bins, numbers, samples, inside)
        log_r -= tl.load(own_bins(histogram[2], n_bins) + mine, mask=inside, other=0.0)
    return h_of(KIND, log_r, numbers[6]), counts


@triton.jit
def sample_weights(
    source,
    histogram,
    heads,
    n_bins,
    numbers,
    samples,
    inside,
    divisor,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
):
    """The weights of some samples, rounded to float32 unless the logits are float64, as float64."""
    h, counts = unnormalized(source, histogram, heads, n_bins, numbers, samples, inside, KIND)
    w = tl.where(counts, h / divisor, float("nan"))
    if source[0].dtype.element_ty != tl.float64:
        w = w.to(tl.float32).to(tl.float64)
    if ZERO:
        w = tl.where(is_finite(w), w, 0.0)
    return w


@triton.jit(do_not_specialize=["B", "heads", "n_bins"])
def f_weights_kernel(
    source,
    histogram,
    ratio_stats,  # [3] float64
    weights,  # [B]
    B,
    heads,
    n_bins,
    low: tl.float64,
    high: tl.float64,
    min_t: tl.float64,
    max_t: tl.float64,
    ema_rate: tl.float64,
    eps: tl.float64,
    a: tl.float64,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BINS: tl.constexpr,
    WEIGHT_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program."""
    numbers = (low, high, min_t, max_t, ema_rate, eps, a)
    divisor = batch_statistics(source, histogram, ratio_stats, B, heads, n_bins, numbers, KIND, NORMALIZE, BINS, ROWS)
    lane = tl.arange(0, ROWS)
    for first in range(0, B, ROWS):
        samples = first + lane
        inside = samples < B
        w = sample_weights(source, histogram, heads, n_bins, numbers, samples, inside, divisor, KIND, WEIGHT_ZERO)
        tl.store(weights + samples, w.to(weights.dtype.element_ty), mask=inside)
