"""PNG files of a record, drawn by matplotlib's Agg back end without touching its global state.

In each, bars and lines show medians with their intervals; what is worthless (see figures.DOUBTS) is hollow and has the
mark; below stand the machine and what the marks mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fdistill_ops._colours import OKABE_ITO
from fdistill_ops.trainer.files import whole_file

from .cases import Case, batch_sweep, size_name, size_sweep
from .figures import INTERVAL, Figure, explain, figures
from .record import Record, Result
from .table import heading

COLOURS = {
    "copy": OKABE_ITO["black"],
    "eager": OKABE_ITO["orange"],
    "compile": OKABE_ITO["green"],
    "reference": OKABE_ITO["purple"],
    "cpu": OKABE_ITO["blue"],
    "cuda": OKABE_ITO["blue"],
    "triton": OKABE_ITO["sky blue"],
    "cuda graph": OKABE_ITO["vermilion"],
    "triton graph": OKABE_ITO["yellow"],
}
NAMES = {"copy": "copy of the same bytes (limit)", "eager": "eager PyTorch", "compile": "torch.compile"}
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # of text that a line may cross
BASES = ("eager", "compile", "copy")
"""What the bars are compared with."""
MOST_PANELS = 4

Groups = list[list[Result]]


def plot(record: Record, folder: Path, prefix: str = "") -> list[Path]:
    """Writes what the record has figures for: roofline.png (bandwidth over size) and batch.png (time over batch), both
    of the first such heading, and ratios.png (bars for the other shapes, where one of our back ends has a time and
    something beside it). Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Groups] = {"roofline": [], "batch": [], "ratios": []}
    for group in record.groups():
        timed, case = [result for result in group if result.rounds], group[0].case
        if of_size(case) or case.name in batch_sweep(1 << 60, case.torch_dtype.itemsize):
            part = parts["roofline" if of_size(case) else "batch"]
            part += [timed] if timed and heading(case) == heading((part or [group])[0][0].case) else []
        elif len(timed) > 1 and any(result.kind == "fused" for result in timed):
            parts["ratios"].append(timed)
    written = []
    for name, groups in parts.items():
        if groups:
            path = folder / f"{prefix}{name}.png"
            _save(_draw_ratios(groups, record) if name == "ratios" else _draw_lines(name, groups, record), path)
            written.append(path)
    return written


def of_size(case: Case) -> bool:
    return case.name in size_sweep(1 << 60, case.torch_dtype.itemsize)


def _contenders(groups: Groups) -> list[str]:
    """Those with times, copies last."""
    names = dict.fromkeys(result.contender for group in groups for result in group)
    return sorted(names, key=lambda name: name == "copy")


def _draw_lines(name: str, groups: Groups, record: Record) -> Any:
    """On logarithmic axes: the bandwidth over the size of a tensor, or the time over the batch."""
    roofline, shape = name == "roofline", groups[0][0].case.shape
    figure = _figure(8, 5)
    axes = figure.subplots()
    xs = [group[0].case.tensor_bytes if roofline else group[0].case.shape[0] for group in groups]
    shown = []
    for contender in _contenders(groups):
        results = [(x, r) for x, group in zip(xs, groups, strict=True) for r in group if r.contender == contender]
        found = [(x, figures(result, {})["bandwidth" if roofline else "time"]) for x, result in results]
        at, values, told = [x for x, _ in found], [f.value for _, f in found], [f for _, f in found]
        colour, style = COLOURS.get(contender), "--" if contender == "copy" else "-"
        axes.errorbar(at, values, _errors(told), color=colour, linestyle=style, capsize=2, label=_name(contender))
        axes.scatter(at, values, 16, ["white" if f.doubts else colour for f in told], edgecolors=colour, zorder=3)
        for x, f in found:
            axes.annotate(f.mark, (x, f.value), (4, 4), textcoords="offset points", weight="bold")
        shown += told
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e9 if roofline else value * 1e6:g}")
    axes.set_xticks(xs, [size_name(x) if roofline else str(x) for x in xs], fontsize=8)
    axes.set_xlabel("bytes of one tensor" if roofline else f"batch, samples of {' x '.join(map(str, shape[1:]))}")
    limit = "GB/s: bytes that have to move, over time\n(higher is better)"
    axes.set_ylabel(limit if roofline else "microseconds per call\n(lower is better)")
    axes.grid(which="major", color="0.9")
    axes.set_title(heading(groups[0][0].case), fontsize=10)
    _finish(figure, [axes], shown, record)
    return figure


