"""The metrics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from trainer_cases import need_extra

import fdistill_ops as fd
from fdistill_ops.trainer import evaluate
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import load
from fdistill_ops.trainer.mixtures import MIXTURES, Mixture, Quadrature

pytestmark = pytest.mark.usefixtures("one_thread")

need_extra()


@pytest.fixture(scope="module")
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_frechet_distance_of_transformed_samples_is_exact(gen: torch.Generator) -> None:
    a = torch.randn(300, 5, generator=gen, dtype=torch.float64) + 1
    shift = torch.arange(5.0, dtype=torch.float64)
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet_distance(a, a + shift) == pytest.approx(30)
    scaled = float(a.mean(0).square().sum() + a.T.cov().trace())  # (k - 1)^2 (|m|^2 + tr C) with k = 2
    assert evaluate.frechet_distance(a, 2 * a) == pytest.approx(scaled)


def test_frechet_distance_of_gaussians(gen: torch.Generator) -> None:
    """Diagonal covariances: |m|^2 + sum (sqrt a - sqrt b)^2."""
    a = torch.randn(50_000, 3, generator=gen) * torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(50_000, 3, generator=gen) * torch.tensor([2.0, 1.0, 0.5]) + 1
    assert evaluate.frechet_distance(a, b) == pytest.approx(3 + 1 + 1, rel=0.03)


def test_precision_recall(gen: torch.Generator) -> None:
    a, b = torch.randn(2, 60, 4, generator=gen)
    assert evaluate.precision_recall(a, a) == (1.0, 1.0)
    assert evaluate.precision_recall(a, a + 1000) == (0.0, 0.0)
    # One of two modes: everything generated is real, half of what is real is generated.
    assert evaluate.precision_recall(torch.cat([a, b + 1000]), a) == (1.0, 0.5)


# ------------------------------------------------------------------------------------------------------------ mixtures


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_density_of_a_mixture(name: str, sigma: float) -> None:
    """It is the sum of the components' densities, and its integral is 1."""
    mixture = MIXTURES[name]()
    assert float(mixture.weights.sum()) == pytest.approx(1, abs=1e-12)
    assert len(mixture.weights.unique()) > 1
    std = math.hypot(mixture.std, sigma)
    normal = torch.distributions.Normal(mixture.means[:, None], tensor(std))
    ticks = torch.linspace(-2, 2, 401, dtype=torch.float64)
    points = torch.cartesian_prod(ticks, ticks)
    expected = (mixture.weights[:, None] * normal.log_prob(points).sum(2).exp()).sum(0)
    found = mixture.log_density(points, sigma).exp()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-290)
    assert float(found.sum() * 0.01**2) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_of_a_mixture(name: str, gen: torch.Generator) -> None:
    mixture = MIXTURES[name]()
    count = 40_000
    samples = mixture.sample(count, gen)
    distance, nearest = torch.cdist(samples.double(), mixture.means).min(1)
    shares = nearest.bincount(minlength=len(mixture.weights)) / count
    error = (mixture.weights * (1 - mixture.weights) / count).sqrt()
    assert ((shares - mixture.weights).abs() < 5 * error + 1e-3).all()  # 1e-3: nearer to another mode
    # Squared distances from a Gaussian's centre have the mean 2 std^2 and the standard deviation 2 std^2.
    assert float(distance.square().mean()) == pytest.approx(2 * mixture.std**2, rel=5 / count**0.5 + 1e-2)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_divergence_of_gaussians(shift: float) -> None:
    """q is the Gaussian that noise makes of one point. For q = N(m, v) and p = N(0, u) in the plane,
    KL(p || q) = log(v/u) + u/v - 1 + |m|^2 / (2 v)."""
    sigma, std = 0.3, 0.2
    quadrature = Quadrature(Mixture(tensor([[0.0, 0.0]]), tensor([1.0]), std), sigma)
    q = quadrature.density(tensor([[shift, 0.0]]).repeat(3, 1))
    u, v = std**2 + sigma**2, sigma**2
    forward = math.log(v / u) + u / v - 1 + shift**2 / (2 * v)
    reverse = math.log(u / v) + v / u - 1 + shift**2 / (2 * u)
    # Beyond the lattice, 6 standard deviations out, p has 1e-8 of its mass, and log(p/q) is below 100 there.
    for name, expected in (("forward_kl", forward), ("reverse_kl", reverse), ("jeffreys", forward + reverse)):
        assert quadrature.divergence(q, name) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # The affinity: integral of sqrt(p q) = 2 sqrt(u v) / (u + v) exp(-|m|^2 / (4 (u + v))).
    affinity = 2 * math.sqrt(u * v) / (u + v) * math.exp(-(shift**2) / (4 * (u + v)))
    assert quadrature.divergence(q, "squared_hellinger") == pytest.approx(1 - affinity, rel=1e-5)


