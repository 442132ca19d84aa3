"""How good samples are: Frechet distance, precision and recall in the classifier's features, classes, speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import edm
from .config import Config
from .data import Data
from .networks import Classifier
from .training import random_numbers

Row = dict[str, Any]
NEIGHBOURS = 3


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians with the means and covariances of two sets of features [N, D] (Heusel et al.,
    arXiv 1706.08500, eq. 6): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
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
    between = torch.cdist(real, generated)
    inside_real = between <= _radii(real, k)[:, None]
    inside_generated = between <= _radii(generated, k)[None, :]
    return float(inside_real.any(0).double().mean()), float(inside_generated.any(1).double().mean())


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour, itself not counted."""
    return torch.cdist(points, points).kthvalue(k + 1, dim=1).values


class Judge:
    """Compares samples with the training images, in the classifier's features scaled to unit variance there."""

    @torch.no_grad()
    def __init__(self, classifier: Classifier, data: Data) -> None:
        self.classifier, self.classes = classifier, data.classes
        features = classifier.features(data.train)
        self.mean, self.std = features.mean(0), features.std(0)
        self.reference = self.features(data.train)

    def features(self, images: Tensor) -> Tensor:
        return (self.classifier.features(images) - self.mean) / self.std

    @torch.no_grad()
    def row(self, name: str, draws: list[Tensor], labels: Tensor) -> Row:
        """One row of the table, from draws of images [N, ...] asked for with the classes ``labels`` [N].

        Every row has the same N, since the distances depend on it; numbers are means over the draws.
        """
        features = [self.features(images) for images in draws]
        distances = torch.tensor([frechet_distance(self.reference, one) for one in features], dtype=torch.float64)
        manifolds = torch.tensor([precision_recall(self.reference, one) for one in features], dtype=torch.float64)
        predicted = torch.cat([self.classifier(images).argmax(1) for images in draws])
        asked = labels.repeat(len(draws))
        counts = predicted.bincount(minlength=self.classes)
        wanted = asked.bincount(minlength=self.classes)
        return {
            "name": name,
            "samples": len(asked),
            "frechet": float(distances.mean()),
            "frechet_std": float(distances.std()) if len(draws) > 1 else None,
            "precision": float(manifolds[:, 0].mean()),
            "recall": float(manifolds[:, 1].mean()),
            "agreement": float((predicted == asked).double().mean()),
            "classes": int((counts > 0).sum()),
            "rarest_class": float((counts.double() / wanted).min()),
            "class_counts": counts.tolist(),
        }


@dataclass(frozen=True)
class Sampler:
    """Turns unit noise [N, ...] and classes [N] into images, with so many evaluations of a network."""

    name: str
    evaluations: int
    sample: Callable[[Tensor, Tensor], Tensor]

    @torch.no_grad()
    def __call__(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.sample(noise, labels)

    def per_second(self, noise: Tensor, labels: Tensor, seconds: float = 0.3) -> float:
        """Samples per second, after one call to warm up."""
        self(noise, labels)
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            self(noise, labels).sum().item()  # waits for the device
            count += len(noise)
        return count / elapsed


def evaluate(samplers: list[Sampler], judge: Judge, config: Config, data: Data) -> list[Row]:
    """The table: the held-out images, then every sampler, from the same noise and for the same classes."""
    gen = random_numbers(config, "evaluation")
    labels = data.held_out_labels
    noise = [edm.normal(data.held_out.shape, gen) for _ in range(config.evaluation_draws)]
    rows = [judge.row("held-out images", [data.held_out], labels) | {"evaluations": None, "samples_per_second": None}]
    for sampler in samplers:
        row = judge.row(sampler.name, [sampler(one, labels) for one in noise], labels)
        speed = sampler.per_second(noise[0], labels)
        rows.append(row | {"evaluations": sampler.evaluations, "samples_per_second": speed})
    return rows
