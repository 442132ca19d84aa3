"""The losses as training code writes them, in eager PyTorch: what the fused operations are compared with.

Structure and precisions are those of NVlabs/FastGen (``methods/common_loss.py``,
``methods/distribution_matching/f_distill.py``), tianweiy/DMD2 (``main/sd_guidance.py``), tianweiy/CausVid
(``causvid/dmd.py``, masks) and mingyuanzhou/SiD (``training/sid_loss.py``), each without its logging and its
collectives, which would only add to the cost.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

import fdistill_ops as fd

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: 1 - 1 / (1 + r),
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "squared_hellinger": lambda r: r**0.5,
    "jeffreys": lambda r: 1 + r,
    "neyman_chi2": lambda r: 1 / r.clamp(min=1e-8),
    "pearson_chi2": lambda r: r**2,
}
"""h(r), up to the constant factors that the division by the mean takes out."""


def weighting(divergence: str) -> Callable[[Tensor], Tensor]:
    """h(r) by the name or alias of a divergence."""
    found = fd.get_divergence(divergence)
    a = found.a
    return WEIGHTINGS[found.name] if a is None else lambda r: r**a


def rows(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def f_weights(logits: Tensor, t: Tensor, bins: Tensor | None, h: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights [B] from logits [B, K]; with ``bins`` the ratio is divided by its mean per time bin over [0, 1]."""
    ratio = logits.float().mean(dim=1).clamp(min=-10.0, max=10.0).exp().detach().clamp(0.1, 20.0)
    if bins is not None:
        index = (t.double() / (1.0 / len(bins))).floor().long().clamp(0, len(bins) - 1)
        count = torch.bincount(index, minlength=len(bins)).float()
        total = torch.bincount(index, weights=ratio, minlength=len(bins)).float()
        filled = count > 0
        means = total / (count + 1e-6)
        history, ema_rate = bins.float(), 0.0
        history[filled] = history[filled] * ema_rate + (1 - ema_rate) * means[filled]
        bins.copy_(history)
        ratio = ratio / (history[index] + 1e-6)
    weight = h(ratio)
    return (weight / (weight.sum() / len(weight) + 1e-6)).to(logits.dtype)


def matching(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    uncond: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """FastGen's variational score distillation loss; the mask is CausVid's."""
    with torch.no_grad():
        if uncond is not None:
            teacher = teacher + (scale - 1) * (teacher - uncond)
        target = x - score_difference(x, teacher, fake, weight=weight)
    if mask is not None:
        return 0.5 * mse_loss(x[mask], target[mask], reduction="mean")
    return 0.5 * mse_loss(x, target, reduction="mean")


def score_difference(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    uncond: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Its gradient: the weight in float32, the difference in the input's dtype."""
    with torch.no_grad():
        if uncond is not None:
            teacher = teacher + (scale - 1) * (teacher - uncond)
        distance = (x.float() - teacher.float()).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        factor = 1 / (distance + 1e-6)
        if weight is not None:
            factor *= rows(weight.float(), x)
        g = (fake - teacher) * factor.to(x.dtype)
        return g if mask is None else torch.where(mask, g, 0.0)


def f_distill(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    logits: Tensor,
    t: Tensor,
    bins: Tensor | None,
    h: Callable[[Tensor], Tensor],
    uncond: Tensor | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    with torch.no_grad():
        weight = f_weights(logits, t, bins, h)
    return matching(x, teacher, fake, uncond, scale, mask, weight)


def dmd2(
    x: Tensor, x_t: Tensor, eps_cond: Tensor, eps_fake: Tensor, eps_uncond: Tensor, scale: float, alphas_cumprod: Tensor
) -> Tensor:
    """DMD2 for Stable Diffusion: guidance in eps space, x0 in float64, no eps in the normaliser."""

    def x0(eps: Tensor) -> Tensor:
        power = rows(alphas_cumprod, x)
        return (x_t.double() - (1 - power) ** 0.5 * eps.double()) / power**0.5

    with torch.no_grad():
        fake = x0(eps_fake)
        real = x0(eps_uncond + scale * (eps_cond - eps_uncond))
        p_real, p_fake = x - real, x - fake
        gradient = (p_real - p_fake) / p_real.abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
        gradient = torch.nan_to_num(gradient)
    return 0.5 * mse_loss(x.float(), (x - gradient).detach().float(), reduction="mean")


def score_identity(x: Tensor, teacher: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """SiD's generator loss: samples with a NaN are dropped, the normaliser is clipped from below."""
    broken = [tensor.isnan().flatten(start_dim=1).any(dim=1) for tensor in (x, teacher, fake)]
    bad = broken[0] | broken[1] | broken[2]
    if bad.any():
        x, teacher, fake = x[~bad], teacher[~bad], fake[~bad]
    with torch.no_grad():
        normalizer = (x - teacher).abs().float().mean(dim=tuple(range(1, x.ndim)), keepdim=True).clip(min=1e-5)
    return ((teacher - fake) * ((teacher - x) - alpha * (teacher - fake)) / normalizer).mean()


def to_x0(pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """From an eps-prediction, in float64, as DMD2 and CausVid convert."""
    return ((x_t.double() - rows(sigma, pred) * pred.double()) / rows(alpha, pred)).to(pred.dtype)


def gan_generator(logits: Tensor) -> Tensor:
    return softplus(-logits).mean()


def gan_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()
