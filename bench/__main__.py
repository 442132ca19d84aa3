"""The command line: ``python -m fdistill_ops.bench``, or ``fdistill-bench``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from errno import EISDIR
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fdistill_ops as fd
from fdistill_ops._arguments import device_name, integer, number
from fdistill_ops.trainer.files import say, write_text
from fdistill_ops.trainer.interruption import Interrupted

from . import compare, plots, table
from .cases import MODES, SHAPES, Case, batch_sweep, shape_of, size_sweep
from .figures import LEAST_ROUNDS
from .measure import Plan, go_on_unless_interrupted, interruptible, measure, serving
from .ops import MATCHING, OF_LOGITS, OPS, WEIGHTED
from .overhead import measure_overhead
from .progress import Progress
from .record import Record, memory_bytes, new_record

_QUICK = Plan(rounds=9, seconds=0.002, reference=False, patience=6.0)
_QUICK_SECONDS = 15.0  # of measuring beside the case with torch.compile; --quick begins nothing that would take longer
_LARGEST = 1 / 48  # of the free memory: a tensor of a sweep, of which a case needs some forty at once


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 where a result was wrong, a case could not be measured or --compare found something slower; 2
    for wrong arguments (raised by argparse) and where nothing was measured; 130 for Ctrl-C and 143 for SIGTERM, after
    what is finished has been shown and written, marked as partial."""
    command = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(command)
    old = None
    if arguments.compare is not None:
        try:
            old = Record.read(arguments.compare)
            compare.require_rounds(old)
        except (OSError, ValueError) as error:
            say(f"fdistill-bench: error: {error}")
            return 2
    record = new_record(arguments.device, command)
    status = measure_all(arguments, record)
    if not record.results and not record.overhead and not record.partial:
        say("fdistill-bench: error: none of the contenders serves any of the cases")
        return 2
    if record.results or record.overhead:
        print(table.tables(record, colour=sys.stdout.isatty()), table.LEGEND, sep="\n\n")
    try:
        if arguments.json is not None:
            record.write(arguments.json)
        if arguments.csv is not None:
            write_text(arguments.csv, table.to_csv(record))
        if arguments.plot is not None:
            for path in plots.plot(record, arguments.plot):
                say(f"wrote {path}")
    except OSError as error:
        say(f"fdistill-bench: error: {error}")
        return status or 1
    if any(result.fails for result in record.results):
        say("fdistill-bench: error: wrong results or errors: what has no times above")
        status = status or 1
    if old is not None:
        try:
            changes = compare.compare(old, record)
        except ValueError as error:
            say(f"fdistill-bench: error: --compare: {error}")
            return status or 2
        if status == 0:
            status, changes = _measured_again(arguments, command, changes, old)
        print("\n" + compare.report(changes, old, record))
        if any(change.verdict in ("slower", "broken") for change in changes):
            status = status or 1
    return status


def _measured_again(
    arguments: argparse.Namespace, command: list[str], changes: list[compare.Change], old: Record
) -> tuple[int, list[compare.Change]]:
    """The status of a second measurement of what seems slower or faster, and the changes that it says too: of many
    results some are by chance."""
    suspects = [change for change in changes if change.verdict in ("slower", "faster")]
    if not suspects:
        return 0, changes
    say("fdistill-bench: what seems slower or faster is measured again")
    again = new_record(arguments.device, command)
    cases = list(dict.fromkeys(change.result.case for change in suspects))
    plan = replace(arguments.plan, compile=False, costs=False)
    options = {"cases": cases, "overhead": False, "quick": False, "plan": plan}
    status = measure_all(argparse.Namespace(**(vars(arguments) | options)), again)
    return status, compare.confirmed(changes, old, again)


