"""The PNG files of a run, drawn by matplotlib's Agg back end without touching its global state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .files import Record, whole_file


@dataclass(frozen=True)
class WeightCurve:
    """The f-weights of one divergence: over the training (log records), and of samples at its end by noise level."""

    name: str
    records: list[Record]
    sigma: Tensor
    weights: Tensor

    def by_noise_level(self, bins: int = 16) -> list[dict[str, float]]:
        """Median and 10% and 90% quantiles of the weights in bins of log(sigma) that hold equally many samples."""
        order = self.sigma.argsort().cpu()
        levels = torch.tensor([0.1, 0.5, 0.9])
        chunks = zip(self.sigma.cpu()[order].chunk(bins), self.weights.float().cpu()[order].chunk(bins), strict=True)
        return [
            {"sigma": float(sigma.log().mean().exp())}
            | dict(zip(("low", "median", "high"), weights.quantile(levels).tolist(), strict=True))
            for sigma, weights in chunks
        ]


def grid_png(path: Path, images: Tensor) -> None:
    """Images [rows, columns, H, W] in [-1, 1] as one picture."""
    figure = _figure(images.shape[1] * 0.4, images.shape[0] * 0.4, layout=None)
    _draw_grid(figure.add_axes((0, 0, 1, 1)), images)
    _save(figure, path)


def weights_png(path: Path, curves: list[WeightCurve]) -> None:
    figure = _figure(10, 3.8)
    _draw_weights(figure.subplots(1, 2), curves)
    _save(figure, path)


def overview_png(path: Path, grids: dict[str, Tensor], curves: list[WeightCurve]) -> None:
    """The sample grids side by side, and the weights below."""
    figure = _figure(3.2 * max(len(grids), 3), 7.2)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1))
    for axes, (title, images) in zip(top.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        _draw_grid(axes, images)
        axes.set_title(title, fontsize=10)
    _draw_weights(bottom.subplots(1, 2), curves)
    _save(figure, path)


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png")


def _draw_grid(axes: Any, images: Tensor) -> None:
    rows, columns, height, width = images.shape
    padded = torch.nn.functional.pad(images.cpu().clamp(-1, 1), (1, 1, 1, 1), value=-1.0)
    picture = padded.permute(0, 2, 1, 3).reshape(rows * (height + 2), columns * (width + 2))
    axes.imshow(picture.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def _draw_weights(panels: Any, curves: list[WeightCurve]) -> None:
    """Left: minimum, mean and maximum of a batch over the steps. Right: the distribution over the noise level."""
    training, noise = panels
    for index, curve in enumerate(curves):
        color = f"C{index}"
        steps = [record["step"] for record in curve.records]
        low, mean, high = ([record[f"weight_{name}"] for record in curve.records] for name in ("min", "mean", "max"))
        training.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        training.plot(steps, low, color=color, linewidth=0.8)
        training.plot(steps, high, color=color, linewidth=0.8)
        training.plot(steps, mean, color=color, linestyle="--", label=curve.name)
        levels = curve.by_noise_level()
        sigma = [level["sigma"] for level in levels]
        noise.fill_between(
            sigma, [v["low"] for v in levels], [v["high"] for v in levels], color=color, alpha=0.2, linewidth=0
        )
        noise.plot(sigma, [v["median"] for v in levels], color=color, label=curve.name)
    training.set(xlabel="step", ylabel="f-weight", title="min, mean (dashed) and max of a batch")
    noise.set(xlabel="noise level sigma", xscale="log", title="median and 10-90% band, after the training")
    for axes in panels:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
