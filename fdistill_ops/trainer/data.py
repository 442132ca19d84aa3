"""The data sets by name, and how they are split. Images of one's own are read by ``own_data``."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .config import Config
from .limits import Limits
from .mixtures import MIXTURES, Mixture
from .own_data import Images, read

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
    holds_out: bool = True  # otherwise ``held_out`` is what is trained on, too

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.shape[1:])

    @property
    def kind(self) -> str:
        return "images" if self.mixture is None else "points"

    @property
    def compared(self) -> str:
        """What ``held_out`` is called."""
        return f"{'held-out' if self.holds_out else 'training'} {self.kind}"

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
    if config.data in MIXTURES:
        return _points(config)
    data = _EMBEDDED[config.data](config) if config.data in _EMBEDDED else _own(config)
    if config.flip and config.data != "patches":  # which have their mirror images
        train, labels = torch.cat([data.train, data.train.flip(-1)]), data.train_labels.repeat(2)
        data = dataclasses.replace(data, train=train, train_labels=labels)
    return data


def _own(config: Config) -> Data:
    """A share of every class is held out, at least two images of each if it is one at all."""
    gen = torch.Generator().manual_seed(config.seed)
    images = read(Path(config.data), config.image_size, Limits(config.max_pixels, config.max_mib))
    order = torch.randperm(len(images.labels), generator=gen)
    order = order[images.labels[order].argsort(stable=True)]  # within a class, the order is the random one
    counts = [int(count) for count in images.labels.bincount()]
    least = [max(int(config.hold_out * count), 2) if config.hold_out else 0 for count in counts]
    held_out = torch.cat([torch.arange(n) >= n - k for n, k in zip(counts, least, strict=True)])
    train = order[~held_out]
    train = train[torch.randperm(len(train), generator=gen)]
    return _split(name_of(config.data), images, train, order[held_out], config)


def name_of(data: str) -> str:
    """What a data set, given by name or path, is called."""
    return data if data in NAMES else Path(data).resolve().stem.encode(errors="replace").decode()


def _split(name: str, samples: Images, train: Tensor, held_out: Tensor, config: Config) -> Data:
    """The samples with the indices ``train`` and ``held_out``."""
    held_out, holds_out = (held_out, True) if len(held_out) else (train, False)
    device = torch.device(config.device)
    sides = [(samples.images[index].to(device), samples.labels[index].to(device)) for index in (train, held_out)]
    return Data(name, *sides[0], *sides[1], samples.classes, holds_out=holds_out)


def _digits(config: Config) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = Images(torch.from_numpy(digits.images).float() / 8 - 1, torch.from_numpy(digits.target).long(), 10)
    order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(config.seed))
    count = round(len(order) * (1 - config.hold_out))
    return _split("digits", images, order[:count], order[count:], config)


def _patches(config: Config) -> Data:
    """Colour patches of scikit-learn's two photographs, [3, 32, 32]; the class is the photograph.

    The photographs are cut into tiles of 64 x 64 pixels, a share of which is held out, and patches taken 8 pixels
    apart within each tile, so that no pixel is on both sides. Those trained on are there as mirror images as well.
    """
    from sklearn.datasets import load_sample_images

    gen = torch.Generator().manual_seed(config.seed)
    sides: list[list[Tensor]] = [[], []]
    for photograph in load_sample_images().images:
        pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1).float() / 127.5 - 1
        tiles = pixels.unfold(1, TILE, TILE).unfold(2, TILE, TILE).flatten(1, 2).transpose(0, 1)
        patches = tiles.unfold(2, PATCH, STRIDE).unfold(3, PATCH, STRIDE).flatten(2, 3).transpose(1, 2)
        order = torch.randperm(len(tiles), generator=gen)
        count = round(len(tiles) * (1 - config.hold_out))
        sides[0].append(patches[order[:count]].flatten(0, 1))
        sides[0][-1] = torch.cat([sides[0][-1], sides[0][-1].flip(3)])
        sides[1].append(patches[order[count:]].flatten(0, 1))
    images = Images(torch.cat(sides[0] + sides[1]), torch.cat([_labels(side) for side in sides]), classes=2)
    count = sum(map(len, sides[0]))
    held_out = torch.arange(count, len(images.labels))
    return _split("patches", images, torch.randperm(count, generator=gen), held_out, config)


def _labels(parts: list[Tensor]) -> Tensor:
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))


def _points(config: Config) -> Data:
    """Points of a mixture, all of one class: which mode they are from is not told."""
    mixture, gen = MIXTURES[config.data](), torch.Generator().manual_seed(config.seed)
    points = Images(mixture.sample(POINTS + HELD_OUT_POINTS, gen), torch.zeros(POINTS + HELD_OUT_POINTS).long(), 1)
    index = torch.arange(len(points.labels))
    data = _split(config.data, points, index[:POINTS], index[POINTS:], config)
    return dataclasses.replace(data, mixture=mixture.to(torch.device(config.device)))


_EMBEDDED: dict[str, Callable[[Config], Data]] = {"digits": _digits, "patches": _patches}
NAMES = ("digits", *MIXTURES, "patches")