def measure_all(arguments: argparse.Namespace, record: Record) -> int:
    """Adds to the record what the options ask for and it does not have. The exit status: 0, or 130 or 143 where it was
    interrupted; the record is then partial."""
    known = {result.case for result in record.results}
    cases: list[Case] = [case for case in arguments.cases if case not in known]
    plan: Plan = arguments.plan
    spent, longest = 0.0, 0.0
    try:
        with interruptible(), Progress(len(cases) + arguments.overhead) as progress:
            if arguments.overhead:
                progress.step("host overhead")
                record.overhead += measure_overhead(arguments.device, plan.rounds)
                go_on_unless_interrupted()
            for case in cases:
                if arguments.quick:
                    # Compiling takes as long as everything else: once, first, and beside the time for that.
                    plan = replace(plan, compile=arguments.compile and case in arguments.compiled)
                    if spent + longest > _QUICK_SECONDS:
                        say("fdistill-bench: --quick: out of time, the rest is left out")
                        break
                progress.step(f"{case.op} {case.mode} {case.label} {case.dtype}")
                begun = time.monotonic()
                record.results += measure(case, plan)
                go_on_unless_interrupted()
                if not plan.compile:
                    spent += time.monotonic() - begun
                    longest = max(longest, time.monotonic() - begun)
    except Interrupted as interruption:
        say(f"\nfdistill-bench: {interruption.name}: this is what was finished")
        record.partial = True
        return interruption.status
    return 0


# ----------------------------------------------------------------------------------------------------------- arguments


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, and from them ``cases`` and ``plan``. Whatever is wrong ends the process with one line and status 2,
    before anything is measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="fdistill-bench",
        description="Times every operation on every back end that runs here, beside the formulas in eager PyTorch as "
        "training code has them, torch.compile of those, and a copy of the bytes that have to move. All results are "
        "checked first; one that is wrong gets no time.",
        epilog="For several values give an option again, or, except for --shape, separate them by commas. "
        f"Shapes by name: {', '.join(f'{name} {list(shape)}' for name, shape in SHAPES.items())}.",
    )
    add, some = parser.add_argument, partial(parser.add_argument, action=_More)
    some("--op", type=_list(_choice(tuple(OPS))), default=tuple(OPS), help=f"(default: all: {','.join(OPS)})")
    add("--shape", type=_worded(shape_of), action="append", help="a name or sizes B,C,H,W (default: all names)")
    some("--mode", type=_list(_choice(MODES)), default=MODES, help=f"(default: {','.join(MODES)})")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    some("--dtype", type=_list(_choice(dtypes)), default=("float32",), help=f"of {','.join(dtypes)} (default: float32)")
    add(
        "--divergence",
        type=_worded(lambda text: fd.get_divergence(text) and text),
        default="js",
        help="(default: %(default)s)",
    )
    add("--guidance", type=number(), help="guidance scale of the teacher (default: no guidance)")
    add("--mask", action="store_true", help="with a mask")
    histogram = argparse.BooleanOptionalAction
    add("--histogram", action=histogram, default=True, help="divide ratios by their running mean (default: yes)")
    threads = torch.get_num_threads()
    some("--threads", type=_list(integer(1, 1024)), default=(threads,), help=f"(default: {threads})")
    add("--device", type=device_name, default=device, help="cpu, cuda or cuda:N (default: %(default)s)")
    some("--contender", type=_list(str), help="only these: back ends, 'BACKEND graph', eager, compile, copy")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--warm", action="store_true", help="time the same tensors again and again instead of rotating over copies")
    add("--sweep", choices=("size", "batch"), help="1 KiB to what memory allows, or batches of sd15, instead of shapes")
    add("--rounds", type=integer(1, 10000), help=f"(default: {Plan.rounds})")
    add("--overhead", action=argparse.BooleanOptionalAction, help="host overhead (default: where all ops are timed)")
    add("--quick", action="store_true", help="some 30 seconds: few shapes, torch.compile on one, no reference")
    add("--json", type=_output, help="write the record to this file")
    add("--csv", type=_output, help="write a row for every figure to this file")
    add("--plot", type=partial(_output, folder=True), help="draw the record into this folder, as PNG")
    what = "results, not host overheads, got slower or faster since; exit status 1 if any got slower"
    add("--compare", type=Path, help=f"a record written by --json: which {what}")
    arguments = parser.parse_args(argv)

    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("argument --plot: matplotlib is not installed")
    backends = serving(arguments.device)
    known = {*backends, "eager", "compile", "copy"}
    if torch.device(arguments.device).type == "cuda":
        known |= {f"{name} graph" for name in backends if name != "reference"}
    for name in arguments.contender or ():
        if name not in known:
            parser.error(f"argument --contender: {name!r} is not among {', '.join(sorted(known))}")
    if arguments.contender == ("compile",) and not arguments.compile:
        parser.error("arguments --contender compile and --no-compile leave nothing")
    if arguments.sweep is not None and arguments.shape is not None:
        parser.error("argument --sweep: has shapes of its own, not those of --shape")
    arguments.plan = replace(_QUICK if arguments.quick else Plan(), compile=arguments.compile)
    arguments.plan.rounds = arguments.rounds or arguments.plan.rounds
    if arguments.contender:
        arguments.plan.contenders = frozenset(arguments.contender)
        arguments.plan.reference = "reference" in arguments.contender
    if arguments.overhead is None:
        arguments.overhead = arguments.quick or (arguments.op == tuple(OPS) and arguments.sweep is None)
    arguments.cases = _quick_cases(arguments) if arguments.quick else _cases(arguments)
    if not arguments.cases:
        wanted = f"--op {','.join(arguments.op)} with --mode {','.join(arguments.mode)}"
        parser.error(f"nothing to measure: there is no {wanted}" + (" in such a --sweep" if arguments.sweep else ""))
    if arguments.compare is not None and arguments.plan.rounds < LEAST_ROUNDS:
        parser.error(f"argument --compare: needs at least {LEAST_ROUNDS} rounds")
    return arguments


