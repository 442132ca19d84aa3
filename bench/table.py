"""Results as text: aligned for a terminal, or as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .cases import Case, size_name
from .ops import WEIGHTED
from .record import Overhead, Record, Result

Cell = Callable[[Result, dict[str, Result]], str]


def _ratio(result: Result, other: Result | None, form: str) -> str:
    value = result.ratio(other) if other is not result else None
    return "-" if value is None else form.format(value)


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _time(seconds: float) -> str:
    """In milliseconds, four digits."""
    return f"{seconds * 1e3:#.4g}".rstrip(".")


COLUMNS: dict[str, Cell] = {
    "ms": lambda r, _: _time(r.seconds.median) if r.rounds else "-",
    "+-": lambda r, _: f"{r.seconds.relative * 50:.0f}%" if len(r.rounds) > 1 else "-",
    "GB/s": lambda r, _: f"{r.bandwidth / 1e9:.3g}" if r.rounds else "-",
    "of copy": lambda r, others: _ratio(r, others.get("copy"), "{:.0%}"),
    "eager/it": lambda r, others: _ratio(r, others.get("eager"), "{:.2f}"),
    "compile/it": lambda r, others: _ratio(r, others.get("compile"), "{:.2f}"),
    "first call": lambda r, _: "-" if r.first_call is None else f"{r.first_call:.2g} s",
    "memory": lambda r, _: "-" if r.extra_memory is None else size_name(r.extra_memory),
    "launches": lambda r, _: _count(r.launches),
    "syncs": lambda r, _: _count(r.synchronizations),
}
ON_GPU_ALONE = ("launches", "syncs")
LEGEND = (
    "ms: median per call over the rounds; +-: half the distance of the quartiles; GB/s: bytes that have to cross\n"
    "memory, over time; of copy: the time of a copy of as many bytes, over that of the call; eager/it, compile/it:\n"
    "how many times as long those take; first call: with compilation; memory: most in use beyond the inputs,\n"
    "gradients included."
)


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


def rows(group: Sequence[Result], columns: Iterable[str]) -> list[list[str]]:
    """A case: the shape beside the first contender, and a line of words instead of figures where one is wrong."""
    others = {result.contender: result for result in group}
    lines = []
    for index, result in enumerate(group):
        label = result.case.label if index == 0 else ""
        figures = [COLUMNS[column](result, others) for column in columns]
        lines.append([label, result.contender, *([result.error] if result.error else figures)])
    return lines


def tables(record: Record, markdown: bool = False, colour: bool = False) -> str:
    """Every result, a table for each operation and set of options; then the overheads."""
    found: dict[str, list[list[Result]]] = {}
    for group in record.groups():
        found.setdefault(heading(group[0].case), []).append(group)
    parts = []
    for title, groups in found.items():
        columns = list(COLUMNS)
        if groups[0][0].case.device == "cpu":
            columns = [column for column in columns if column not in ON_GPU_ALONE]
        body = [row for group in groups for row in rows(group, columns)]
        parts.append(_titled(title, ["shape", "", *columns], body, markdown, colour))
    if record.overhead:
        body = overhead_rows(record.overhead)
        parts.append(_titled("host overhead, microseconds per call", OVERHEAD_COLUMNS, body, markdown, colour))
    return "\n\n".join(parts)


OVERHEAD_COLUMNS = ["operation", "", "forward", "backward", "both"]


def overhead_rows(overhead: Iterable[Overhead]) -> list[list[str]]:
    lines = []
    for entry in overhead:
        forward, backward = entry.microseconds()
        both = "-" if backward is None else f"{forward + backward:.1f}"
        lines.append(
            [entry.op, entry.contender, f"{forward:.1f}", "-" if backward is None else f"{backward:.1f}", both]
        )
    return lines


def _titled(title: str, header: list[str], body: list[list[str]], markdown: bool, colour: bool) -> str:
    if markdown:
        return f"{title}:\n\n{markdown_table(header, body)}"
    lines = plain_table(header, body)
    return "\n".join([f"\033[1m{title}\033[0m" if colour else title, *lines])


def markdown_table(header: list[str], body: list[list[str]]) -> str:
    padded = [[*row, *[""] * (len(header) - len(row))] for row in body]
    rule = "|" + "---|" * len(header)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in padded)])


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
