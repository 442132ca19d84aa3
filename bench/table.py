"""Results as text: aligned for a terminal, as Markdown, or as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, fields

from .cases import Case, size_name
from .figures import DOUBTS, INTERVAL, Figure, explain
from .ops import WEIGHTED
from .record import SCALE, Record, Result

Cell = tuple[str, Callable[[Figure], str]]
"""A figure's name, and how it is written."""


def _time(figure: Figure) -> str:
    """In milliseconds, four digits."""
    return f"{figure.value * 1e3:#.4g}".rstrip(".")


def _ratio(figure: Figure) -> str:
    return f"{figure.value:.2f}{plus_minus(figure, 1, 2)}"


def plus_minus(figure: Figure, factor: float, digits: int) -> str:
    """Half of the interval; nothing where there is none."""
    if figure.low is None or figure.high is None or figure.spread == 0.0:
        return ""
    return f"±{(figure.high - figure.low) / 2 * factor:.{digits}f}"


COLUMNS: dict[str, Cell] = {
    "ms": ("time", _time),
    "+-": ("time", lambda figure: f"{(figure.spread or 0.0) * 50:.0f}%"),
    "forward ms": ("forward", _time),
    "backward ms": ("backward", _time),
    "GB/s": ("bandwidth", lambda figure: f"{figure.value / 1e9:.3g}"),
    "of copy": ("copy/it", lambda figure: f"{figure.value * 100:.0f}{plus_minus(figure, 100, 0)}%"),
    "eager/it": ("eager/it", _ratio),
    "compile/it": ("compile/it", _ratio),
    "first call": ("first call", lambda figure: f"{figure.value:.2g} s"),
    "memory": ("memory", lambda figure: size_name(figure.value)),
    "launches": ("launches", lambda figure: f"{figure.value}"),
    "syncs": ("synchronizations", lambda figure: f"{figure.value}"),
}
LEGEND = (
    "ms: median per call over the rounds; +-: half the distance of the quartiles; forward: the call that builds the\n"
    "graph, in which a fused loss computes its gradient too; backward: the rest of the step; GB/s: bytes that have to\n"
    "cross memory, over time; of copy: the time of a copy of as many bytes, over that of the call; eager/it,\n"
    f"compile/it: how many times as long those take; ±: half of the {INTERVAL};\n"
    "first call: with compilation; memory: most in use beyond the inputs, gradients included."
)


def cell(found: dict[str, Figure], column: str) -> str:
    """With the mark of what is worthless; a dash for what is not there."""
    name, form = COLUMNS[column]
    return f"{form(found[name])}{found[name].mark if column != '+-' else ''}" if name in found else "-"


def heading(case: Case) -> str:
    """What the cases of one table share."""
    parts = [case.op, case.mode, case.dtype, case.device]
    if case.device == "cpu":
        parts.append(f"{case.threads} thread{'s' if case.threads > 1 else ''}")
    parts += [] if case.guidance is None else [f"guidance {case.guidance:g}"]
    parts += ["mask"] if case.mask else []
    if case.op in WEIGHTED:
        parts += [case.divergence] + (["histogram"] if case.histogram else [])
    return ", ".join(parts + (["warm caches"] if case.warm else []))


def tables(record: Record, colour: bool = False) -> str:
    """Every result, a table for each operation and set of options, words in the place of the figures of one that is
    wrong; then the overheads. Below each what its marks mean."""
    found: dict[str, list[tuple[Result, dict[str, Figure]]]] = {}
    for entry, told in record.told():
        if isinstance(entry, Result):
            found.setdefault(heading(entry.case), []).append((entry, told))
    parts = []
    for title, entries in found.items():
        columns = [column for column in COLUMNS if any(COLUMNS[column][0] in told for _, told in entries)]
        body, before = [], None
        for result, told in entries:
            label = "" if result.case == before else result.case.label
            figures = [result.error] if result.error else [cell(told, column) for column in columns]
            body.append([label, result.contender, *figures])
            before = result.case
        parts.append(_titled(title, plain_table(["shape", "", *columns], body), colour))
    if record.overhead:
        parts.append(_titled(overhead_title(record), plain_table(OVERHEAD_COLUMNS, overhead_rows(record)), colour))
    return "\n\n".join(parts)


