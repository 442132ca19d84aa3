"""The PNG files of a run, drawn by matplotlib's Agg back end without touching its global state."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from fdistill_ops._colours import LINES, OKABE_ITO

from . import edm
from .config import Config
from .data import Data
from .evaluate import Sampler
from .files import Record, whole_file
from .mixtures import Mixture
from .progress import bar
from .training import random_numbers

LEAST_ROWS, MOST_CLASSES = 8, 20  # of a grid of images
POINTS = 2_000


@dataclass(frozen=True)
class WeightCurve:
    """The f-weights of one divergence: over the training (log records), and of samples at its end by noise level."""

    name: str
    records: list[Record]
    levels: list[dict[str, float]]


def by_noise_level(sigma: Tensor, weights: Tensor, bins: int = 16) -> list[dict[str, float]]:
    """Median and 10% and 90% quantiles of the weights in bins of log(sigma) that hold equally many samples."""
    order = sigma.argsort().cpu()
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    chunks = zip(sigma.cpu()[order].chunk(bins), weights.float().cpu()[order].chunk(bins), strict=True)
    return [
        {"sigma": float(level.log().mean().exp())}
        | dict(zip(("low", "median", "high"), part.quantile(quantiles).tolist(), strict=True))
        for level, part in chunks
    ]


# ------------------------------------------------------------------------------------------------------------- samples


def sample_sets(config: Config, data: Data, samplers: list[Sampler]) -> dict[str, Tensor]:
    """Samples to be looked at, by name: the held-out data, then every sampler from the same noise. Points [N, 2], or
    rows and columns of images [rows, columns, ...], each class in rows of its own."""
    gen = random_numbers(config, "grids")
    real = data.compared
    if data.mixture is not None:
        noise = edm.normal((POINTS, *data.shape), gen)
        labels = data.held_out_labels.new_zeros(POINTS)
        return {real: data.held_out[:POINTS]} | {one.name: one(noise, labels) for one in bar("sampling", samplers)}
    columns = config.grid_columns
    classes = min(data.classes, MOST_CLASSES)
    each = columns * max(1, LEAST_ROWS // classes)
    labels = torch.arange(classes, device=config.device).repeat_interleave(each)
    noise = edm.normal((len(labels), *data.shape), gen)
    grids = {real: torch.cat([filled(data.held_out[data.held_out_labels == k][:each], each) for k in range(classes)])}
    grids |= {one.name: one(noise, labels) for one in bar("sampling", samplers)}
    return {name: images.unflatten(0, (-1, columns)) for name, images in grids.items()}


def filled(images: Tensor, count: int) -> Tensor:
    """As many images as asked for, the last ones black where there are too few."""
    return torch.cat([images, images.new_full((count - len(images), *images.shape[1:]), -1.0)])


def draw(config: Config, data: Data, samplers: list[Sampler], curves: list[WeightCurve]) -> None:
    """The PNG files: a picture for the data and for every sampler, the weights, and all of it."""
    sets = sample_sets(config, data, samplers)
    for name, samples in sets.items():
        samples_png(config.out / f"{re.sub(r'[^a-zA-Z0-9.-]+', '_', name)}.png", samples, data.mixture)
    weights_png(config.out / "weights.png", curves)
    overview_png(config.out / "overview.png", sets, curves, data.mixture)


def samples_png(path: Path, samples: Tensor, mixture: Mixture | None) -> None:
    """One of the sets."""
    size = (4.0, 4.0) if mixture is not None else (samples.shape[1] * 0.4, samples.shape[0] * 0.4)
    figure = _figure(*size, layout=None)
    _draw_samples(figure.add_axes((0, 0, 1, 1)), samples, mixture)
    _save(figure, path)


def weights_png(path: Path | IO[bytes], curves: list[WeightCurve]) -> None:
    figure = _figure(10, 3.8)
    _draw_weights(figure.subplots(1, 2), curves)
    _save(figure, path)


def overview_png(path: Path, sets: dict[str, Tensor], curves: list[WeightCurve], mixture: Mixture | None) -> None:
    """The samples side by side, and the weights below."""
    figure = _figure(3.2 * max(len(sets), 3), 7.2)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    _draw_sets(top, sets, mixture)
    _draw_weights(bottom.subplots(1, 2), curves)
    _save(figure, path)


def sets_png(path: Path | IO[bytes], sets: dict[str, Tensor], mixture: Mixture | None) -> None:
    """The samples side by side."""
    figure = _figure(2.8 * len(sets), 3.2)
    _draw_sets(figure, sets, mixture)
    _save(figure, path)


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path | IO[bytes]) -> None:
    if isinstance(path, Path):
        with whole_file(path) as file:
            figure.savefig(file, format="png")
    else:
        figure.savefig(path, format="png")


def _draw_sets(figure: Any, sets: dict[str, Tensor], mixture: Mixture | None) -> None:
    for axes, (title, samples) in zip(figure.subplots(1, len(sets), squeeze=False)[0], sets.items(), strict=True):
        _draw_samples(axes, samples, mixture)
        axes.set_title(title, fontsize=10)


def _draw_samples(axes: Any, samples: Tensor, mixture: Mixture | None) -> None:
    if mixture is None:
        _draw_grid(axes, samples)
    else:
        _draw_points(axes, samples, mixture)


def _draw_grid(axes: Any, images: Tensor) -> None:
    """Images [rows, columns, H, W], or [rows, columns, 3, H, W], in [-1, 1]."""
    if images.ndim == 4:
        images = images[:, :, None]
    rows, columns, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images.cpu().clamp(-1, 1), (1, 1, 1, 1), value=-1.0)
    picture = padded.permute(0, 3, 1, 4, 2).reshape(rows * (height + 2), columns * (width + 2), channels)
    shown = picture.squeeze(2) if channels == 1 else (picture + 1) / 2
    axes.imshow(shown.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def _draw_points(axes: Any, points: Tensor, mixture: Mixture) -> None:
    """Points [N, 2] over the logarithm of the mixture's density, from white at a thousandth of its maximum."""
    reach = float(mixture.means.abs().max()) + 6 * mixture.std
    ticks = torch.linspace(-reach, reach, 200, dtype=torch.float64)
    lattice = torch.cartesian_prod(ticks, ticks).to(mixture.means.device)
    density = mixture.log_density(lattice).view(200, 200).T.cpu()
    top, decades = float(density.max()), math.log(1000)
    extent = (-reach, reach, -reach, reach)
    axes.imshow(density.numpy(), cmap="Greys", vmin=top - decades, vmax=top + decades, origin="lower", extent=extent)
    axes.scatter(*points.cpu().numpy().T, s=1.5, alpha=0.5, linewidths=0, color=OKABE_ITO["vermilion"])
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set_axis_off()


# ------------------------------------------------------------------------------------------------------------- weights


def _draw_weights(panels: Any, curves: list[WeightCurve]) -> None:
    """Left: minimum, mean and maximum of a batch over the steps. Right: the distribution over the noise level."""
    training, noise = panels
    for index, curve in enumerate(curves):
        color = LINES[index % len(LINES)]
        steps = [record["step"] for record in curve.records]
        low, mean, high = ([record[f"weight_{name}"] for record in curve.records] for name in ("min", "mean", "max"))
        training.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        training.plot(steps, low, color=color, linewidth=0.8)
        training.plot(steps, high, color=color, linewidth=0.8)
        training.plot(steps, mean, color=color, linestyle="--", label=curve.name)
        sigma, low, median, high = (
            [level[name] for level in curve.levels] for name in ("sigma", "low", "median", "high")
        )
        noise.fill_between(sigma, low, high, color=color, alpha=0.2, linewidth=0)
        noise.plot(sigma, median, color=color, label=curve.name)
    training.set(xlabel="step", ylabel="f-weight", title="min, mean (dashed) and max of a batch")
    noise.set(xlabel="noise level sigma", xscale="log", title="median and 10-90% band, after the training")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
