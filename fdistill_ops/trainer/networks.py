"""Small residual MLPs: the class-conditional denoiser (teacher, student and fake score), the discriminator head on the
teacher's features, and the classifier whose features the evaluation uses."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from . import edm

PATCH = 4  # pixels in each direction


def patches_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of the patches that an image is cut into; None for small images and all else, which are taken
    whole: a layer narrower than an image cannot tell the noise in all of its pixels."""
    height, width = shape[-2:] if len(shape) > 1 else (1, 1)
    if min(height, width) < 4 * PATCH or height % PATCH or width % PATCH:
        return None
    return height // PATCH, width // PATCH


class Block(nn.Module):
    """A residual two-layer MLP on every token; the embedding of noise level and class is added to its normalised input.
    Several tokens are mixed before (as in MLP-Mixer, arXiv 2105.01601)."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.mix = nn.Linear(tokens, tokens) if tokens > 1 else None
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        if self.mix is not None:
            h = h + self.mix(h.transpose(1, 2)).transpose(1, 2)
        return h + self.down(silu(self.up(self.norm(h) + embedding[:, None])))


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
        self.patches = patches_of(shape)
        tokens = math.prod(self.patches or (1,))
        size = math.prod(shape) // tokens
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(6), persistent=False)
        self.time = nn.Linear(12, width)
        self.label = nn.Embedding(classes + 1, width)  # the last one: no class
        self.first = nn.Linear(size, width)
        self.position = nn.Parameter(torch.randn(tokens, width)) if tokens > 1 else None
        self.blocks = nn.ModuleList(Block(width, tokens) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, size)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def tokens(self, x: Tensor) -> Tensor:
        """Samples [B, *shape] as [B, tokens, size]."""
        if self.patches is None:
            return x.flatten(1)[:, None]
        rows, columns = self.patches
        return x.reshape(len(x), -1, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def samples(self, tokens: Tensor) -> Tensor:
        """The other way."""
        if self.patches is not None:
            tokens = tokens.unflatten(1, self.patches).unflatten(3, (-1, PATCH, PATCH)).permute(0, 3, 1, 4, 2, 5)
        return tokens.reshape(len(tokens), *self.shape)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """x0-prediction for noisy samples [B, *shape], noise levels [B] and classes [B] (``no_class``: of any)."""
        return self.with_features(x, sigma, labels)[0]

    def with_features(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The x0-prediction, and the hidden states after every block (the tokens' mean) and the embedding,
        [B, (depth + 1) * width]."""
        c = edm.preconditioning(sigma, self.sigma_data)
        phase = c.noise[:, None] * self.frequencies
        embedding = silu(self.time(torch.cat([phase.cos(), phase.sin()], dim=1)) + self.label(labels))
        h = self.first(self.tokens(edm.rows(c.input, x) * x))
        if self.position is not None:
            h = h + self.position
        features = [embedding]
        for block in self.blocks:
            h = block(h, embedding)
            features.append(h.mean(1))
        output = self.samples(self.last(silu(self.norm(h))))
        x0 = edm.rows(c.skip, x) * x + edm.rows(c.output, x) * output
        return x0, torch.cat(features, dim=1)


class DiscriminatorHead(nn.Module):
    """Logits [B] from the teacher's features and the student's step [B] that made a sample: once trained,
    log(real/generated by that step) at their noise level and class."""

    def __init__(self, width: int, depth: int, steps: int) -> None:
        super().__init__()
        inputs = (depth + 1) * width
        self.first = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width))
        self.step = nn.Embedding.from_pretrained(torch.zeros(steps, width), freeze=False)
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor, steps: Tensor) -> Tensor:
        return self.last(self.first(features) + self.step(steps)).squeeze(1)


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
