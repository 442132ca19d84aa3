"""The class-conditional denoiser (teacher, student and fake score): a small residual MLP, or a convolutional U-Net for
images of 16 pixels or more; the discriminator head on the teacher's features, and the classifier whose features the
evaluation uses."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from . import edm

CONVOLUTIONAL = 16  # pixels each way, from which on images get convolutions


class MissingPackage(RuntimeError):
    """What is not installed, and the command that installs it, as one line."""


class Network(Protocol):
    """What EDM's preconditioning is put around.

    Attributes:
        label: the embedding of the classes.
        features: how many a sample has for the discriminator.
    """

    label: nn.Embedding
    features: int

    def __call__(self, x: Tensor, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The output, shaped as x [B, *shape], and the features [B, features], at noise levels ln(sigma)/4 [B]."""


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether samples of that shape are images that get convolutions; a layer on a whole image that is narrower than
    the image cannot tell the noise in all of its pixels."""
    return len(shape) > 1 and min(shape[-2:]) >= CONVOLUTIONAL


def unet_class() -> Any:
    """diffusers' UNet2DModel, whose import takes seconds.

    Raises:
        MissingPackage: where it cannot be imported.
    """
    try:
        from diffusers import UNet2DModel
    except (ImportError, RuntimeError) as error:  # diffusers turns the former into the latter
        reason = str(error).strip().split("\n")[0]
        raise MissingPackage(
            f"images of {CONVOLUTIONAL} pixels or more need diffusers ({reason}); pip install 'fdistill_ops[trainer]'"
        ) from None
    return UNet2DModel


class Block(nn.Module):
    """A residual two-layer MLP; the embedding of noise level and class is added to its normalised input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.down(silu(self.up(self.norm(h) + embedding)))


class MLP(nn.Module):
    """Of whole samples. The features are the hidden states after every block and the embedding."""

    frequencies: Tensor

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int) -> None:
        super().__init__()
        size = math.prod(shape)
        self.features = (depth + 1) * width
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(6), persistent=False)
        self.time = nn.Linear(12, width)
        self.label = nn.Embedding(classes, width)
        self.first = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, size)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        phase = noise[:, None] * self.frequencies
        embedding = silu(self.time(torch.cat([phase.cos(), phase.sin()], dim=1)) + self.label(labels))
        h = self.first(x.flatten(1))
        features = [embedding]
        for block in self.blocks:
            h = block(h, embedding)
            features.append(h)
        return self.last(silu(self.norm(h))).view_as(x), torch.cat(features, dim=1)


class UNet(nn.Module):
    """Of images: three resolutions, attention at the lowest. The features are the middle block's activations: means
    over the pixels, and means of squares."""

    LEVELS = 3

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int) -> None:
        super().__init__()
        channels = 1 if len(shape) == 2 else shape[0]
        width = max(8, width // 32 * 8)
        self.features = 4 * width
        plain = self.LEVELS - 1
        self.unet = unet_class()(
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(width, *[2 * width] * plain),
            down_block_types=(*["DownBlock2D"] * plain, "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * plain),
            layers_per_block=max(1, depth // 4),
            attention_head_dim=None,
            norm_num_groups=8,
            class_embed_type="identity",
        )
        self.label = nn.Embedding(classes, 4 * width)
        self.last = self.unet.conv_out
        self.middle: Tensor | None = None
        self.unet.mid_block.register_forward_hook(self._keep)  # once: torch.compile cannot register any

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.middle = output

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = x.shape[-2:]
        images = x.view(len(x), -1, height, width)
        more = [-size % 2 ** (self.LEVELS - 1) for size in (width, height)]
        if any(more):
            images = pad(images, (0, more[0], 0, more[1]), mode="replicate")
        # The noise level as a time of the order of 1,000, which the embedding is made for.
        output = self.unet(images, 1000 * noise, self.label(labels), return_dict=False)[0]
        middle, self.middle = self.middle, None  # which holds on to no graph
        assert middle is not None
        features = torch.cat([middle.mean((2, 3)), middle.square().mean((2, 3))], dim=1)
        return output[..., :height, :width].reshape(x.shape), features


class Denoiser(nn.Module):
    """D(x; sigma, class), an estimate of E[x0 | x0 + sigma noise = x], preconditioned as in EDM (arXiv 2206.00364,
    eq. 7). At first the ideal one for data ~ N(0, sigma_data^2), which its network's output 0 stands for.

    Args:
        shape: of one sample, without the batch dimension.
        classes: their number.
        width, depth: hidden units and blocks of an MLP. A U-Net has a quarter as many channels at full size, in eights,
            and a quarter as many layers at each resolution.
        sigma_data: standard deviation of the data.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int, sigma_data: float) -> None:
        super().__init__()
        self.shape, self.no_class, self.sigma_data = tuple(shape), classes, sigma_data
        kind = UNet if is_large(self.shape) else MLP
        self.network: Any = kind(self.shape, classes + 1, width, depth)  # a Network; the last class: none
        for parameter in self.network.last.parameters():
            nn.init.zeros_(parameter)

    def repeat_classes(self, times: int) -> None:
        """Class k becomes the classes k + i * (no_class + 1), for i below ``times``, at first all alike."""
        self.network.label = nn.Embedding.from_pretrained(self.network.label.weight.repeat(times, 1), freeze=False)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """x0-prediction for noisy samples [B, *shape], noise levels [B] and classes [B] (``no_class``: of any)."""
        return self.with_features(x, sigma, labels)[0]

    def with_features(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The x0-prediction, and the network's features [B, network.features]."""
        c = edm.preconditioning(sigma, self.sigma_data)
        output, features = self.network(edm.rows(c.input, x) * x, c.noise, labels)
        return edm.rows(c.skip, x) * x + edm.rows(c.output, x) * output, features


class DiscriminatorHead(nn.Module):
    """Logits [B] from the teacher's features and the student's step [B] that made a sample: once trained,
    log(real/generated by that step) at their noise level and class."""

    def __init__(self, inputs: int, width: int, steps: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width))
        self.step = nn.Embedding.from_pretrained(torch.zeros(steps, width), freeze=False)
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor, steps: Tensor) -> Tensor:
        return self.last(self.first(features) + self.step(steps)).squeeze(1)


class Classifier(nn.Module):
    """Logits over the classes; ``features`` is where the Frechet distance and the k-NN manifolds are measured. Large
    images get three convolutions, each of which halves them."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 256, features: int = 32) -> None:
        super().__init__()
        if is_large(shape):
            channels = 1 if len(shape) == 2 else shape[0]
            layers: list[nn.Module] = [nn.Unflatten(1, (1, shape[0]))] if len(shape) == 2 else []
            for before, after in ((channels, 32), (32, 64), (64, 128)):
                layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, features)]
        else:
            layers = [nn.Flatten(), nn.Linear(math.prod(shape), width), nn.SiLU()]
            layers += [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, features)]
        self.features = nn.Sequential(*layers)
        self.last = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(silu(self.features(x)))
