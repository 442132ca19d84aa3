"""The operations in plain numpy float64, written from the formulas alone, one sample at a time.

Beside each result stands ``noise``: a bound on the rounding that arithmetic with unit roundoff ``u`` (2^-24, or 2^-53
where an input is float64) may add on the way, first order, so that a test can ask for the last rounding plus that and
no more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

Array = np.ndarray
U32, U64 = 2.0**-24, 2.0**-53

ALIASES = {
    "reverse_kl": ("rkl", "reverse-kl"),
    "forward_kl": ("kl", "fkl", "forward-kl"),
    "jensen_shannon": ("js", "jensen-shannon"),
    "softened_reverse_kl": ("sf", "softened-rkl"),
    "squared_hellinger": ("sh", "hellinger"),
    "jeffreys": ("jf",),
    "neyman_chi2": ("neyman",),
    "pearson_chi2": ("pearson",),
    "alpha": (),
}
NAMES = tuple(name for name in ALIASES if name != "alpha")


def growth(n: int) -> float:
    """Rounding errors of a sum of n terms of one sign, in units of u times the sum."""
    return 2.0 + math.sqrt(max(n, 1))


# -------------------------------------------------------------------------------------------------------- divergences


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else math.inf


def h_from_log(name: str, log_r: float, a: float = 0.5) -> float:
    """h(exp(l)) of design section 2, evaluated where nothing overflows before h does."""
    canonical = next((key for key, short in ALIASES.items() if name in (key, *short)), name)
    if canonical == "reverse_kl":
        return 1.0
    if canonical == "forward_kl":
        return _exp(log_r)
    if canonical == "jensen_shannon":
        return 1.0 / (1.0 + _exp(-log_r))
    if canonical == "softened_reverse_kl":
        return 1.0 / (1.0 + _exp(log_r))
    if canonical == "squared_hellinger":
        return _exp(log_r / 2) / 4
    if canonical == "jeffreys":
        return _exp(log_r) + 1.0
    if canonical == "neyman_chi2":
        return 2.0 * _exp(-log_r)
    if canonical == "pearson_chi2":
        return 2.0 * _exp(2 * log_r)
    if canonical == "alpha":
        return _exp(a * log_r)
    raise KeyError(name)


def elasticity(name: str, a: float = 0.5) -> float:
    """Bound on abs(d log h / d log r): how much a relative error of r is magnified."""
    canonical = next(key for key, short in ALIASES.items() if name in (key, *short))
    return {"reverse_kl": 0.0, "squared_hellinger": 0.5, "pearson_chi2": 2.0, "alpha": abs(a)}.get(canonical, 1.0)


# ---------------------------------------------------------------------------------------------------------- f-weights


@dataclass
class Weights:
    """Results of :func:`f_weights`; ``noise`` and ``bins_noise`` are absolute."""

    weights: Array
    bins: Array | None
    ratio_mean: float
    clipped_low: float
    clipped_high: float
    noise: Array
    bins_noise: Array | None


def bin_of(t: float, min_t: float, max_t: float, n: int) -> int:
    """Index of the time bin, in exact arithmetic; times outside the range belong to the first and the last bin."""
    low, high = Fraction(min_t), Fraction(max_t)
    if not math.isfinite(t):
        return 0 if t < 0 else n - 1
    return min(max(math.floor((Fraction(t) - low) / (high - low) * n), 0), n - 1)


def f_weights(
    logits: Array,
    t: Array | None = None,
    *,
    divergence: str = "js",
    a: float = 0.5,
    logit_clip: float | None = 10.0,
    ratio_clip: tuple[float, float] | None = (0.1, 20.0),
    bins: Array | None = None,
    min_t: float = 0.0,
    max_t: float = 1.0,
    ema_rate: float = 0.0,
    training: bool = True,
    normalize: str | None = "mean",
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    u: float = U32,
) -> Weights:
    """Design section 2, steps 1 to 5. ``bins``: the histogram before; the result holds the one after."""
    logits = np.asarray(logits, dtype=np.float64)
    batch = len(logits)
    good = np.ones(batch, dtype=bool)
    log_ratio, log_noise = np.zeros(batch), np.zeros(batch)
    low, high = 0, 0
    for b in range(batch):
        heads = np.atleast_1d(logits[b])
        if not np.isfinite(heads).all() or (t is not None and math.isnan(t[b])):
            good[b] = False
            continue
        mean = math.fsum(heads) / len(heads)
        clipped = mean
        if logit_clip is not None:
            clipped = min(max(clipped, -logit_clip), logit_clip)
        if ratio_clip is not None:
            lowest = math.log(ratio_clip[0]) if ratio_clip[0] > 0 else -math.inf
            clipped = min(max(clipped, lowest), math.log(ratio_clip[1]))
        low, high = low + (clipped > mean), high + (clipped < mean)
        log_ratio[b] = clipped
        mean_noise = u * (2 + math.sqrt(len(heads))) * float(np.abs(heads).mean()) if len(heads) > 1 else 0.0
        log_noise[b] = (mean_noise if clipped == mean else min(mean_noise, u * abs(clipped))) + u * (abs(clipped) + 2)
    n_good = int(good.sum())
    ratio = np.array([_exp(value) for value in log_ratio])

    new_bins, bins_noise = None, None
    if bins is not None:
        assert t is not None
        past = np.where(np.isfinite(bins), bins, 1.0)
        new_bins, bins_noise = past.copy(), U32 * np.abs(past)
        index = [bin_of(float(t[b]), min_t, max_t, len(bins)) if good[b] else -1 for b in range(batch)]
        members_of: dict[int, list[int]] = {}
        for b in range(batch):
            members_of.setdefault(index[b], []).append(b)
        for i, members in members_of.items():
            if i < 0 or not training:
                continue
            mean = math.fsum(ratio[b] for b in members) / len(members)
            mean_noise = math.fsum(ratio[b] * log_noise[b] for b in members) / len(members)
            new_bins[i] = ema_rate * past[i] + (1 - ema_rate) * mean
            bins_noise[i] = (1 - ema_rate) * (mean_noise + u * growth(len(members)) * mean) + 3 * u * new_bins[i]
            bins_noise[i] += U32 * new_bins[i]
        for b in range(batch):
            if good[b]:
                value = new_bins[index[b]] + eps
                log_noise[b] += bins_noise[index[b]] / value + 4 * u + u * (abs(log_ratio[b]) + abs(math.log(value)))
                log_ratio[b] -= math.log(value)

    factor = elasticity(divergence, a)
    weights = np.array([h_from_log(divergence, value, a) for value in log_ratio])
    noise = weights * (factor * log_noise + 4 * u)
    if normalize == "mean" and n_good:
        mean = math.fsum(weights[good]) / n_good
        mean_noise = math.fsum(noise[good]) / n_good + u * growth(n_good) * mean
        noise = noise / (mean + eps) + weights / (mean + eps) * (mean_noise / (mean + eps) + 3 * u)
        weights = weights / (mean + eps)
    weights[~good] = math.nan if nonfinite == "propagate" else 0.0
    noise[~good] = 0.0

    def share(count: int) -> float:
        return count / n_good if n_good else math.nan

    clipped_ratio = np.array([_exp(v) for v in _clipped(logits, good, logit_clip, ratio_clip)])
    ratio_mean = math.fsum(clipped_ratio) / n_good if n_good else math.nan
    return Weights(weights, new_bins, ratio_mean, share(low), share(high), noise, bins_noise)


def _clipped(
    logits: Array, good: Array, logit_clip: float | None, ratio_clip: tuple[float, float] | None
) -> list[float]:
    values = []
    for b in np.flatnonzero(good):
        value = math.fsum(np.atleast_1d(logits[b])) / np.atleast_1d(logits[b]).size
        value = value if logit_clip is None else min(max(value, -logit_clip), logit_clip)
        if ratio_clip is not None:
            lowest = math.log(ratio_clip[0]) if ratio_clip[0] > 0 else -math.inf
            value = min(max(value, lowest), math.log(ratio_clip[1]))
        values.append(value)
    return values


# -------------------------------------------------------------------------------------------------------- predictions


def x0_coefficients(prediction: str, alpha: Any, sigma: Any) -> tuple[Array, Array]:
    """a, c of x0 = a x_t + c prediction."""
    alpha, sigma = np.asarray(alpha, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        return alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)
    if prediction == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "score":
        return 1 / alpha, sigma**2 / alpha
    if prediction == "x0":
        return np.zeros_like(alpha + sigma), np.ones_like(alpha + sigma)
    raise KeyError(prediction)


def rows(value: Any, ndim: int) -> Array:
    """Coefficients of a leading part of the shape, ready to broadcast."""
    value = np.asarray(value, dtype=np.float64)
    return value.reshape(value.shape + (1,) * (ndim - value.ndim))


def to_x0(pred: Array, x_t: Array, *, prediction: str, alpha: Any, sigma: Any, u: float = U32) -> tuple[Array, Array]:
    """The x0-prediction and its noise."""
    if prediction == "x0":
        return pred, np.zeros_like(pred)
    a, c = x0_coefficients(prediction, rows(alpha, pred.ndim), rows(sigma, pred.ndim))
    first, second = a * x_t, c * pred
    return first + second, 3 * u * (np.abs(first) + np.abs(second))


# ------------------------------------------------------------------------------------------------------------- losses


@dataclass
class Loss:
    """Results of a loss. ``gradients`` and ``gradient_noise`` by argument name, for an incoming gradient of 1."""

    loss: Array
    loss_noise: Array
    gradients: dict[str, Array]
    gradient_noise: dict[str, Array]
    g: Array
    g_noise: Array
    n: Array
    stats: dict[str, float] = field(default_factory=dict)


def _finite_stats(values: Array) -> tuple[float, float, float]:
    values = values[np.isfinite(values)]
    return (values.min(), values.mean(), values.max()) if values.size else (math.nan,) * 3


def _statistics(loss: Array, g: Array, bad: Array, mask: Array, n: Array, weight: Any) -> dict[str, float]:
    """``g`` as it enters the loss; ``bad``: where it was not finite."""
    on_mask = g[mask]
    w = np.ones(len(n)) if weight is None else np.asarray(weight, dtype=np.float64).reshape(-1)
    w_finite = w[np.isfinite(w)]
    with np.errstate(all="ignore"):
        squared = (w_finite**2).sum()
        stats = {
            "loss": float(np.mean(loss)) if np.size(loss) else math.nan,
            "grad_norm": math.sqrt(np.sum(on_mask**2)),
            "grad_mean_abs": float(np.sum(np.abs(on_mask)) / max(on_mask.size, 1)),
            "effective_sample_size": float(w_finite.sum() ** 2 / squared) if squared else math.nan,
            "nonfinite": float(bad[mask].sum()),
        }
    for name, values in (("normalizer", n), ("weight", w)):
        stats |= dict(zip((f"{name}_min", f"{name}_mean", f"{name}_max"), _finite_stats(values), strict=True))
    return stats


def _reduce(term: Array, noise: Array, mask: Array, reduction: str, u: float) -> tuple[Array, Array, Array]:
    """Loss, its noise, and the count that every element's derivative is divided by."""
    batch = term.shape[0]
    if reduction == "sample":
        loss, loss_noise, count = np.zeros(batch), np.zeros(batch), np.ones(batch)
        for b in range(batch):
            on_mask = mask[b]
            m = int(np.sum(on_mask))
            if m:
                loss[b], count[b] = np.sum(term[b][on_mask]) / m, m
                loss_noise[b] = np.sum(noise[b][on_mask]) / m
                loss_noise[b] += (growth(m) + 2) * u * np.sum(np.abs(term[b][on_mask])) / m
        return loss, loss_noise, rows(count, term.ndim)
    m = int(mask.sum())
    divisor = max(m, 1) if reduction == "mean" else 1
    total = np.sum(term[mask]) / divisor
    total_noise = (np.sum(noise[mask]) + (growth(m) + 2) * u * np.sum(np.abs(term[mask]))) / divisor
    return np.asarray(total), np.asarray(total_noise), np.asarray(float(divisor))


