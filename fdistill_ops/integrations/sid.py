"""mingyuanzhou/SiD: the generator's loss of its SID_EDMLoss class.

``patch()`` swaps ``SID_EDMLoss.generator_loss``; :func:`summed_loss` is the loss alone, for training loops of one's
own. Random numbers are drawn in SiD's order. (The SiD class of Self-Forcing is in
:mod:`fdistill_ops.integrations.self_forcing`.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch import make_subclass, tree_map_only
from ..losses import score_identity_loss
from ._known import KNOWN
from ._patching import Patch, Patched, Target

__all__ = ["generator_loss", "patch", "summed_loss", "unpatch"]

_LEAST_DISTANCE = 1e-5


def summed_loss(images: Tensor, y_real: Tensor, y_fake: Tensor, alpha: float = 1.2) -> Tensor:
    """The sum over all elements of SiD's loss, (T - F) ((T - x) - alpha (T - F)) / max(mean |x - T|, 1e-5).

    Args:
        images: x, [B, ...], the generator's samples (augmented, where they are).
        y_real, y_fake: T and F, x0-predictions in the same shape. The gradient flows to all three.
        alpha: the coefficient of the squared score difference.

    Returns:
        0-dimensional, float32 (float64 where an input is). A sample with a NaN in any of the three counts nothing.

    Raises:
        TypeError, ValueError: see :func:`fdistill_ops.score_identity_loss`.
    """
    with torch.no_grad():
        drop = y_fake.flatten(1).sum(1, dtype=torch.float32).isnan()
        # NaN where the sample has one: all of its elements are then left out.
        normalizer = torch.where(drop, torch.nan, _distance(images, y_real))
    return score_identity_loss(
        images, y_real, y_fake, alpha=alpha, normalizer=normalizer, eps=0.0, nonfinite="zero", reduction="sum"
    )


def _distance(images: Tensor, y_real: Tensor) -> Tensor:
    """max(mean |x - T|, 1e-5) of every sample, summed in float64."""
    difference = (images - y_real).flatten(1)
    total = torch.linalg.vector_norm(difference, ord=1, dim=1, dtype=torch.float64)
    return (total / max(difference.shape[1], 1)).clip(min=_LEAST_DISTANCE)


class _Elements(Tensor):
    """SiD's loss, of which its trainer takes nothing but the sum: that is one fused call. For any other operation the
    elements are computed, in PyTorch, without the samples that have a NaN."""

    inputs: tuple[Tensor, Tensor, Tensor]
    alpha: float

    @staticmethod
    def __new__(cls, inputs: tuple[Tensor, Tensor, Tensor], alpha: float) -> _Elements:
        self = make_subclass(cls, torch.empty(0))
        self.inputs, self.alpha = inputs, alpha
        return self

    def elements(self) -> Tensor:
        good = ~torch.stack([tensor.detach().flatten(1).isnan().any(1) for tensor in self.inputs]).any(0)
        x, real, fake = (tensor[good] for tensor in self.inputs)
        distance = _distance(x.detach(), real.detach()).to(torch.promote_types(x.dtype, torch.float32))
        distance = distance.reshape(-1, *[1] * (x.ndim - 1))
        return (real - fake) * ((real - x) - self.alpha * (real - fake)) / distance

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.sum, torch.sum) and len(args) == 1 and not kwargs:
            images, real, fake = args[0].inputs
            return summed_loss(images, real, fake, args[0].alpha)
        args, kwargs = tree_map_only(_Elements, _Elements.elements, (args, kwargs or {}))
        return func(*args, **kwargs)


def generator_loss(
    loss_fn: Any,
    true_score: Any,
    fake_score: Any,
    images: Tensor,
    labels: Tensor | None = None,
    augment_pipe: Any = None,
    alpha: float = 1.2,
    tmax: float = 800,
) -> Tensor:
    """SID_EDMLoss.generator_loss (training/sid_loss.py).

    Args:
        loss_fn: the SID_EDMLoss; not used, nor is it in the original.
        true_score, fake_score: the networks, called with (noisy, sigma, labels, augment_labels=).
        images: [B, C, H, W], the generator's samples; labels: what the networks are conditioned on.
        augment_pipe: gives (augmented images, augmentation labels); None for none.
        alpha: the coefficient of the squared score difference.
        tmax: noise levels are drawn from the first tmax thousandths of EDM's range.

    Returns:
        A tensor whose ``sum()``, which SiD's trainer takes, is :func:`summed_loss`; anything else computes the elements
        [B, C, H, W], without the samples that have a NaN, as the original does.
    """
    smallest, largest, rho = 0.002, 80, 7.0  # of EDM's noise levels
    start, end = largest ** (1 / rho), smallest ** (1 / rho)
    time = torch.rand([images.shape[0], 1, 1, 1], device=images.device) * tmax / 1000
    sigma = (start + (1 - time) * (end - start)) ** rho
    y, augment_labels = images, torch.zeros(images.shape[0], 9, device=images.device)
    if augment_pipe is not None:
        y, augment_labels = augment_pipe(images)
    noisy = y + torch.randn_like(y) * sigma
    real, fake = (score(noisy, sigma, labels, augment_labels=augment_labels) for score in (true_score, fake_score))
    return _Elements((y, real, fake), alpha)


_PROJECT = "mingyuanzhou/SiD"
_PATCH = Patch(
    _PROJECT,
    [
        Target(
            "training.sid_loss",
            "SID_EDMLoss.generator_loss",
            "self true_score fake_score images labels augment_pipe alpha tmax",
            replacement=generator_loss,
        )
    ],
    KNOWN[_PROJECT],
)


def patch(strict: bool = True) -> Patched:
    """Makes SiD's SID_EDMLoss use :func:`generator_loss`; as a context manager, for the length of the block. See
    :meth:`fdistill_ops.integrations.Patch.apply`."""
    return _PATCH.apply(strict)


def unpatch() -> None:
    """Undoes :func:`patch`."""
    _PATCH.revert()