def _cases(arguments: argparse.Namespace, sweep: str | None = None) -> list[Case]:
    """Every combination, those of one table together. A sweep has the last mode of each operation, and only operations
    whose cost depends on it."""
    sweep = sweep or arguments.sweep
    found = []
    for dtype in arguments.dtype:
        shapes = [*SHAPES.items()] if arguments.shape is None else arguments.shape
        if sweep is not None:
            largest = int(memory_bytes(arguments.device) * _LARGEST)
            sizes = {"size": size_sweep, "batch": batch_sweep}[sweep]
            shapes = [*sizes(largest, getattr(torch, dtype).itemsize).items()]
        for threads in arguments.threads if arguments.device == "cpu" else (torch.get_num_threads(),):
            for op in arguments.op if sweep is None or arguments.op != tuple(OPS) else ("f_distill",):
                modes = [mode for mode in OPS[op].modes() if mode in arguments.mode]
                for mode in modes if sweep is None else modes[-1:]:
                    for name, shape in [] if sweep == "size" and op in OF_LOGITS else shapes:
                        case = Case(op, shape, name, mode, dtype, arguments.device, threads, warm=arguments.warm)
                        found.append(replace(case, **_options(op, arguments)))
    return list(dict.fromkeys(found))


def _options(op: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that the operation has."""
    options: dict[str, Any] = {}
    if op in MATCHING:
        options |= {"guidance": arguments.guidance, "mask": arguments.mask}
    if op in WEIGHTED:
        options |= {"divergence": arguments.divergence, "histogram": arguments.histogram}
    return options


def _quick_cases(arguments: argparse.Namespace) -> list[Case]:
    """f_distill on three shapes, every second size up to 64 MiB, then the other operations on one shape; of each
    operation the last mode alone. torch.compile is for the first (see measure_all)."""
    every = arguments.op == tuple(OPS)
    shapes = arguments.shape or [shape_of(name) for name in ("cifar10", "sd15", "wan-video")]

    def cases(**changes: Any) -> list[Case]:
        found = _cases(argparse.Namespace(**(vars(arguments) | changes)))
        last = {case.op: case.mode for case in found}
        return [case for case in found if case.mode == last[case.op]]

    found = cases(op=("f_distill",) if every else arguments.op, shape=shapes)
    arguments.compiled = found[:1]
    sweep = [case for case in cases(sweep="size") if case.tensor_bytes <= 64 << 20]
    sizes = sorted({case.tensor_bytes for case in sweep})[::2]
    found += [case for case in sweep if case.tensor_bytes in sizes]
    return found + (cases(op=tuple(op for op in OPS if op != "f_distill"), shape=shapes[:1]) if every else [])


def _list(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """An argument's type: values separated by commas."""

    def parse(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))

    return parse


class _More(argparse.Action):
    """An option for a list: given again, it adds to what was given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is self.default else tuple(dict.fromkeys((*given, *values))))


def _choice(known: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(known)}; got {text!r}")
        return text

    return parse


def _worded(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argument's type, whose ValueError says what is wrong."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _output(text: str, folder: bool = False) -> Path:
    """A file, or a folder, which may not be there yet. Tried before anything is measured."""
    path = Path(text)
    there = path.absolute() if folder else path.absolute().parent
    while folder and not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        if path.is_dir() and not folder:
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from None
    return path


if __name__ == "__main__":
    sys.exit(main())
