"""Every figure of README.md and docs/performance.md, measured anew on this machine:

    python -m fdistill_ops.bench.docs            # in the root of a checkout; a quarter of an hour
    python -m fdistill_ops.bench.docs --render   # only write the pages again from docs/performance.json

It writes the record (docs/performance.json), the plots (docs/performance-*.png) and the tables between the marks
``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` of the two pages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fdistill_ops.trainer.files import say, write_text

from . import plots, table
from .__main__ import measure_all, parse
from .cases import MODES, SHAPES
from .clock import Spread
from .figures import Figure, figures
from .record import Record, Result, new_record

PAGES = ("README.md", "docs/performance.md")
RECORD = Path("docs") / "performance.json"
PLOTS = Path("docs")

_STEP = "--op f_distill --mode forward+backward"
RUNS = (
    f"{_STEP} --dtype float32,bfloat16",
    f"{_STEP} --sweep size",
    "--shape sdxl --overhead",
    f"{_STEP} --sweep batch --no-compile",
    f"{_STEP} --dtype float32,bfloat16 --warm",
    f"{_STEP} --dtype float32,bfloat16 --threads 1 --no-compile",
    f"{_STEP} --dtype bfloat16 --sweep size --contender cpu,copy",
    f"{_STEP} --dtype float32,bfloat16 --threads 1 --sweep size --contender cpu,copy",
)
"""Options of the command for every part of the record."""

_MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments not in ([], ["--render"]) or not all(Path(page).is_file() for page in PAGES):
        say(f"usage, in the root of a checkout: {__doc__.strip()}")
        return 2
    if not arguments:
        measure_pages()
    record = Record.read(RECORD)
    plots.plot(record, PLOTS, prefix="performance-")
    for page in PAGES:
        write_text(Path(page), render(Path(page).read_text(encoding="utf-8"), record))
    return 0


def measure_pages() -> None:
    """Writes the record after each of its parts; an interruption keeps those that are finished. Ends with status 1 at
    what is wrong or does not run."""
    record = new_record("cpu", ["docs"])
    for options in RUNS:
        say(f"fdistill-bench {options}")
        if status := measure_all(parse(["--device", "cpu", "--no-overhead", *options.split()]), record):
            sys.exit(status)
        record.write(RECORD)
        for result in record.results:
            if result.fails:
                say(f"{result.case.op} {result.case.label} {result.case.dtype}, {result.contender}: {result.error}")
                sys.exit(1)


def render(page: str, record: Record) -> str:
    """The page with its tables as the record has them. KeyError for a name that is none of TABLES."""
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]](record)}\n{found[3]}", page)


# -------------------------------------------------------------------------------------------------------------- tables

Told = dict[str, dict[str, Figure]]
"""The figures of a case, by contender and name."""
LIMIT = 1.15
"""What a step may take, in copies of as many bytes; host overhead comes on top of it below LARGE bytes a tensor."""
LARGE = 64 << 20
RIVALS = {"eager/it": "eager/ours", "compile/it": "compile/ours", "of copy": "of copy"}


def _groups(
    record: Record, dtype: str = "float32", warm: bool = False, one_thread: bool = False, least: int | None = None
) -> list[list[Result]]:
    """f_distill on the named shapes, or over the size of a tensor, from ``least`` bytes on."""
    return [
        group
        for group in record.groups()
        if (case := group[0].case).op == "f_distill"
        and (case.dtype, case.mode, case.warm, case.threads == 1) == (dtype, MODES[1], warm, one_thread)
        and (case.name in SHAPES if least is None else plots.of_size(case) and case.tensor_bytes >= least)
    ]


def _ours(group: list[Result]) -> tuple[Result, Told]:
    """Our result of a case, and the figures of everybody's."""
    others = {result.contender: result for result in group}
    ours = next(result for result in group if result.kind == "fused")
    return ours, {name: figures(result, others) for name, result in others.items()}


def _wide(groups: list[list[Result]]) -> str:
    """A line for each shape: milliseconds and ratios."""
    body = []
    for group in groups:
        ours, told = _ours(group)
        times = [table.cell(told.get(name, {}), "ms") for name in (ours.contender, "eager", "compile", "copy")]
        parts = [table.cell(told[ours.contender], column) for column in ("forward ms", "backward ms", *RIVALS)]
        body.append([group[0].case.label, times[0], *parts[:2], *times[1:], *parts[2:]])
    header = ["shape", "ours", "forward", "backward", "eager", "torch.compile", "copy", *RIVALS.values()]
    return table.markdown_table(header, body) if body else "Not measured."


def _over_budget(group: list[Result], record: Record) -> Figure | None:
    """Our time over what it may be, round by round."""
    ours, copy = _ours(group)[0], next((result for result in group if result.kind == "copy"), None)
    host = next((o for o in record.overhead if (o.op, o.contender) == (ours.case.op, ours.contender)), None)
    if copy is None or host is None or not ours.rounds:
        return None
    overhead = 0.0 if ours.case.tensor_bytes >= LARGE else Spread.of(host.both()).median
    return Figure.ratio("budget", ours.rounds, [overhead + LIMIT * seconds for seconds in copy.rounds], ours.load)


BUDGETS = {
    f"{dtype}, {'one thread' if one_thread else 'all cores'}": (dtype, one_thread)
    for one_thread in (False, True)
    for dtype in ("float32", "bfloat16")
}


