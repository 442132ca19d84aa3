"""How good samples are: Frechet distance, precision and recall, modes, classes, speed.

All but the classes are measured in a space of features: a classifier's where there are classes, the coordinates of
points, principal components of other images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import edm
from .config import Config
from .data import Data
from .mixtures import Mixture, Quadrature
from .networks import Classifier
from .progress import bar
from .training import random_numbers

Row = dict[str, Any]
Features = Callable[[Tensor], Tensor]
NEIGHBOURS = 3
REFERENCE = 2_000  # training samples at most that the k-NN manifolds are made of
COMPONENTS = 32  # principal components
CLUSTERS = 20  # at most, of at least 30 training images on average
WITHIN = 3.0  # standard deviations from its centre to which a component of a mixture reaches: 98.9% of it
LOST = 0.1  # of its true mass, below which a mode is lost
BATCH = 2**20  # numbers of samples at a time: the activations of a network are many times as many
ROWS = 2**23  # distances at a time
SPEED = 500  # samples in a batch whose time is taken
LEAST_EXPECTED = 100  # samples of the lightest mode, if it has its true mass: 10 or fewer are no accident


# A classifier is poor where it makes more than this share of the errors of guessing the most frequent class.
POOR = 0.25


def accuracy_bound(labels: Tensor) -> float:
    """Held-out accuracy, for those classes, below which a classifier is a poor judge: 0.775 for ten of one size, 0.875
    for two."""
    chance = float(labels.bincount().max()) / len(labels)
    return 1 - POOR * (1 - chance)


def in_batches(function: Callable[..., Tensor], *tensors: Tensor, stage: str = "") -> Tensor:
    """Of tensors [N, ...], a part of the rows at a time, so that the memory does not grow with N; with a progress bar
    where it is a stage."""
    most = max(1, BATCH // max(1, tensors[0][:1].numel()))
    parts = list(zip(*(tensor.split(most) for tensor in tensors), strict=True))
    return torch.cat([function(*part) for part in (bar(stage, parts) if stage else parts)])


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians with the means and covariances of two sets of features [N, D] (Heusel et al.,
    arXiv 1706.08500, eq. 6): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(one.T.cov()) for one in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # (C_a C_b)^(1/2) has the trace of (root C_b root)^(1/2), which is symmetric.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    squared = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(float(squared), 0.0)


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Fraction of the generated features inside the k-NN manifold of the real ones, and the other way round
    (Kynkaanniemi et al., arXiv 1904.06991, eqs. 1-3)."""
    real, generated = real.double(), generated.double()
    radii_real, radii_generated = _radii(real, k), _radii(generated, k)
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, radii in zip(_rows(generated, len(real)), _rows(radii_generated, len(real)), strict=True):
        between = torch.cdist(real, part)
        precise.append((between <= radii_real[:, None]).any(0))
        recalled |= (between <= radii[None]).any(1)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def _rows(points: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Parts of so many rows that a matrix of theirs with so many columns has bounded memory."""
    return points.split(max(1, ROWS // columns))


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour, itself not counted; to the last where there are fewer."""
    nearest = min(k + 1, len(points))
    parts = _rows(points, len(points))
    return torch.cat([torch.cdist(part, points).kthvalue(nearest, dim=1).values for part in parts])


# --------------------------------------------------------------------------------------------------------------- modes


@dataclass(frozen=True)
class Modes:
    """Where the data has its mass: centres [K, D] in the space of features, their true masses [K], and the distance up
    to which a sample belongs to the nearest centre."""

    centres: Tensor
    masses: Tensor
    reach: float = math.inf

    @property
    def samples_needed(self) -> int:
        """So many that chance does not decide which modes are lost."""
        return math.ceil(LEAST_EXPECTED / float(self.masses.min()))

    def coverage(self, features: Tensor) -> Row:
        """A mode is lost where the samples, by their features [N, D], have less than LOST of its true mass."""
        distance, nearest = torch.cdist(features.double(), self.centres).min(1)
        inside = distance < self.reach
        found = nearest[inside].bincount(minlength=len(self.masses)) / len(features)
        ratios = found / self.masses
        lost = int((ratios < LOST).sum())
        quality = float(inside.double().mean()) if math.isfinite(self.reach) else None
        return {
            "modes": len(ratios),
            "modes_covered": len(ratios) - lost,
            "modes_lost": lost,
            "mode_ratios": ratios.tolist(),
            "high_quality": quality,
        }


def mixture_modes(mixture: Mixture) -> Modes:
    """The components."""
    return Modes(mixture.means, mixture.weights, WITHIN * mixture.std)


def image_modes(features: Tensor, seed: int) -> Modes:
    """The k-means clusters of the training images' features [N, D]."""
    from sklearn.cluster import KMeans

    count = min(CLUSTERS, max(2, len(features) // 30))
    clusters = KMeans(count, n_init=4, random_state=seed % 2**32).fit(features.double().cpu().numpy())
    centres = torch.from_numpy(clusters.cluster_centers_)
    masses = torch.from_numpy(clusters.labels_).long().bincount(minlength=count).double() / len(features)
    some = masses > 0  # all of them, unless fewer images than clusters differ
    return Modes(centres[some].to(features.device), masses[some].to(features.device))


# --------------------------------------------------------------------------------------------------------------- judge


def principal_components(images: Tensor, seed: int) -> Features:
    """On the first components of training images [N, ...], in units of the first one's standard deviation."""
    from sklearn.decomposition import PCA

    flat = images.flatten(1)
    count = min(COMPONENTS, *flat.shape)
    found = PCA(count, svd_solver="randomized", random_state=seed % 2**32).fit(flat.cpu().numpy())
    mean = torch.from_numpy(found.mean_).to(flat)
    directions = torch.from_numpy(found.components_.T / (found.explained_variance_[0] ** 0.5 or 1.0)).to(flat)
    return lambda samples: (samples.flatten(1) - mean) @ directions


def classifier_features(classifier: Classifier, images: Tensor) -> Features:
    """Its features, scaled to unit variance on training images."""
    features = in_batches(classifier.features, images)
    mean, std = features.mean(0), features.std(0)
    std = std.where(std > 0, 1.0)
    return lambda samples: (classifier.features(samples) - mean) / std


def poor_judge(rows: list[Row], compared: str) -> str:
    """The warning where the classifier is a poor judge, from rows of the table; else empty."""
    poor = [row for row in rows if row.get("weak")]
    if not poor:
        return ""
    worst = min(poor, key=lambda row: row["judge_accuracy"])
    return (
        f"the classifier that judges is poor: right on {worst['judge_accuracy']:.1%} of the {compared}, less than "
        f"{worst['judge_bound']:.1%}; what depends on it is weak evidence (more --classifier-steps may help)"
    )


class Judge:
    """Compares samples with the training data."""

    @torch.no_grad()
    def __init__(self, data: Data, classifier: Classifier | None, seed: int) -> None:
        self.data, self.classifier = data, classifier
        self.features: Features
        if data.mixture is not None:
            self.features = torch.Tensor.float
        elif classifier is not None:
            self.features = classifier_features(classifier, data.train)
        else:
            self.features = principal_components(data.train, seed)
        self.reference = in_batches(self.features, data.train)
        mixture = data.mixture
        self.modes = image_modes(self.reference, seed) if mixture is None else mixture_modes(mixture)
        self.quadrature = None if mixture is None else Quadrature(mixture, mixture.std)
        self.verdict: Row = {}
        if classifier is not None:
            right = in_batches(classifier, data.held_out).argmax(1) == data.held_out_labels
            accuracy, bound = float(right.double().mean()), accuracy_bound(data.held_out_labels)
            self.verdict = {"judge_accuracy": accuracy, "judge_bound": bound, "weak": accuracy < bound}
            self.verdict["judge_on_training_data"] = not data.holds_out

    @property
    def warning(self) -> str:
        """What is wrong with the classifier as a judge; empty where nothing is."""
        return poor_judge([self.verdict], self.data.compared)

    @torch.no_grad()
    def row(self, name: str, draws: list[Tensor], labels: Tensor) -> Row:
        """One row of the table, from draws of samples [N, ...] asked for with the classes ``labels`` [N].

        Every row has the same N, since the distances depend on it; numbers are means over the draws.
        """
        features = [in_batches(self.features, samples) for samples in draws]
        manifold = self.reference[:REFERENCE]
        distances = torch.tensor([frechet_distance(self.reference, one) for one in features], dtype=torch.float64)
        manifolds = torch.tensor([precision_recall(manifold, one) for one in features], dtype=torch.float64)
        row = {
            "name": name,
            "samples": len(labels) * len(draws),
            "frechet": float(distances.mean()),
            "frechet_std": float(distances.std()) if len(draws) > 1 else None,
            "precision": float(manifolds[:, 0].mean()),
            "recall": float(manifolds[:, 1].mean()),
        }
        return row if self.classifier is None else row | self._classes(self.classifier, torch.cat(draws), labels)

    def _classes(self, classifier: Classifier, samples: Tensor, labels: Tensor) -> Row:
        predicted = in_batches(classifier, samples).argmax(1)
        asked = labels.repeat(len(samples) // len(labels))
        counts = predicted.bincount(minlength=self.data.classes)
        wanted = asked.bincount(minlength=self.data.classes)
        return {
            "agreement": float((predicted == asked).double().mean()),
            "classes": int((counts > 0).sum()),
            "rarest_class": float((counts.double() / wanted)[wanted > 0].min()),
            "class_counts": counts.tolist(),
        }

    @torch.no_grad()
    def coverage(
        self, sampler: Sampler, gen: torch.Generator, divergences: tuple[str, ...] = (), most: int | None = None
    ) -> Row:
        """The modes that the sampler has and lost, for the training data's classes, by at most so many samples; on a
        mixture also where its samples are, and its divergences from the mixture: Jensen-Shannon, and those named."""
        count = min(self.modes.samples_needed, most or self.modes.samples_needed)
        labels = self.data.train_labels.repeat(-(-count // len(self.data.train_labels)))[:count]
        parts = labels.split(max(1, BATCH // math.prod(self.data.shape)))
        samples = (sampler(edm.normal((len(part), *self.data.shape), gen), part) for part in parts)
        features = torch.cat([self.features(one) for one in samples])
        row = self.modes.coverage(features)
        if self.data.mixture is not None and self.quadrature is not None:  # the features are the points themselves
            row |= self.data.mixture.strays(features)
            density = self.quadrature.density(features)
            row["jensen_shannon"] = self.quadrature.divergence(density, "jensen_shannon")
            row["divergences"] = {name: self.quadrature.divergence(density, name) for name in divergences}
        return row


@dataclass(frozen=True)
class Sampler:
    """Turns unit noise [N, ...] and classes [N] into samples, with so many evaluations of a network."""

    name: str
    evaluations: int
    sample: Callable[[Tensor, Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, noise: Tensor, labels: Tensor) -> Tensor:
        return in_batches(self.sample, noise, labels)

    def per_second(self, noise: Tensor, labels: Tensor, seconds: float = 0.3) -> float:
        """Samples per second, after one call to warm up, unless that takes as long by itself."""
        start = time.perf_counter()
        self(noise, labels).sum().item()
        if (elapsed := time.perf_counter() - start) > seconds:
            return len(noise) / elapsed
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            self(noise, labels).sum().item()  # waits for the device
            count += len(noise)
        return count / elapsed


def evaluate(
    samplers: list[Sampler],
    judge: Judge,
    config: Config,
    data: Data,
    modes: bool,
    divergences: tuple[str, ...] = (),
    speeds: bool = True,
) -> list[Row]:
    """The table: the held-out data, then every sampler, from the same noise and for the same classes; with ``modes``
    their coverage, and with ``speeds`` how fast each is."""
    gen = random_numbers(config, "evaluation")
    real, labels = data.held_out, data.held_out_labels
    if len(labels) > config.evaluation_samples:
        some = torch.randperm(len(labels), generator=gen, device=gen.device)[: config.evaluation_samples]
        real, labels = real[some], labels[some]
    noise = [edm.normal(real.shape, gen) for _ in range(config.evaluation_draws)]
    state = gen.get_state()
    rows = [judge.row(data.compared, [real], labels) | {"evaluations": None, "samples_per_second": None}]
    if data.mixture is not None:
        rows[0] |= data.mixture.strays(real) | {"exact": data.mixture.exact_strays}
    for sampler in bar("evaluation", samplers):
        gen.set_state(state)
        row = judge.row(sampler.name, [sampler(one, labels) for one in noise], labels)
        if modes:
            row |= judge.coverage(sampler, gen, divergences, config.mode_samples)
        speed = sampler.per_second(noise[0][:SPEED], labels[:SPEED]) if speeds else None
        rows.append(row | {"evaluations": sampler.evaluations, "samples_per_second": speed})
    return [row | judge.verdict for row in rows]