def _titled(title: str, lines: list[str], colour: bool) -> str:
    marked = explain("\n".join(lines))
    return "\n".join([f"\033[1m{title}\033[0m" if colour else title, *lines, *([marked] if marked else [])])


OVERHEAD_COLUMNS = ["operation", "", "forward", "backward", "both"]


def overhead_title(record: Record) -> str:
    scale = next((entry for entry in record.overhead if entry.op == SCALE), None)
    of = "" if scale is None else f" ({Figure.of('', 's', scale.both(), None).value * 1e6:.1f} us in this process)"
    return f"host overhead: time over that of PyTorch's mse_loss, forward and backward{of}, tensors of 32 elements"


def overhead_rows(record: Record) -> list[list[str]]:
    names = [f"host {column}" for column in OVERHEAD_COLUMNS[2:]]
    return [
        [entry.op, entry.contender, *(_ratio(told[name]) + told[name].mark if name in told else "-" for name in names)]
        for entry, told in record.told()
        if not isinstance(entry, Result)
    ]


def markdown_table(header: list[str], body: list[list[str]]) -> str:
    """Without the columns that are empty."""
    kept = [i for i in range(len(header)) if any(row[i] != "-" for row in body)]
    lines = ["| " + " | ".join(row[i] for i in kept) + " |" for row in (header, *body)]
    text = "\n".join([lines[0], "|" + "---|" * len(kept), *lines[1:]])
    return "\n\n".join(filter(None, [text, explain(text)]))


def plain_table(header: list[str], body: list[list[str]]) -> list[str]:
    """Words to the left, figures to the right; a row with words instead of figures runs on."""
    complete = [header, *(row for row in body if len(row) == len(header))]
    widths = [max(len(row[i]) for row in complete) for i in range(len(header))]
    words = 2  # columns of words
    for row in body:
        for i in range(words):
            widths[i] = max(widths[i], len(row[i]))
    lines = []
    for row in (header, *body):
        cells = [cell.ljust(widths[i]) for i, cell in enumerate(row[:words])]
        if len(row) == len(header):
            cells += [cell.rjust(widths[i]) for i, cell in enumerate(row[words:], words)]
        else:
            cells += row[words:]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return lines


# ----------------------------------------------------------------------------------------------------------------- CSV

UNITS = {"s": "time (s)", "B/s": "bandwidth (B/s)", "1": "ratio (1)", "B": "memory (B)", "n": "count (1)"}
SAME_UNIT = {"low": "low (as the figure)", "high": "high (as the figure)", "spread": "distance of the quartiles (1)"}
LOAD = "load average (1/core)"
CSV_COLUMNS = [
    *(field.name for field in fields(Case)),
    *("contender", "figure", *UNITS.values(), *SAME_UNIT.values(), "worthless", LOAD, "error", "partial"),
]


def to_csv(record: Record) -> str:
    """A row for each figure, its value in the column of its unit; one with the error for each result without any."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for entry, told in record.told():
        if isinstance(entry, Result):
            row = asdict(entry.case) | {"shape": "x".join(map(str, entry.case.shape)), "error": entry.error}
        else:
            row = {"op": entry.op, "device": entry.device}
        row |= {"contender": entry.contender, LOAD: entry.load, "partial": record.partial}
        for figure in told.values():
            told_of = figure.told()
            row |= {"figure": figure.name, "worthless": "; ".join(DOUBTS[doubt] for doubt in figure.doubts)}
            values = {UNITS[figure.unit]: told_of["value"]} | {
                SAME_UNIT[k]: told_of[k] for k in SAME_UNIT if k in told_of
            }
            writer.writerow(row | values)
        if not told:
            writer.writerow(row)
    return text.getvalue()
