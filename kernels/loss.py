"""The losses: one program per sample where a sample fits in a program's registers, several otherwise.

Formulas (x, T teacher, F fake, w weight; fdistill_ops/losses.py has their sources):

    T     = uncond + s (teacher - uncond);  as x0:  a x_t + c T
    n_b   = mean |x - (a x_t + c T)|
    g     = w c / (n_b + eps) (F - T)                      distribution matching: the term g^2 / 2 has the derivative g
    term  = k (T - F) ((T - x) - alpha (T - F)), k = w / (n_b + eps)                                     score identity

``inputs`` are the operands (memory.py) x, teacher, fake, uncond, x_t, mask, weight, alpha, sigma, guidance, normalizer;
``targets`` those for the derivatives with respect to x, teacher and fake; ``results`` are pointers to the loss [] or
[B], the scale of float16 gradients [B] and the statistics. None for what is absent. Every sum is taken in a fixed
order, whoever takes it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import deliver, elements, of_sample, place, row
from .numeric import exponent_of, is_finite, number, power_of_two
from .summary import summarize
from .weights import batch_statistics, nothing, sample_weights

# The counters of chunk_kernel: tickets, programs that are done; then [B] chunks measured, [B] chunks finished.
N_COUNTERS = 2


# --------------------------------------------------------------------------------------------------------- one block


@triton.jit
def x0_coefficients(alpha, sigma, block, PREDICTION: tl.constexpr):
    """a and c of x0 = a x_t + c prediction, float64: numbers, or [BLOCK]."""
    alpha, sigma = row(alpha, block, 1.0), row(sigma, block, 0.0)
    if PREDICTION == "x0":
        return sigma, alpha  # 0 and 1
    elif PREDICTION == "eps":  # (x_t - sigma eps) / alpha
        return 1.0 / alpha, -sigma / alpha
    elif PREDICTION == "v":  # (alpha x_t - sigma v) / (alpha^2 + sigma^2)
        power = alpha * alpha + sigma * sigma
        return alpha / power, -sigma / power
    elif PREDICTION == "flow":  # (x_t - sigma u) / (alpha + sigma)
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    else:  # score: (x_t + sigma^2 score) / alpha
        return 1.0 / alpha, sigma * sigma / alpha


@triton.jit
def teacher_prediction(teacher, uncond, guidance, guidance_scale, block, C: tl.constexpr, EVICT: tl.constexpr):
    """T before its conversion to x0, guided where there is an unconditional prediction."""
    T = elements(teacher, block, C, EVICT)
    if uncond is not None:
        U = elements(uncond, block, C, EVICT)
        s = number(guidance_scale, C) if guidance is None else of_sample(guidance, block[0], C)
        T = U + s * (T - U)
    return T


@triton.jit
def distances(x_t, block, x, T, a, c, C: tl.constexpr):
    """|x - T|, T as x0; 0 outside."""
    if x_t is not None:
        T = a.to(C) * elements(x_t, block, C, "evict_first") + c.to(C) * T
    return tl.where(block[3], tl.abs(x - T), 0.0)


@triton.jit
def counted(mask, block):
    """Which elements exist and are on the mask."""
    if mask is not None:
        return block[3] & (tl.load(place(mask, block), mask=block[3], other=0) != 0)
    else:
        return block[3]


@triton.jit
def evaluate(X, T, F, k, on, identity_alpha, C: tl.constexpr, IDENTITY: tl.constexpr, ZERO: tl.constexpr):
    """The terms of the loss (score identity) and its derivatives with respect to x, T and F (distribution matching: x
    alone), all 0 where they do not count; and which elements count and are not finite."""
    if IDENTITY:
        alpha = number(identity_alpha, C)
        difference = T - F
        residual = (T - X) - alpha * difference
        terms = k * difference * residual
        d_x = -k * difference
        d_teacher = k * (difference + residual - alpha * difference)
        d_fake = -k * (residual - alpha * difference)
        good = is_finite(terms) & is_finite(d_x) & is_finite(d_teacher) & is_finite(d_fake)
    else:
        d_x = k * (F - T)
        good = is_finite(d_x)
    bad = on & (good == 0)
    if ZERO:
        on = on & good
    d_x = tl.where(on, d_x, 0.0)
    if IDENTITY:
        return tl.where(on, terms, 0.0), d_x, tl.where(on, d_teacher, 0.0), tl.where(on, d_fake, 0.0), bad
    else:
        return d_x, d_x, d_x, d_x, bad


@triton.jit
def block_sums(terms, d_x, IDENTITY: tl.constexpr, STATS: tl.constexpr):
    """The block's part of the loss, and of the sum of g^2: float64, which squares of float32 do not leave."""
    squares = nothing()
    if STATS or not IDENTITY:
        wide = d_x.to(tl.float64)
        squares = tl.sum(wide * wide)
    if IDENTITY:
        return tl.sum(terms).to(tl.float64), squares
    else:
        return 0.5 * squares, squares