def test_divergence_of_far_samples() -> None:
    """Where q is not, p/q is as large as the numbers allow: no divergence is NaN."""
    quadrature = Quadrature(Mixture(tensor([[-3.0, 0.0], [3.0, 0.0]]), tensor([0.5, 0.5]), 0.05), 0.05)
    one_mode = quadrature.density(tensor([[3.0, 0.0]]).repeat(10, 1))
    for name in fd.DIVERGENCES:
        assert not math.isnan(quadrature.divergence(one_mode, name))
    # Half of p is where q is not: log 2 more than between one mode of p and q.
    q_is_narrower = math.log(2) + math.log(2) + 0.5 - 1  # log(variance ratio 2) + 1/2 - 1, in the plane
    assert quadrature.divergence(one_mode, "reverse_kl") == pytest.approx(q_is_narrower, abs=1e-3)
    assert quadrature.divergence(one_mode, "forward_kl") > 100


# --------------------------------------------------------------------------------------------------------------- modes


def test_lost_modes() -> None:
    modes = evaluate.mixture_modes(Mixture(tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), tensor([0.5, 0.3, 0.2]), 0.1))
    assert modes.samples_needed == 500
    at = [tensor([[x, y]]) for x, y in ((0.0, 0.1), (1.0, 0.0), (2.29, 0.0), (2.31, 0.0))]
    samples = torch.cat([point.repeat(count, 1) for point, count in zip(at, (900, 31, 19, 50), strict=True)])
    found = modes.coverage(samples)
    # 3.1% of 30% is a tenth; 1.9% of 20% is not, what is more than three standard deviations away does not count.
    assert (found["modes_lost"], found["modes_covered"], found["modes"]) == (1, 2, 3)
    assert found["mode_ratios"] == pytest.approx([1.8, 31 / 300, 19 / 200])
    assert found["high_quality"] == pytest.approx(0.95)


def test_a_mixture_covers_its_own_modes(gen: torch.Generator) -> None:
    for build in MIXTURES.values():
        mixture = build()
        modes = evaluate.mixture_modes(mixture)
        found = modes.coverage(mixture.sample(modes.samples_needed, gen))
        assert found["modes_lost"] == 0
        assert found["high_quality"] == pytest.approx(1 - math.exp(-(evaluate.WITHIN**2) / 2), abs=0.005)


def test_modes_of_images(gen: torch.Generator) -> None:
    """Ten tight clusters, some of them not there."""
    centres = 10 * torch.randn(10, 6, generator=gen)
    features = (centres[:, None] + 0.1 * torch.randn(10, 60, 6, generator=gen)).flatten(0, 1)
    modes = evaluate.image_modes(features, seed=0)
    assert len(modes.masses) == 20 and float(modes.masses.sum()) == pytest.approx(1)
    assert modes.coverage(features)["modes_lost"] == 0
    half = modes.coverage(features[:300])
    there = torch.cdist(modes.centres.float(), centres).argmin(1) < 5
    assert half["modes_lost"] == int((~there).sum())
    assert half["high_quality"] is None


def test_judge_without_classes(gen: torch.Generator) -> None:
    """Points are compared by their coordinates, images of one class by principal components."""
    data = load(Config(data="ring"))
    judge = evaluate.Judge(data, None, seed=0)
    row = judge.row("", [data.held_out], data.held_out_labels)
    assert torch.equal(judge.reference, data.train)
    assert "agreement" not in row and row["frechet"] < 0.01 and row["precision"] > 0.9 < row["recall"]

    images = torch.randn(200, 1, 1, generator=gen) * torch.eye(8) + 0.01 * torch.randn(200, 8, 8, generator=gen)
    features = evaluate.principal_components(images, seed=0)
    assert features(images).shape == (200, evaluate.COMPONENTS)
    assert float(features(images)[:, 0].std()) == pytest.approx(1, rel=1e-4)
    assert float(features(images).mean(0).abs().max()) < 1e-4


def test_coverage_of_a_sampler(gen: torch.Generator) -> None:
    """A sampler that knows the mixture, and one that knows one mode alone."""
    data = load(Config(data="ring"))
    judge = evaluate.Judge(data, None, seed=0)
    mixture = data.mixture
    assert mixture is not None
    good = evaluate.Sampler("", 1, lambda noise, labels: mixture.sample(len(noise), gen))
    poor = evaluate.Sampler("", 1, lambda noise, labels: mixture.means[0] + mixture.std * noise)
    rows = [judge.coverage(sampler, gen, ("js", "reverse_kl")) for sampler in (good, poor)]
    assert [row["modes_lost"] for row in rows] == [0, 7]
    assert all(0 <= value < 0.01 for value in rows[0]["divergences"].values())
    # q is one component of p, whose weight is 1 / 1.99: log 1.99 in one direction.
    assert rows[1]["divergences"]["reverse_kl"] == pytest.approx(math.log(255 / 128), abs=0.01)


def test_large_samples_are_drawn_in_parts(gen: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = evaluate.Judge(load(Config(data="ring")), None, seed=0)
    drawn: list[int] = []

    def sample(noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        drawn.append(len(noise))
        assert len(labels) == len(noise)
        return noise

    whole = judge.coverage(evaluate.Sampler("", 1, sample), gen)
    monkeypatch.setattr(evaluate, "BATCH", 20_000)
    parts = judge.coverage(evaluate.Sampler("", 1, sample), gen)
    assert sum(drawn[1:]) == drawn[0] == judge.modes.samples_needed and max(drawn[1:]) == 10_000
    assert parts["high_quality"] == pytest.approx(whole["high_quality"], abs=0.02)
