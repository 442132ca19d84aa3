"""The embedded data set: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, 10 classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """Images [N, 8, 8] in [-1, 1] and classes [N], split into what is trained on and what is only compared with."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    classes: int

    @property
    def sigma_data(self) -> float:
        return float(self.train.std())


def load_digits(seed: int, device: torch.device, held_out: float = 0.25) -> Data:
    """The digits in an order drawn from the seed; the last fraction is held out."""
    from sklearn.datasets import load_digits as load

    digits = load()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = (torch.from_numpy(digits.images).float() / 8 - 1)[order].to(device)
    labels = torch.from_numpy(digits.target).long()[order].to(device)
    count = round(len(labels) * (1 - held_out))
    return Data(images[:count], labels[:count], images[count:], labels[count:], classes=len(digits.target_names))