@triton.jit
def largest(targets, d_x, d_teacher, d_fake, IDENTITY: tl.constexpr):
    """The largest finite derivative of those that are stored as float16, float64."""
    most = tl.zeros_like(d_x)
    most = larger(most, targets[0], d_x)
    if IDENTITY:
        most = larger(most, targets[1], d_teacher)
        most = larger(most, targets[2], d_fake)
    return tl.max(most).to(tl.float64)


@triton.jit
def larger(most, target, derivative):
    if target is not None:  # noqa: SIM102, both parts of an `and` would be compiled
        if target[0].dtype.element_ty == tl.float16:
            most = tl.maximum(most, tl.where(is_finite(derivative), tl.abs(derivative), 0.0))
    return most


@triton.jit
def half_exponent(most):
    """k such that most * 2^k nears float16's largest. A mean's float16 gradient would underflow as it is."""
    k = tl.minimum(tl.maximum(14 - exponent_of(most), -120), 120)
    return tl.where((most > 0) & is_finite(most), k, 0)


@triton.jit
def deliver_mean(target, block, derivative, divisor, half, C: tl.constexpr):
    """Stores a derivative of the mean, where it is wanted; a float16 one times 2^half."""
    if target is not None:
        factor = 1.0 / divisor
        if target[0].dtype.element_ty == tl.float16:
            factor *= power_of_two(half)
        deliver(target, block, derivative * factor.to(C))


@triton.jit
def deliver_all(targets, block, d_x, d_teacher, d_fake, divisor, half, C: tl.constexpr, IDENTITY: tl.constexpr):
    deliver_mean(targets[0], block, d_x, divisor, half, C)
    if IDENTITY:
        deliver_mean(targets[1], block, d_teacher, divisor, half, C)
        deliver_mean(targets[2], block, d_fake, divisor, half, C)


# -------------------------------------------------------------------------------------------------------- one sample


@triton.jit
def given_normalizer(normalizer, b):
    if normalizer is None:
        return tl.full((), 1.0, tl.float64)
    else:
        return of_sample(normalizer, b, tl.float64)


@triton.jit
def mean_divisor(count, b, B, N, REDUCTION: tl.constexpr):
    """The number of elements the loss is a mean over, at least 1. count: how many are on the mask, in all or [B]."""
    if REDUCTION == "sum":
        n = tl.full((), 1.0, tl.float64)
    elif count is not None:
        n = tl.load(count + (b if REDUCTION == "sample" else 0)).to(tl.float64)
    elif REDUCTION == "sample":
        n = tl.cast(N, tl.float64)
    else:
        n = tl.cast(N, tl.float64) * tl.cast(B, tl.float64)
    return tl.maximum(n, 1.0)


@triton.jit
def keep_sample(results, samples, b, B, term_sum, divisor, half, REDUCTION: tl.constexpr):
    """Stores a sample's part of the loss, its own loss, and the factor its float16 gradient was stored without."""
    loss, scale, _ = results
    tl.store(samples + b, term_sum / divisor)
    if REDUCTION == "sample":
        tl.store(loss + b, (term_sum / divisor).to(loss.dtype.element_ty))
    if scale is not None:
        tl.store(scale + b, power_of_two(-half).to(scale.dtype.element_ty))


