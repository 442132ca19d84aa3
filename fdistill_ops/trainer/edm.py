"""EDM (Karras et al., arXiv 2206.00364): preconditioning, denoising loss, noise levels and the Heun sampler.

Samples are x_t = x0 + sigma * noise; sigma is [B], samples are [B, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


class Preconditioning(NamedTuple):
    """D(x) = skip * x + output * F(input * x, noise), table 1 of the paper."""

    skip: Tensor
    output: Tensor
    input: Tensor
    noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float) -> Preconditioning:
    """The coefficients with which the network's input and its training target have variance 1 at every sigma."""
    total = sigma.square() + sigma_data**2
    return Preconditioning(
        skip=sigma_data**2 / total,
        output=sigma * sigma_data / total.sqrt(),
        input=1 / total.sqrt(),
        noise=sigma.log() / 4,
    )


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """lambda(sigma) = 1 / output^2: every noise level counts alike when the network's output is 0."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()


def denoising_loss(prediction: Tensor, x0: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Mean of lambda(sigma) |D - x0|^2 (eq. 8)."""
    return (loss_weight(sigma, sigma_data) * (prediction - x0).square().flatten(1).mean(1)).mean()


def add_noise(x0: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    return noised(x0, sigma, normal(x0.shape, generator))


def noised(x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """From unit noise [B, ...]."""
    return x0 + rows(sigma, x0) * noise


def normal(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def rows(values: Tensor, x: Tensor) -> Tensor:
    """[B] shaped to broadcast against x, [B, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))


def lognormal_sigma(count: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Noise levels for training a denoiser: ln(sigma) ~ N(mean, std^2) (table 1)."""
    return (mean + std * normal((count,), generator)).exp()


def karras_sigma(u: Tensor, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """The noise level at u in [0, 1], from sigma_max at 0 to sigma_min at 1 (eq. 5)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + u * (low - high)) ** rho


@torch.no_grad()
def heun(denoise: Denoise, noise: Tensor, labels: Tensor, steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Deterministic second-order sampler (Algorithm 1) from unit noise [B, ...]; 2 * steps - 1 evaluations."""
    levels = karras_sigma(torch.linspace(0, 1, steps, dtype=torch.float64), sigma_min, sigma_max).tolist()
    x = noise * levels[0]
    for sigma, following in zip(levels, [*levels[1:], 0.0], strict=True):
        slope = (x - denoise(x, x.new_full((len(x),), sigma), labels)) / sigma
        euler = x + (following - sigma) * slope
        if following > 0:
            corrected = (euler - denoise(euler, x.new_full((len(x),), following), labels)) / following
            euler = x + (following - sigma) * 0.5 * (slope + corrected)
        x = euler
    return x
