"""PNG files of a record, drawn by matplotlib's Agg back end without touching its global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fdistill_ops.trainer.files import whole_file

from .cases import Case, batch_sweep, size_name, size_sweep
from .record import Record, Result
from .table import heading

COLOURS = {
    "copy": "0.35",
    "eager": "tab:orange",
    "compile": "tab:green",
    "reference": "tab:purple",
    "cpu": "tab:blue",
    "cuda": "tab:blue",
    "triton": "tab:cyan",
    "cuda graph": "navy",
    "triton graph": "teal",
}
NAMES = {"copy": "copy of the same bytes", "eager": "eager PyTorch", "compile": "torch.compile"}

Groups = list[list[Result]]


def plot(record: Record, folder: Path, prefix: str = "") -> list[Path]:
    """Writes what the record has figures for: roofline.png (bandwidth over size), batch.png (time over batch) and
    ratios.png (bars for the other shapes, where one of our back ends has a time). Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, batches, rest = _parts(record)
    written = []
    for name, groups, draw in (
        ("roofline", sizes, _draw_roofline),
        ("batch", batches, _draw_batch),
        ("ratios", rest, _draw_ratios),
    ):
        if groups:
            path = folder / f"{prefix}{name}.png"
            _save(draw(groups), path)
            written.append(path)
    return written


def _parts(record: Record) -> tuple[Groups, Groups, Groups]:
    """The sweeps over size and batch (those of the first heading each), and everything else."""
    sizes: Groups = []
    batches: Groups = []
    rest: Groups = []
    for group in record.groups():
        if not any(result.rounds for result in group):
            continue
        (sizes if of_size(group[0].case) else batches if _of_batch(group[0].case) else rest).append(group)
    ours = [group for group in rest if any(result.kind == "fused" and result.rounds for result in group)]
    return _first(sizes), _first(batches), ours


def of_size(case: Case) -> bool:
    return case.name in size_sweep(1 << 60, case.torch_dtype.itemsize)


def _of_batch(case: Case) -> bool:
    return case.name in batch_sweep(1 << 60, case.torch_dtype.itemsize)


def is_sweep(case: Case) -> bool:
    return of_size(case) or _of_batch(case)


def _first(groups: Groups) -> Groups:
    return [group for group in groups if heading(group[0].case) == heading(groups[0][0].case)]


def _contenders(groups: Groups) -> list[str]:
    """Those with times, copies last."""
    names = dict.fromkeys(result.contender for group in groups for result in group if result.rounds)
    return sorted(names, key=lambda name: name == "copy")


def _draw_lines(groups: Groups, axes: Any, x: Any, y: Any) -> None:
    for name in _contenders(groups):
        points = [(x(r), y(r)) for group in groups for r in group if r.contender == name and r.rounds]
        style = "--" if name == "copy" else "-"
        label = NAMES.get(name, f"fdistill_ops, {name}")
        axes.plot(*zip(*points, strict=True), style, color=COLOURS.get(name), marker="o", markersize=3.5, label=label)
    axes.grid(which="major", color="0.9")
    axes.legend(frameon=False, fontsize=9)


def _draw_roofline(groups: Groups) -> Any:
    from matplotlib.ticker import FuncFormatter

    figure = _figure(8, 4.6)
    axes = figure.subplots()
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    _draw_lines(groups, axes, lambda r: r.case.tensor_bytes, lambda r: r.bandwidth / 1e9)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_name(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks([group[0].case.tensor_bytes for group in groups])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("bytes of one tensor")
    axes.set_ylabel("GB/s: bytes that have to move, over time")
    axes.set_title(heading(groups[0][0].case), fontsize=10)
    return figure


def _draw_batch(groups: Groups) -> Any:
    from matplotlib.ticker import FuncFormatter

    figure = _figure(8, 4.6)
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _draw_lines(groups, axes, lambda r: r.case.shape[0], lambda r: r.seconds.median * 1e6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks([group[0].case.shape[0] for group in groups])
    axes.set_xlabel(f"batch, samples of {' x '.join(map(str, groups[0][0].case.shape[1:]))}")
    axes.set_ylabel("microseconds per call")
    axes.set_title(heading(groups[0][0].case), fontsize=10)
    return figure


def _draw_ratios(groups: Groups) -> Any:
    """Panels for the headings with most cases, at most four: how many times as long the others take."""
    panels: dict[str, Groups] = {}
    for group in groups:
        panels.setdefault(heading(group[0].case), []).append(group)
    shown = sorted(panels.items(), key=lambda panel: -len(panel[1]))[:4]
    figure = _figure(9, 0.6 + 2.9 * len(shown))
    for axes, (title, panel) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        _draw_panel(axes, panel)
        axes.set_title(title, fontsize=10)
    return figure


def _draw_panel(axes: Any, groups: Groups) -> None:
    series = _series(groups)
    width = 0.8 / max(len(series), 1)
    for index, ((ours, other), values) in enumerate(series.items()):
        at = [position + (index - (len(series) - 1) / 2) * width for position in range(len(groups))]
        # Bars from 1, upwards where we are faster, downwards where the other is.
        bars = axes.bar(
            at,
            [(value or 1.0) - 1 for value in values],
            width,
            bottom=1,
            color=COLOURS.get(other),
            alpha=1.0 if ours == next(iter(series))[0] else 0.55,
            label=f"{NAMES.get(other, other)} / {ours}",
        )
        labels = ["" if value is None else f"{value:.2g}" for value in values]
        axes.bar_label(bars, labels, fontsize=7, padding=1)
    axes.axhline(1.0, color="0.2", linewidth=0.8)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.2, high * 1.4)
    axes.set_yticks(
        [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if low / 1.2 <= tick <= high * 1.4]
    )
    axes.set_yticklabels([f"{tick:g}" for tick in axes.get_yticks()])
    axes.minorticks_off()
    axes.set_xticks(range(len(groups)), [group[0].case.label for group in groups], fontsize=8)
    axes.set_ylabel("time / our time")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))


def _series(groups: Groups) -> dict[tuple[str, str], list[float | None]]:
    """Ratios by (our back end, the other), one for each group, None where there is none."""
    found: dict[tuple[str, str], list[float | None]] = {}
    for position, group in enumerate(groups):
        others = {result.contender: result for result in group}
        for ours in (result for result in group if result.kind == "fused"):
            for name in ("eager", "compile", "copy"):
                values = found.setdefault((ours.contender, name), [None] * len(groups))
                values[position] = ours.ratio(others.get(name))
    return {key: values for key, values in found.items() if any(value is not None for value in values)}


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})