def _budgets(record: Record) -> dict[str, dict[str, Figure]]:
    """By shape and column: each named shape, and each size of the sweep from LARGE on."""
    found: dict[str, dict[str, Figure]] = {}
    for column, (dtype, one_thread) in BUDGETS.items():
        for group in [g for least in (None, LARGE) for g in _groups(record, dtype, False, one_thread, least)]:
            told = _over_budget(group, record)
            found.setdefault(group[0].case.label, {}).update({} if told is None else {column: told})
    return found


def _budget(record: Record) -> str:
    rows = [
        [label, *(f"{of[c].value:.2f}{of[c].mark}" if c in of else "-" for c in BUDGETS)]
        for label, of in _budgets(record).items()
    ]
    return table.markdown_table(["shape", *BUDGETS], rows)


def _operations(record: Record) -> str:
    """Every operation that has kernels, on one shape."""
    body: dict[tuple[str, str], list[str]] = {}
    columns = {"ms": "ms", "forward ms": "forward", "backward ms": "backward", **RIVALS, "memory": "memory"}
    for group in record.groups():
        case = group[0].case
        if case.name != "sdxl" or case.dtype != "float32" or case.warm or case.threads == 1:
            continue
        if (case.op, case.mode) not in body and any(result.kind == "fused" for result in group):
            ours, told = _ours(group)
            body[case.op, case.mode] = [table.cell(told[ours.contender], column) for column in columns]
    return table.markdown_table(["operation", "", *columns.values()], [[*key, *row] for key, row in body.items()])


def _first(record: Record) -> list[list[str]]:
    """Seconds until the first result, by contender: the range over the named shapes."""
    groups = _groups(record) + _groups(record, "bfloat16")
    times = {
        name: [r.first_call for group in groups for r in group if r.contender == name and r.first_call is not None]
        for name in ("cpu", "eager", "compile")
    }
    return [[name, f"{min(found):.2g} s", f"{max(found):.2g} s"] for name, found in times.items() if found]


# ------------------------------------------------------------------------------------------------------------- summary


def _range(found: Iterable[Figure | None], form: str = "{:.1f}") -> str:
    """From the least to the greatest of those that are worth something."""
    values = sorted(figure.value for figure in found if figure is not None and not figure.doubts)
    ends = list(dict.fromkeys(form.format(value) for value in (values[:1] + values[-1:])))
    return " to ".join(ends)


def _rivals(groups: list[list[Result]]) -> str:
    told = [of[ours.contender] for ours, of in map(_ours, groups)]
    parts = {
        "eager/it": "{} times as fast as eager PyTorch",
        "compile/it": "{} times as fast as torch.compile",
        "copy/it": "at {} of the speed of a copy",
    }
    ranges = {
        name: _range([of.get(name) for of in told], "{:.0%}" if name == "copy/it" else "{:.1f}") for name in parts
    }
    return ", ".join(parts[name].format(found) for name, found in ranges.items() if found) or "not measured"


def _summary(record: Record) -> str:
    """Ten lines, without the figures that are worthless."""
    lines = {
        f"{dtype}, {where}": _rivals(_groups(record, dtype, warm, one_thread))
        for where, warm, one_thread in (
            ("all cores", False, False),
            ("one thread", False, True),
            ("warm caches", True, False),
        )
        for dtype in ("float32", "bfloat16")
    }
    lines["Tensors of 64 MiB and more, float32, all cores"] = _rivals(_groups(record, least=LARGE))
    budgets = {column: _range([of.get(column) for of in _budgets(record).values()], "{:.2f}") for column in BUDGETS}
    lines["Time over the budget's"] = "; ".join(f"{column}: {found or '-'}" for column, found in budgets.items())
    overheads = [told.get("host both") for entry, told in record.told() if entry.contender == "cpu"]
    lines["Host overhead, over PyTorch's `mse_loss`"] = f"{_range(overheads)} times, by operation"
    lines["Until the first result"] = "; ".join(f"{name} {least} to {most}" for name, least, most in _first(record))
    return "\n".join(f"- {what}: {said}." for what, said in lines.items())


TABLES: dict[str, Callable[[Record], str]] = {
    "summary": _summary,
    "float32": lambda record: _wide(_groups(record)),
    "bfloat16": lambda record: _wide(_groups(record, "bfloat16")),
    "float32-warm": lambda record: _wide(_groups(record, warm=True)),
    "bfloat16-warm": lambda record: _wide(_groups(record, "bfloat16", warm=True)),
    "float32-one-thread": lambda record: _wide(_groups(record, one_thread=True)),
    "bfloat16-one-thread": lambda record: _wide(_groups(record, "bfloat16", one_thread=True)),
    "sizes": lambda record: _wide(_groups(record, least=0)),
    "large": lambda record: _wide(_groups(record, least=LARGE)),
    "budget": _budget,
    "operations": _operations,
    "overhead": lambda record: table.markdown_table(table.OVERHEAD_COLUMNS, table.overhead_rows(record)),
    "first-calls": lambda record: table.markdown_table(["", "least", "most"], _first(record)),
    "machine": lambda record: f"{record.on()}.",
}


if __name__ == "__main__":
    sys.exit(main())
