"""Small residual MLPs: the class-conditional denoiser (teacher, student and fake score), the discriminator head on the
teacher's features, and the classifier whose features the evaluation uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from . import edm


class Block(nn.Module):
    """A residual two-layer MLP; the embedding of noise level and class is added to its normalised input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.down(silu(self.up(self.norm(h) + embedding)))


class Denoiser(nn.Module):
    """D(x; sigma, class), an estimate of E[x0 | x0 + sigma noise = x], preconditioned as in EDM (arXiv 2206.00364,
    eq. 7). At first the ideal one for data ~ N(0, sigma_data^2), which its output 0 stands for.

    Args:
        shape: of one sample, without the batch dimension.
        classes, width, depth: number of classes, hidden width, number of blocks.
        sigma_data: standard deviation of the data.
    """

    frequencies: Tensor

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int, sigma_data: float) -> None:
        super().__init__()
        self.shape, self.no_class, self.sigma_data = shape, classes, sigma_data
        pixels = math.prod(shape)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(6), persistent=False)
        self.time = nn.Linear(12, width)
        self.label = nn.Embedding(classes + 1, width)  # the last one: no class
        self.first = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, pixels)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """x0-prediction for noisy samples [B, *shape], noise levels [B] and classes [B] (``no_class``: of any)."""
        return self.with_features(x, sigma, labels)[0]

    def with_features(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The x0-prediction, and the hidden states after every block and the embedding, [B, (depth + 1) * width]."""
        c = edm.preconditioning(sigma, self.sigma_data)
        phase = c.noise[:, None] * self.frequencies
        embedding = silu(self.time(torch.cat([phase.cos(), phase.sin()], dim=1)) + self.label(labels))
        h = self.first(c.input[:, None] * x.flatten(1))
        features = [embedding]
        for block in self.blocks:
            h = block(h, embedding)
            features.append(h)
        output = self.last(silu(self.norm(h)))
        x0 = c.skip[:, None] * x.flatten(1) + c.output[:, None] * output
        return x0.view_as(x), torch.cat(features, dim=1)


class DiscriminatorHead(nn.Module):
    """Logits [B] from the teacher's features, log(real/generated) at their noise level and class once trained."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        inputs = (depth + 1) * width
        self.layers = nn.Sequential(
            *(nn.LayerNorm(inputs), nn.Linear(inputs, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).squeeze(1)


class Classifier(nn.Module):
    """Logits over the classes; ``features`` is where the Frechet distance and the k-NN manifolds are measured."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 256, features: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Flatten(), nn.Linear(math.prod(shape), width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, features)),
        )
        self.last = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(silu(self.features(x)))
