"""Gaussian mixtures in the plane: samples, exact densities, and how far a student's samples are from them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import fdistill_ops as fd

FAR = 4.0  # standard deviations from every centre, beyond which a point is far


@dataclass(frozen=True)
class Mixture:
    """Components of one standard deviation.

    Attributes:
        means: [K, 2], float64.
        weights: [K], float64, of sum 1.
        std: standard deviation of each component, in both directions.
    """

    means: Tensor
    weights: Tensor
    std: float

    def log_density(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """[N] for points [N, 2]: of the mixture, or of its samples with noise of standard deviation sigma."""
        variance = self.std**2 + sigma**2
        squares = (x.double()[:, None] - self.means).square().sum(2)
        return (self.weights.log() - squares / (2 * variance)).logsumexp(1) - math.log(2 * math.pi * variance)

    def sample(self, count: int, gen: torch.Generator) -> Tensor:
        """[count, 2], float32."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=gen)
        noise = torch.randn(count, 2, generator=gen, dtype=torch.float64)
        return (self.means[component] + self.std * noise).float()

    def strays(self, points: Tensor, weights: Tensor | None = None) -> dict[str, float]:
        """Shares of points [N, 2], by their weights [N]: "far", beyond FAR standard deviations of every centre, and
        "between", within one of a midpoint between neighbours, which are as close as any two centres (up to 10%)."""
        apart = torch.cdist(self.means, self.means).fill_diagonal_(math.inf)
        one, other = (apart < 1.1 * apart.min()).triu().nonzero().T
        middle = (self.means[one] + self.means[other]) / 2
        distances = {"far": self.means, "between": middle}
        least = {name: torch.cdist(points.double(), centres).amin(1) / self.std for name, centres in distances.items()}
        found = torch.stack([least["far"] > FAR, least["between"] < 1]).double()
        shares = found.mean(1) if weights is None else found @ (weights / weights.sum())
        return dict(zip(least, shares.tolist(), strict=True))

    @property
    def exact_strays(self) -> dict[str, float]:
        """Those of the mixture itself, by a sum over a lattice of an eighth of a standard deviation."""
        reach = float(self.means.abs().max()) + 8 * self.std
        ticks = torch.arange(-reach, reach, self.std / 8, dtype=torch.float64, device=self.means.device)
        points = torch.cartesian_prod(ticks, ticks)
        return self.strays(points, self.log_density(points).exp())

    def to(self, device: torch.device) -> Mixture:
        return Mixture(self.means.to(device), self.weights.to(device), self.std)


def ring() -> Mixture:
    """Eight modes on the unit circle, each half as heavy as another: from 50% down to 0.4%, light beside heavy."""
    angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    weights = 0.5 ** (torch.arange(8, dtype=torch.float64) * 3 % 8)
    return Mixture(torch.stack([angles.cos(), angles.sin()], 1), weights / weights.sum(), std=0.05)


def grid() -> Mixture:
    """25 modes at distances of 0.5 in [-1, 1]^2, of weights between 0.7% and 11%."""
    ticks = torch.linspace(-1, 1, 5, dtype=torch.float64)
    weights = torch.tensor([4, 1, 2, 1, 4], dtype=torch.float64) / 12
    return Mixture(torch.cartesian_prod(ticks, ticks), torch.outer(weights, weights).flatten(), std=0.07)


MIXTURES = {"ring": ring, "grid": grid}


class Quadrature:
    """D_f(p || q) in the plane, for p the mixture with noise of level sigma and q samples with the same noise.

    q is the exact density of the noisy empirical distribution, a sum of Gaussians around the samples; what is
    approximated is the student by finitely many samples, and the integral by a sum over a square lattice of ``size`` x
    ``size`` points at distances of at most sigma / 2, which reaches 6 standard deviations beyond every mode. Both
    densities are scaled to sum 1 there: samples further out count in neither.
    """

    def __init__(self, mixture: Mixture, sigma: float) -> None:
        reach = float(mixture.means.abs().max()) + 6 * math.hypot(mixture.std, sigma)
        size = math.ceil(4 * reach / sigma) + 1
        self.sigma, self.ticks = sigma, torch.linspace(-reach, reach, size, dtype=torch.float64)
        self.ticks = self.ticks.to(mixture.means.device)
        self.p = _normalised(mixture.log_density(torch.cartesian_prod(self.ticks, self.ticks), sigma).exp())

    def density(self, samples: Tensor) -> Tensor:
        """[size^2], of sum 1: the Gaussian around a sample is a product of one in each direction."""
        along = [((self.ticks - x[:, None]) / self.sigma).square().mul(-0.5).exp() for x in samples.double().T]
        return _normalised((along[0].T @ along[1]).flatten())

    def divergence(self, q: Tensor, name: str) -> float:
        """D_f(p || q), in nats for the Kullback-Leibler family."""
        return float((q * fd.get_divergence(name).f(self.p / q)).sum())


def _normalised(values: Tensor) -> Tensor:
    """Positive and of sum 1. What underflowed counts as the least number that has a finite ratio with all others."""
    return (values / values.sum()).clamp(min=1e-200)