def distribution_matching(
    x: Array,
    teacher: Array,
    fake: Array,
    *,
    weight: Any = None,
    teacher_uncond: Array | None = None,
    guidance_scale: Any = None,
    mask: Array | None = None,
    prediction: str = "x0",
    x_t: Array | None = None,
    alpha: Any = None,
    sigma: Any = None,
    normalizer: Any = "mean_abs",
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    reduction: str = "mean",
    u: float = U32,
    weight_noise: Array | None = None,
) -> Loss:
    """Design section 2; ``weight_noise``: absolute noise of the weights themselves."""
    eps = 0.0 if normalizer is None else eps  # nothing is divided by
    with np.errstate(all="ignore"):
        ndim, batch = x.ndim, x.shape[0]
        used = np.ones(x.shape, dtype=bool) if mask is None else mask
        target, target_noise = teacher, np.zeros(x.shape)
        if teacher_uncond is not None:
            s = rows(guidance_scale, ndim)
            target = teacher_uncond + s * (teacher - teacher_uncond)
            target_noise = 4 * u * (1 + np.abs(s)) * (np.abs(teacher) + np.abs(teacher_uncond))
        # The difference in the space the networks predict, then in x0.
        difference = fake - target
        difference_noise = target_noise + u * np.abs(difference)
        if prediction != "x0":
            a, c = x0_coefficients(prediction, rows(alpha, ndim), rows(sigma, ndim))
            first, second = a * x_t, c * target
            target_noise = np.abs(c) * target_noise + 3 * u * (np.abs(first) + np.abs(second))
            target = first + second
            difference_noise = np.abs(c) * difference_noise + 3 * u * np.abs(c * difference)
            difference = c * difference

        n, n_noise = np.ones(batch), np.zeros(batch)
        if isinstance(normalizer, str):
            per_sample = max(x[0].size, 1) if batch else 1
            for b in range(batch):
                distance = np.abs(x[b] - target[b])
                n[b] = np.sum(distance) / per_sample
                n_noise[b] = np.sum(target_noise[b] + u * distance) / per_sample + growth(per_sample) * u * n[b]
        elif normalizer is not None:
            n = np.asarray(normalizer, dtype=np.float64)
        n_noise = n_noise + u * n

        w = rows(1.0 if weight is None else weight, ndim)
        w_noise = u * np.abs(w) if weight_noise is None else u * np.abs(w) + rows(weight_noise, ndim)
        n_row, relative_n = rows(n + eps, ndim), rows(n_noise / (n + eps), ndim)
        relative_n = np.where(relative_n < 0.25, relative_n / (1 - relative_n), np.inf)
        k = w / n_row
        k_noise = w_noise / n_row + np.abs(k) * (relative_n + 3 * u)
        g = k * difference
        g_noise = np.abs(k) * difference_noise + k_noise * np.abs(difference) + 2 * u * np.abs(g) + _tiny(u)
        g_noise = np.where(np.isnan(g_noise), np.inf, 1.01 * g_noise)
        bad = ~np.isfinite(g)
        if nonfinite == "zero":
            g_noise, g = np.where(bad, 0.0, g_noise), np.where(bad, 0.0, g)

        term, term_noise = 0.5 * g**2, np.abs(g) * g_noise + g_noise**2 + u * g**2 + _tiny(u)
        loss, loss_noise, count = _reduce(term, term_noise, used, reduction, u)
        gradient = np.where(used, g / count, 0.0)
        gradient_noise = np.where(used, g_noise / count + 2 * u * np.abs(g / count) + _tiny(u), 0.0)
        stats = _statistics(loss, g, bad, used, n, weight)
        return Loss(loss, loss_noise, {"x": gradient}, {"x": gradient_noise}, np.where(used, g, 0.0), g_noise, n, stats)