@triton.jit(do_not_specialize=["B", "heads", "n_bins", "n_weight_rows"])
def sample_kernel(
    inputs,
    targets,
    results,
    count,  # int64: elements on the mask, where the loss is a mean over them all; else None
    weight_rows,  # the weight's rows, densely, for the statistics; None for none
    n_weight_rows,
    ratio_stats,  # [3] float64, or None
    B,
    N,
    n2,
    n3,
    eps: tl.float64,
    guidance_scale: tl.float64,
    identity_alpha: tl.float64,
    samples,  # [FIELDS, B] float64, scratch
    exited,  # int64, 0 before and after
    source,  # logits that give the weights, or None
    histogram,  # (both as in weights.py)
    heads,
    n_bins,
    low: tl.float64,
    high: tl.float64,
    min_t: tl.float64,
    max_t: tl.float64,
    ema_rate: tl.float64,
    weight_eps: tl.float64,
    a_parameter: tl.float64,
    C: tl.constexpr,
    PREDICTION: tl.constexpr,
    NORM: tl.constexpr,
    REDUCTION: tl.constexpr,
    ZERO: tl.constexpr,
    IDENTITY: tl.constexpr,
    KIND: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BINS: tl.constexpr,
    WEIGHT_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sample after sample in one program's registers: each operand is read once."""
    if source is not None:
        numbers = (low, high, min_t, max_t, ema_rate, weight_eps, a_parameter)
        weight_divisor = batch_statistics(
            source, histogram, ratio_stats, B, heads, n_bins, numbers, KIND, NORMALIZE, BINS, ROWS
        )

    x, teacher, fake, uncond, x_t, mask, weight, alpha, sigma, guidance, normalizer = inputs
    loss, scale, stats = results
    lane = tl.arange(0, BLOCK)
    for index in range(tl.program_id(0), B, tl.num_programs(0)):
        b = tl.cast(index, tl.int64)
        block = (b, tl.zeros((), tl.int64), lane, lane < N, n2, n3)
        if source is not None:
            one = b + tl.arange(0, 1)
            w = tl.sum(
                sample_weights(
                    source, histogram, heads, n_bins, numbers, one, one < B, weight_divisor, KIND, WEIGHT_ZERO
                )
            )
        else:
            w = row(weight, block, 1.0)
        a, c = x0_coefficients(alpha, sigma, block, PREDICTION)
        T = teacher_prediction(teacher, uncond, guidance, guidance_scale, block, C, "")
        X = T if x is None else elements(x, block, C, "")
        if NORM == "mean_abs":
            apart = distances(x_t, block, X, T, a, c, C)
            F = elements(fake, block, C, "")
            n = tl.sum(apart).to(tl.float64) / N
        else:
            F = elements(fake, block, C, "")
            n = given_normalizer(normalizer, b)
        on = counted(mask, block)
        k = (w * c / (n + number(eps, tl.float64))).to(C)
        terms, d_x, d_teacher, d_fake, bad = evaluate(X, T, F, k, on, identity_alpha, C, IDENTITY, ZERO)

        if stats is not None:
            tl.store(samples + 3 * B + b, tl.sum(bad.to(tl.int32)).to(tl.float64))
            tl.store(samples + 5 * B + b, n)
            if source is not None:
                tl.store(samples + 6 * B + b, w)
        n_on = tl.cast(N, tl.float64) if mask is None else tl.sum(on.to(tl.int32)).to(tl.float64)
        divisor = tl.maximum(n_on, 1.0) if REDUCTION == "sample" else mean_divisor(count, b, B, N, REDUCTION)
        half = tl.zeros((), tl.int64)
        if scale is not None:
            half = half_exponent(largest(targets, d_x, d_teacher, d_fake, IDENTITY) / divisor)
        deliver_all(targets, block, d_x, d_teacher, d_fake, divisor, half, C, IDENTITY)

        term_sum, squares = block_sums(terms, d_x, IDENTITY, stats is not None)
        keep_sample(results, samples, b, B, term_sum, divisor, half, REDUCTION)
        if stats is not None:
            tl.store(samples + 4 * B + b, n_on)
            tl.store(samples + B + b, squares)
            tl.store(samples + 2 * B + b, tl.sum(tl.abs(d_x)).to(tl.float64))

    tl.debug_barrier()
    if tl.atomic_add(exited, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        OWN: tl.constexpr = source is not None
        summarize(loss, stats, samples, weight_rows, n_weight_rows, ratio_stats, B, N, REDUCTION, OWN)
        tl.store(exited, 0)


# ---------------------------------------------------------------------------------------------- a sample in chunks


@triton.jit
def block_of(chunk, step, BLOCK: tl.constexpr):
    """A block (memory.py) of a chunk, which is (sample, first element, number of blocks, N, n2, n3)."""
    b, first, _steps, N, n2, n3 = chunk
    start = first + step * BLOCK
    lane = tl.arange(0, BLOCK)
    return b, start, lane, lane < N - start, n2, n3


@triton.jit
def measure_chunk(
    inputs,
    targets,
    measured,
    chunk,
    numbers,
    HALF: tl.constexpr,
    C: tl.constexpr,
    PREDICTION: tl.constexpr,
    NORM: tl.constexpr,
    ZERO: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the sum of |x - T| and, for float16 gradients, the largest derivative times n_b + eps."""
    x, teacher, fake, uncond, x_t, mask, weight, alpha, sigma, guidance, _normalizer = inputs
    _eps, guidance_scale, identity_alpha = numbers
    apart, most = nothing(), nothing()
    for step in range(chunk[2]):
        block = block_of(chunk, step, BLOCK)
        a, c = x0_coefficients(alpha, sigma, block, PREDICTION)
        T = teacher_prediction(teacher, uncond, guidance, guidance_scale, block, C, "evict_last")
        X = T if x is None else elements(x, block, C, "evict_last" if IDENTITY else "evict_first")
        if NORM == "mean_abs":
            apart += tl.sum(distances(x_t, block, X, T, a, c, C)).to(tl.float64)
        if HALF:
            F = elements(fake, block, C, "evict_last")
            k = (row(weight, block, 1.0) * c).to(C)
            _terms, d_x, d_teacher, d_fake, _bad = evaluate(
                X, T, F, k, counted(mask, block), identity_alpha, C, IDENTITY, ZERO
            )
            most = tl.maximum(most, largest(targets, d_x, d_teacher, d_fake, IDENTITY))
    tl.store(measured, apart)
    tl.store(measured + 1, most)


@triton.jit
def finish_chunk(
    inputs,
    targets,
    results,
    finished,
    chunk,
    numbers,
    n,
    divisor,
    half,
    C: tl.constexpr,
    PREDICTION: tl.constexpr,
    ZERO: tl.constexpr,
    IDENTITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores the derivatives of a chunk, and its sums."""
    x, teacher, fake, uncond, _x_t, mask, weight, alpha, sigma, guidance, _normalizer = inputs
    eps, guidance_scale, identity_alpha = numbers
    stats = results[2]
    term_sum, squares, absolute, n_bad, n_on = nothing(), nothing(), nothing(), nothing(), nothing()
    for step in range(chunk[2]):
        block = block_of(chunk, step, BLOCK)
        w = row(weight, block, 1.0)
        _a, c = x0_coefficients(alpha, sigma, block, PREDICTION)
        T = teacher_prediction(teacher, uncond, guidance, guidance_scale, block, C, "evict_first")
        F = elements(fake, block, C, "evict_first")
        X = elements(x, block, C, "evict_first") if IDENTITY else F
        on = counted(mask, block)
        k = (w * c / (n + number(eps, tl.float64))).to(C)
        terms, d_x, d_teacher, d_fake, bad = evaluate(X, T, F, k, on, identity_alpha, C, IDENTITY, ZERO)
        deliver_all(targets, block, d_x, d_teacher, d_fake, divisor, half, C, IDENTITY)
        more, more_squares = block_sums(terms, d_x, IDENTITY, stats is not None)
        term_sum += more
        if stats is not None:
            squares += more_squares
            absolute += tl.sum(tl.abs(d_x)).to(tl.float64)
            n_bad += tl.sum(bad.to(tl.int32)).to(tl.float64)
            n_on += tl.sum(on.to(tl.int32)).to(tl.float64)
    tl.store(finished, term_sum)
    if stats is not None:
        tl.store(finished + 1, squares)
        tl.store(finished + 2, absolute)
        tl.store(finished + 3, n_bad)
        tl.store(finished + 4, n_on)


@triton.jit
def parts_of(first, stride: tl.constexpr, n, PARTS: tl.constexpr):
    """What other programs have stored for n chunks; then zeros."""
    part = tl.arange(0, PARTS)
    return tl.load(first + part * stride, mask=part < n, other=0.0, cache_modifier=".cg")


@triton.jit(
    do_not_specialize=["B", "chunks", "steps", "group", "groups", "n_weight_rows"],
    do_not_specialize_on_alignment=["measured", "finished"],  # where they begin depends on the batch size
)
def chunk_kernel(
    inputs,
    targets,
    results,
    count,  # int64 [] or [B]: elements on the mask, where the loss is a mean over them; else None
    weight_rows,  # (this and the next two as above)
    n_weight_rows,
    ratio_stats,
    B,
    N,
    n2,
    n3,
    eps: tl.float64,
    guidance_scale: tl.float64,
    identity_alpha: tl.float64,
    samples,  # [FIELDS, B] float64, scratch
    measured,  # [B, chunks, 2] float64, scratch
    finished,  # [B, chunks, 5] float64, scratch
    counters,  # [2 + 2 B] int64, 0 before and after
    chunks,  # of a sample, at most PARTS
    steps,  # blocks of a chunk
    group,  # samples
    groups,
    C: tl.constexpr,
    PREDICTION: tl.constexpr,
    NORM: tl.constexpr,
    REDUCTION: tl.constexpr,
    ZERO: tl.constexpr,
    IDENTITY: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk of a sample per program, twice: one program measures it (for n_b, and the scale of a float16 gradient),
    another finishes it once all chunks of the sample are measured.

    The work is handed out by tickets, in groups of samples: measure group 0, measure 1, finish 0, measure 2, finish 1,
    ... so that what is read twice is still in the cache the second time. A program waits only for earlier tickets,
    whose programs have started: none waits for ever, in whatever order the programs start."""
    normalizer = inputs[10]
    loss, scale, stats = results
    HALF: tl.constexpr = scale is not None
    MEASURE: tl.constexpr = HALF or NORM == "mean_abs"
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    place = ticket // chunks  # among the samples of all turns
    if MEASURE:
        # The last group may be smaller. What comes after it is measured moves on by what it lacks.
        lacking = groups * group - B
        place += tl.where(place >= (2 * groups - 2) * group - lacking, lacking, 0)
    turn = place // group
    if MEASURE:
        last = turn == 2 * groups - 1
        measures = (turn == 0) | ((turn % 2 == 1) & (last == 0))
        of = tl.where(last, groups - 1, tl.where(measures, (turn + 1) // 2, turn // 2 - 1))
    else:
        measures = turn < 0
        of = turn
    b = of * group + place % group
    index = ticket % chunks
    chunk = (b, index * steps * BLOCK, steps, N, n2, n3)
    numbers = (eps, guidance_scale, identity_alpha)
    if b < B:
        n_measured = counters + 2 + b
        n_finished = n_measured + B
        own = measured + (b * chunks + index) * 2
        if measures:
            measure_chunk(inputs, targets, own, chunk, numbers, HALF, C, PREDICTION, NORM, ZERO, IDENTITY, BLOCK)
            tl.debug_barrier()
            tl.atomic_add(n_measured, 1, sem="release")
        else:
            n = given_normalizer(normalizer, b)
            divisor = mean_divisor(count, b, B, N, REDUCTION)
            half = tl.zeros((), tl.int64)
            if MEASURE:
                while tl.atomic_add(n_measured, 0, sem="acquire") < chunks:
                    pass
                first = measured + b * chunks * 2
                if NORM == "mean_abs":
                    n = tl.sum(parts_of(first, 2, chunks, PARTS)) / N
                if HALF:
                    most = tl.max(parts_of(first + 1, 2, chunks, PARTS))
                    half = half_exponent(most / (n + number(eps, tl.float64)) / divisor)
            kept = finished + (b * chunks + index) * 5
            finish_chunk(
                inputs, targets, results, kept, chunk, numbers, n, divisor, half, C, PREDICTION, ZERO, IDENTITY, BLOCK
            )
            tl.debug_barrier()
            if tl.atomic_add(n_finished, 1, sem="acq_rel") == chunks - 1:  # the sample's last chunk
                sums = finished + b * chunks * 5
                term_sum = tl.sum(parts_of(sums, 5, chunks, PARTS))
                keep_sample(results, samples, b, B, term_sum, divisor, half, REDUCTION)
                if stats is not None:
                    for field in tl.static_range(1, 5):
                        tl.store(samples + field * B + b, tl.sum(parts_of(sums + field, 5, chunks, PARTS)))
                    tl.store(samples + 5 * B + b, n)
                tl.store(n_measured, 0)
                tl.store(n_finished, 0)

    tl.debug_barrier()
    if tl.atomic_add(counters + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        summarize(loss, stats, samples, weight_rows, n_weight_rows, ratio_stats, B, N, REDUCTION, False)
        tl.store(counters, 0)
        tl.store(counters + 1, 0)