def _draw_ratios(groups: Groups, record: Record) -> Any:
    """Panels for the headings with most cases, at most MOST_PANELS: longer bars are faster, whoever's they are."""
    panels: dict[str, Groups] = {}
    for group in groups:
        panels.setdefault(heading(group[0].case), []).append(group)
    chosen = sorted(panels.items(), key=lambda panel: -len(panel[1]))[:MOST_PANELS]
    figure = _figure(9, 1.2 + 2.5 * len(chosen))
    all_axes = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    shown = []
    for axes, (title, panel) in zip(all_axes, chosen, strict=True):
        shown += _draw_bars(axes, panel)
        axes.set_title(title, fontsize=10)
    _finish(figure, all_axes, shown, record)
    return figure


def _draw_bars(axes: Any, groups: Groups) -> list[Figure]:
    """How many times as fast as the first of BASES that all have, copies as lines across the bars; the figures."""
    by_name = [{result.contender: result for result in group if result.kind != "reference"} for group in groups]
    base = next((name for name in BASES if all(name in of for of in by_name)), None)
    names = [name for name in _contenders(groups) if name != base and any(name in of for of in by_name)]
    bars = [name for name in names if name != "copy"]
    width, shown = 0.7 / max(len(bars), 1), []
    for name in names if base is not None else []:
        offset = 0.38 if name == "copy" else (bars.index(name) - (len(bars) - 1) / 2) * width
        found = [(x + offset, figures(of[name], of)[f"{base}/it"]) for x, of in enumerate(by_name) if name in of]
        at, values, told = [x for x, _ in found], [f.value for _, f in found], [f for _, f in found]
        colour = COLOURS.get(name)
        if name == "copy":
            axes.hlines(values, [x - 0.76 for x in at], at, colour, "--", label=_name(name))
        else:
            faces = ["white" if f.doubts else colour for f in told]
            axes.bar(at, values, width * 0.9, color=faces, edgecolor=colour, label=_name(name))
        axes.errorbar(at, values, _errors(told), fmt="none", ecolor="0.4", elinewidth=1, capsize=2)
        for x, f in found:
            place: dict[str, Any] = {"xy": (x, f.value), "xytext": (4, -3)}
            if name != "copy":
                place = {"xy": (x, f.high), "xytext": (0, 3), "ha": "center"}
            axes.annotate(f"{f.value:.2g}{f.mark}", **place, textcoords="offset points", fontsize=7, bbox=BEHIND)
        shown += told
    axes.axhline(1.0, color="0.2", linewidth=0.8)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(groups)), [group[0].case.label for group in groups], fontsize=8)
    axes.set_ylabel(f"times as fast as\n{_name(base or '-')}\n(longer is better)", fontsize=9)
    return shown


def _name(contender: str) -> str:
    return NAMES.get(contender, f"fdistill_ops, {contender}")


def _errors(figures: list[Figure]) -> list[list[float]]:
    """Down and up to the ends of the intervals."""
    return [[f.value - (f.low or 0.0) for f in figures], [(f.high or 0.0) - f.value for f in figures]]


def _finish(figure: Any, all_axes: Iterable[Any], shown: list[Figure], record: Record) -> None:
    """One legend, where it was measured, and what the marks mean."""
    entries: dict[str, Any] = {}
    for axes in all_axes:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    notes = {"title": explain(" ".join(f"{told.value}{told.mark}" for told in shown)), "title_fontsize": 8}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=5, frameon=False, fontsize=8, **notes)
    figure.suptitle(f"{record.on()}\nmedians, and the {INTERVAL}", fontsize=8, color="0.3")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