def score_identity(
    x: Array,
    teacher: Array,
    fake: Array,
    *,
    alpha: float = 1.0,
    weight: Any = None,
    mask: Array | None = None,
    normalizer: Any = "mean_abs",
    eps: float = 1e-6,
    nonfinite: str = "propagate",
    reduction: str = "mean",
    u: float = U32,
) -> Loss:
    """L = mean of w (T-F) ((T-x) - alpha (T-F)) / (n + eps), and its three derivatives with n held fixed."""
    eps = 0.0 if normalizer is None else eps
    with np.errstate(all="ignore"):
        matching = distribution_matching(
            x, teacher, fake, weight=weight, mask=mask, normalizer=normalizer, eps=eps, reduction="sum", u=u
        )
        ndim = x.ndim
        used = np.ones(x.shape, dtype=bool) if mask is None else mask
        n = matching.n
        k = rows(1.0 if weight is None else weight, ndim) / rows(n + eps, ndim)
        d, away = teacher - fake, teacher - x
        # g = -k d carries k's noise: relative noise of k from it where d is not 0; the same bound per sample otherwise.
        n_noise = np.array(
            [(growth(x[b].size) + 2) * u * n[b] if isinstance(normalizer, str) else u * n[b] for b in range(x.shape[0])]
        )
        relative = rows(n_noise / (n + eps), ndim) + 4 * u
        relative = np.where(relative < 0.25, relative / (1 - relative), np.inf)
        size = np.abs(away) + (1 + 2 * abs(alpha)) * np.abs(d)
        values = {
            "term": k * d * (away - alpha * d),
            "x": -k * d,
            "teacher": k * (away + (1 - 2 * alpha) * d),
            "fake": k * (2 * alpha * d - away),
        }
        bad = ~np.isfinite(values["term"])
        for value in values.values():
            bad |= ~np.isfinite(value)
        noise = {
            "term": np.abs(k * d) * size * (relative + 8 * u) + _tiny(u),
            "x": np.abs(k * d) * (relative + 4 * u) + _tiny(u),
            "teacher": np.abs(k) * size * (relative + 8 * u) + _tiny(u),
            "fake": np.abs(k) * size * (relative + 8 * u) + _tiny(u),
        }
        if nonfinite == "zero":
            values = {name: np.where(bad, 0.0, value) for name, value in values.items()}
            noise = {name: np.where(bad, 0.0, value) for name, value in noise.items()}
            matching.g = np.where(bad, 0.0, matching.g)
        loss, loss_noise, count = _reduce(values["term"], noise["term"], used, reduction, u)
        names = ("x", "teacher", "fake")
        gradients = {name: np.where(used, values[name] / count, 0.0) for name in names}
        gradient_noise = {
            name: np.where(used, 1.01 * noise[name] / count + 2 * u * np.abs(values[name] / count) + _tiny(u), 0.0)
            for name in names
        }
        stats = _statistics(loss, matching.g, bad, used, n, weight)
        return Loss(loss, loss_noise, gradients, gradient_noise, matching.g, matching.g_noise, n, stats)


def _tiny(u: float) -> float:
    """Below this a result may be flushed to zero."""
    return 2.0**-126 if u == U32 else 2.0**-1022


def softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def gan_generator(logits: Array) -> float:
    values = [softplus(-v) for v in np.ravel(logits)]
    return math.fsum(values) / len(values) if values else 0.0


def gan_discriminator(real: Array, fake: Array) -> float:
    values = [softplus(v) for v in np.ravel(fake)]
    return gan_generator(real) + (math.fsum(values) / len(values) if values else 0.0)
