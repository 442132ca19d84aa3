"""The data sets by name, and how they are split. Images of one's own are read by ``own_data``."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .config import Config
from .mixtures import MIXTURES, Mixture
from .own_data import Images, read

HELD_OUT = 0.25
POINTS = 20_000  # drawn from a mixture, to train on
HELD_OUT_POINTS = 2_000
PATCH, TILE, STRIDE = 32, 64, 8


@dataclasses.dataclass(frozen=True)
class Data:
    """Samples [N, *shape], float32, and classes [N], split into what is trained on and what is only compared with.

    Images are [H, W], or [C, H, W] in colour, in [-1, 1]; points are [2] and have their mixture.
    """

    name: str
    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: int
    mixture: Mixture | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.shape[1:])

    @property
    def kind(self) -> str:
        return "images" if self.mixture is None else "points"

    @property
    def sigma_data(self) -> float:
        return float(self.train.std())

    @property
    def fingerprint(self) -> str:
        """A hash of the samples and classes: other data has another one."""
        digest = hashlib.sha256()
        for part in (self.train, self.train_labels, self.held_out, self.held_out_labels):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()


def load(config: Config) -> Data:
    """The data set ``config.data``, a name or a path, in an order drawn from the seed; DataError says what is wrong
    with a path's content in one line."""
    gen = torch.Generator().manual_seed(config.seed)
    device = torch.device(config.device)
    if config.data in MIXTURES:
        return _points(config.data, gen, device)
    if config.data in _EMBEDDED:
        return _EMBEDDED[config.data](gen, device)
    path = Path(config.data)
    images = read(path, config.image_size)
    order = torch.randperm(len(images.labels), generator=gen)
    # A share of every class is held out. The sort is stable: within a class, the order is the random one.
    order = order[images.labels[order].argsort(stable=True)]
    rank = torch.cat([torch.arange(int(count)) / count for count in images.labels.bincount()])
    held_out = rank >= 1 - HELD_OUT
    train = order[~held_out]
    train = train[torch.randperm(len(train), generator=gen)]
    return _split(name_of(config.data), images, train, order[held_out], device)


def name_of(data: str) -> str:
    """What a data set, given by name or path, is called."""
    return data if data in NAMES else Path(data).resolve().stem.encode(errors="replace").decode()


def _split(name: str, samples: Images, train: Tensor, held_out: Tensor, device: torch.device) -> Data:
    """The samples with the indices ``train`` and ``held_out``."""
    sides = [(samples.images[index].to(device), samples.labels[index].to(device)) for index in (train, held_out)]
    return Data(name, *sides[0], *sides[1], samples.classes)


def _digits(gen: torch.Generator, device: torch.device) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = Images(torch.from_numpy(digits.images).float() / 8 - 1, torch.from_numpy(digits.target).long(), 10)
    order = torch.randperm(len(images.labels), generator=gen)
    count = round(len(order) * (1 - HELD_OUT))
    return _split("digits", images, order[:count], order[count:], device)


def _patches(gen: torch.Generator, device: torch.device) -> Data:
    """Colour patches of scikit-learn's two photographs, [3, 32, 32]; the class is the photograph.

    The photographs are cut into tiles of 64 x 64 pixels, a quarter of which are held out, and patches taken 8 pixels
    apart within each tile, so that no pixel is on both sides. Those trained on are there as mirror images as well.
    """
    from sklearn.datasets import load_sample_images

    sides: list[list[Tensor]] = [[], []]
    for photograph in load_sample_images().images:
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1).float() / 127.5 - 1
        tiles = pixels.unfold(1, TILE, TILE).unfold(2, TILE, TILE).flatten(1, 2).transpose(0, 1)
        patches = tiles.unfold(2, PATCH, STRIDE).unfold(3, PATCH, STRIDE).flatten(2, 3).transpose(1, 2)
        order = torch.randperm(len(tiles), generator=gen)
        count = round(len(tiles) * (1 - HELD_OUT))
        sides[0].append(patches[order[:count]].flatten(0, 1))
        sides[0][-1] = torch.cat([sides[0][-1], sides[0][-1].flip(3)])
        sides[1].append(patches[order[count:]].flatten(0, 1))
    images = Images(torch.cat(sides[0] + sides[1]), torch.cat([_labels(side) for side in sides]), classes=2)
    count = sum(map(len, sides[0]))
    held_out = torch.arange(count, len(images.labels))
    return _split("patches", images, torch.randperm(count, generator=gen), held_out, device)


def _labels(parts: list[Tensor]) -> Tensor:
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))


def _points(name: str, gen: torch.Generator, device: torch.device) -> Data:
    """Points of a mixture, all of one class: which mode they are from is not told."""
    mixture = MIXTURES[name]()
    points = Images(mixture.sample(POINTS + HELD_OUT_POINTS, gen), torch.zeros(POINTS + HELD_OUT_POINTS).long(), 1)
    index = torch.arange(len(points.labels))
    data = _split(name, points, index[:POINTS], index[POINTS:], device)
    return dataclasses.replace(data, mixture=mixture.to(device))


_EMBEDDED: dict[str, Callable[[torch.Generator, torch.device], Data]] = {"digits": _digits, "patches": _patches}
NAMES = ("digits", *MIXTURES, "patches")
