"""Draws docs/divergences.png: h(r) of every divergence in fd.DIVERGENCES. Takes the path to write to, if another."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

import fdistill_ops as fd
from fdistill_ops._colours import OKABE_ITO

# Two more than the palette's seven for lines; line styles tell apart what overlaps.
COLOURS = (
    *(OKABE_ITO[name] for name in ("black", "orange", "blue", "green", "vermilion", "purple", "sky blue")),
    *("#8C6D1F", "#7F7F7F"),
)
STYLES = ("-", "-", "-", "--", "-", "--", "-", "-", ":")
LOW, HIGH = 0.1, 20.0  # the default ratio_clip


def draw(path: Path) -> None:
    log_r = torch.linspace(-4.7, 4.7, 400, dtype=torch.float64)
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(LOW, HIGH, color="#f0f0f0", zorder=0)
    axes.axvline(1, color="#c8c8c8", linewidth=0.8, zorder=1)
    lines = []
    for divergence, colour, style in zip(fd.DIVERGENCES.values(), COLOURS, STYLES, strict=True):
        label = divergence.name if divergence.a is None else f"{divergence.name}, a = {divergence.a:g}"
        h = divergence.log_h(log_r).exp()
        (line,) = axes.plot(log_r.exp(), h, color=colour, linestyle=style, linewidth=2, label=label)
        lines.append((float(divergence.log_h(HIGH)), line))
    axes.set(xscale="log", yscale="log", xlim=(1e-2, 1e2), ylim=(1e-2, 2e2))
    axes.set_xlabel("density ratio r = teacher / student")
    axes.set_ylabel("weight h(r) = f''(r) r²")
    axes.set_title("f-distill weights (grey: the default ratio_clip)", fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    ordered = [line for _, line in sorted(lines, key=lambda entry: -entry[0])]  # as the lines end on the right
    figure.legend(handles=ordered, loc="outside right center", frameon=False, handlelength=3)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("divergences.png"))
