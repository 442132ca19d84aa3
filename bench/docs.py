"""Every figure of README.md and docs/performance.md, measured anew on this machine:

    python -m fdistill_ops.bench.docs            # in the root of a checkout; a quarter of an hour
    python -m fdistill_ops.bench.docs --render   # only write the pages again from docs/performance.json

It writes the record (docs/performance.json), the plots (docs/performance-*.png) and the tables between the marks
``<!-- figures: NAME -->`` and ``<!-- end of figures -->`` of the two pages.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fdistill_ops.trainer.files import say, write_text

from . import plots, table
from .__main__ import measure_all, parse
from .cases import MODES, size_name
from .clock import Spread
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

_COLUMNS = ["shape", "ours", "eager", "torch.compile", "copy", "eager/ours", "compile/ours", "of copy"]


def _named(record: Record, dtype: str, warm: bool, one_thread: bool = False) -> list[list[Result]]:
    """f_distill on the named shapes."""
    return [
        group
        for group in record.groups()
        if (case := group[0].case).op == "f_distill"
        and (case.dtype, case.mode, case.warm) == (dtype, MODES[1], warm)
        and (case.threads == 1) == one_thread
        and not plots.is_sweep(case)
        and case.name
    ]


def _sizes(record: Record, least: int = 0, dtype: str = "float32", one_thread: bool = False) -> list[list[Result]]:
    """f_distill over the size of a tensor, from that many bytes on."""
    return [
        group
        for group in record.groups()
        if (case := group[0].case).op == "f_distill"
        and case.dtype == dtype
        and (case.threads == 1) == one_thread
        and plots.of_size(case)
        and case.tensor_bytes >= least
    ]


def _wide(groups: list[list[Result]]) -> str:
    """A line for each shape: milliseconds and ratios."""
    body = []
    for group in groups:
        others = {result.contender: result for result in group}
        ours = next(result for result in group if result.kind == "fused")
        sides = [ours, *(others.get(name) for name in ("eager", "compile", "copy"))]
        times = ["-" if side is None or not side.rounds else table.COLUMNS["ms"](side, others) for side in sides]
        ratios = [table.COLUMNS[column](ours, others) for column in ("eager/it", "compile/it", "of copy")]
        body.append([group[0].case.label, *times, *ratios])
    if not body:
        return "Not measured."
    kept = [i for i in range(len(_COLUMNS)) if any(row[i] != "-" for row in body)]
    return table.markdown_table([_COLUMNS[i] for i in kept], [[row[i] for i in kept] for row in body])


LIMIT = 1.15
"""What a step may take, in copies of as many bytes; host overhead comes on top of it below LARGE bytes a tensor."""
LARGE = 64 << 20


def _over_budget(group: list[Result], record: Record) -> str:
    """The median, over the rounds, of our time over what it may be."""
    case = group[0].case
    ours = next(result for result in group if result.kind == "fused")
    copy = next((result for result in group if result.kind == "copy"), None)
    host = next((o for o in record.overhead if (o.op, o.contender) == (case.op, ours.contender)), None)
    if copy is None or host is None or not ours.rounds:
        return "-"
    overhead = 0.0 if case.tensor_bytes >= LARGE else sum(filter(None, host.microseconds())) * 1e-6
    parts = zip(ours.rounds, copy.rounds, strict=False)
    return f"{Spread.of([time / (overhead + LIMIT * limit) for time, limit in parts]).median:.2f}"


def _budget(record: Record) -> str:
    """A line for each named shape, and for each size of the sweep from LARGE on."""
    columns = [("float32", False), ("bfloat16", False), ("float32", True), ("bfloat16", True)]
    body: dict[str, dict[int, str]] = {}
    for i, (dtype, one_thread) in enumerate(columns):
        for group in _named(record, dtype, False, one_thread) + _sizes(record, LARGE, dtype, one_thread):
            body.setdefault(group[0].case.label, {})[i] = _over_budget(group, record)
    header = [f"{dtype}, {'one thread' if one else 'all cores'}" for dtype, one in columns]
    rows = [[label, *(cells.get(i, "-") for i in range(len(columns)))] for label, cells in body.items()]
    return table.markdown_table(["shape", *header], rows)


def _operations(record: Record) -> str:
    """Every operation that has kernels, on one shape."""
    body: list[list[str]] = []
    for group in record.groups():
        case = group[0].case
        ours = next((result for result in group if result.kind == "fused"), None)
        if case.name != "sdxl" or case.dtype != "float32" or case.warm or case.threads == 1 or ours is None:
            continue
        others = {result.contender: result for result in group}
        cells = [
            table.COLUMNS[column](ours, others) for column in ("ms", "eager/it", "compile/it", "of copy", "memory")
        ]
        row = [case.op, case.mode, *cells]
        if row[:2] not in [line[:2] for line in body]:
            body.append(row)
    return table.markdown_table(["operation", "", "ms", "eager/ours", "compile/ours", "of copy", "memory"], body)


def _first_calls(record: Record) -> str:
    """Seconds until the first result, by contender: the range over the named shapes."""
    body = []
    for name in ("cpu", "eager", "compile"):
        groups = _named(record, "float32", False) + _named(record, "bfloat16", False)
        times = [r.first_call for group in groups for r in group if r.contender == name and r.first_call is not None]
        if times:
            body.append([name, f"{min(times):.2g} s", f"{max(times):.2g} s"])
    return table.markdown_table(["", "least", "most"], body)


def _machine(record: Record) -> str:
    machine, versions = record.machine, record.versions
    return (
        f"{machine['processor']}, {machine['cores']} cores, {size_name(machine['cache_bytes'])} of cache, "
        f"{versions['isa']}; torch {versions['torch']}, Python {versions['python']}; {record.started[:10]}."
    )


TABLES = {
    "float32": lambda record: _wide(_named(record, "float32", False)),
    "bfloat16": lambda record: _wide(_named(record, "bfloat16", False)),
    "float32-warm": lambda record: _wide(_named(record, "float32", True)),
    "bfloat16-warm": lambda record: _wide(_named(record, "bfloat16", True)),
    "float32-one-thread": lambda record: _wide(_named(record, "float32", False, True)),
    "bfloat16-one-thread": lambda record: _wide(_named(record, "bfloat16", False, True)),
    "sizes": lambda record: _wide(_sizes(record)),
    "large": lambda record: _wide(_sizes(record, LARGE)),
    "budget": _budget,
    "operations": _operations,
    "overhead": lambda record: table.markdown_table(table.OVERHEAD_COLUMNS, table.overhead_rows(record.overhead)),
    "first-calls": _first_calls,
    "machine": _machine,
}


if __name__ == "__main__":
    sys.exit(main())
