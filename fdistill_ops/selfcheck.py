"""Whether the kernels compute what they should on this machine: ``python -m fdistill_ops.selfcheck``.

Runs each back end that is there over the operations, dtypes and layouts, forward and backward, and compares with the
formulas in float64 within tolerances that are derived from the roundings involved. Prints a table with the largest
error of each back end, operation and dtype, in units of its tolerance, and for a case that is off how to see it again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import fdistill_ops as fd

from . import _selfcheck_cases as calls
from . import backends as choice
from ._selfcheck_cases import Case
from ._validation import device_named, shown
from .testing import poison

_MAX_SHOWN = 10  # cases that are off, in full
_MAX_SEED = 1 << 31
_LONGEST = 50.0  # seconds, after which nothing is compiled that nobody asked for


@dataclass
class Failure:
    """A case that is off, or that could not be run."""

    case: Case
    backend: str
    device: torch.device
    seed: int
    message: str

    @property
    def command(self) -> str:
        """Runs the case alone."""
        words = ["--backend", self.backend, "--device", str(self.device), "--seed", str(self.seed)]
        return shlex.join(["python", "-m", "fdistill_ops.selfcheck", *words, "--case", self.case.name])

    @property
    def script(self) -> str:
        """Makes the call of the case."""
        where = f"seed={self.seed}, device={str(self.device)!r}"
        return (
            "import fdistill_ops as fd\n"
            f"arguments = fd.selfcheck.arguments({self.case.name!r}, {where})\n"
            f"with fd.use_backend({self.backend!r}):\n"
            f"    print(fd.{self.case.operation}(**arguments))\n"
        )


@dataclass
class Row:
    """The cases of one operation and dtype on one back end. ``error``: the largest, in units of its tolerance."""

    backend: str
    device: str
    operation: str
    dtype: str
    cases: int = 0
    error: float = 0.0
    seconds: float = 0.0
    off: int = 0


@dataclass
class Report:
    """What :func:`run` found. ``absent``: why a back end was not checked, by its name."""

    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing is off."""
        return bool(self.rows) and not self.failures

    def __str__(self) -> str:
        lines = [*_table(self.rows), "", *(f"{name}: not checked: {reason}" for name, reason in self.absent.items())]
        lines += [*self.notes, ""]
        for failure in self.failures[:_MAX_SHOWN]:
            lines += [f"OFF: {failure.backend} on {failure.device}: {failure.case.name}: {failure.message}"]
            lines += [f"    {line}" for line in (f"{failure.command}\n\n{failure.script}").splitlines()]
        if len(self.failures) > _MAX_SHOWN:
            lines.append(f"and {len(self.failures) - _MAX_SHOWN} more cases that are off")
        number = sum(row.cases for row in self.rows)
        verdict = (
            f"{len(self.failures)} of {number} calls are off" if self.failures else f"all {number} calls are right"
        )
        return "\n".join([*lines, f"{verdict}; {self.seconds:.1f} s"])


def _table(rows: Sequence[Row]) -> list[str]:
    head = ("back end", "device", "operation", "dtype", "calls", "error/tolerance", "seconds", "")
    body = [
        (
            row.backend,
            row.device,
            row.operation,
            row.dtype,
            str(row.cases),
            f"{row.error:.2f}",
            f"{row.seconds:.2f}",
            f"{row.off} off" if row.off else "",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if 4 <= i < 7 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *body)
    ]


# ------------------------------------------------------------------------------------------------------------- running


class _Plan(NamedTuple):
    """A back end, where its tensors lie, and which cases it takes: None for all. ``compiles``: no further ones after
    a minute."""

    backend: str
    device: torch.device
    part: Callable[[Case], bool] | None = None
    compiles: bool = False


def run(
    backends: Collection[str] | None = None,
    *,
    device: torch.device | str | None = None,
    seed: int = 0,
    case: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Checks back ends against the formulas in float64: values, gradients and histograms of f_weights, the losses,
    score_difference and the GAN losses, in float32, float64, bfloat16, float16 and a mixture, on contiguous,
    channels_last, strided and broadcast tensors and on samples too large for one program. Fresh memory is filled with
    NaN before a kernel runs. The choice of the back end for other calls stays as it is.

    Args:
        backends: names; None: those that are there. Kernels in an interpreter are checked only where they are named,
            with a part of the cases; so are Triton's on a GPU where they are not named, since each is compiled first.
        device: where the tensors lie; None: the CPU and, where there is one, the current GPU.
        seed: of the numbers in the tensors.
        case: the name of the only one to run, as a failure names it.
        progress: called with the name of each case before it runs.

    Returns:
        A :class:`Report`, whose ``str()`` is the table and whose ``ok`` says whether everything was right.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
        RuntimeError: a back end that was named is not there, or does not serve the device.
    """
    start = time.perf_counter()
    seed = _seed(seed)
    chosen = list(calls.cases()) if case is None else [_case(case)]
    report = Report()
    plans = list(_plans(backends, _devices(device), report))
    rows: dict[tuple[str, ...], Row] = {}
    late: dict[str, int] = {}
    for one in chosen:
        answer = calls.Answer(one, seed)
        for plan in plans:
            if case is None and plan.part is not None and not plan.part(one):
                continue
            if plan.compiles and time.perf_counter() - start > _LONGEST:
                late[plan.backend] = late.get(plan.backend, 0) + 1
                continue
            if progress is not None:
                progress(f"{plan.backend} on {plan.device}: {one.name}")
            key = (plan.backend, str(plan.device), one.operation, one.dtype)
            _check(one, answer, plan, seed, rows.setdefault(key, Row(*key)), report)
    report.notes += [f"{name}: {n} calls left out, a minute was over" for name, n in late.items()]
    order = {(plan.backend, str(plan.device)): i for i, plan in enumerate(plans)}
    report.rows = sorted(rows.values(), key=lambda row: order[row.backend, row.device])
    report.seconds = time.perf_counter() - start
    return report


def _check(case: Case, answer: calls.Answer, plan: _Plan, seed: int, row: Row, report: Report) -> None:
    row.cases += 1
    start = time.perf_counter()
    try:
        with fd.use_backend(plan.backend), poison():
            found = calls.results(case, getattr(fd, case.operation), calls.arguments(case, seed, plan.device))
            found = {name: tensor.cpu() for name, tensor in found.items()}
    except Exception as error:  # whatever it is, it is reported and the other cases are run
        row.seconds += time.perf_counter() - start
        messages = [f"{type(error).__name__}: {error}"]
        worst = float("inf")
    else:
        row.seconds += time.perf_counter() - start
        messages, worst = [], 0.0
        for name, expected in answer.expected.items():
            share, message = expected.error(found[name])
            worst = max(worst, share)
            messages += [f"{name}: {message}"] if share > 1 else []
    row.error = max(row.error, worst)
    if messages:
        row.off += 1
        report.failures.append(Failure(case, plan.backend, plan.device, seed, "; ".join(messages)))


def arguments(case: str, *, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The arguments of a case, for a call of one's own: the function that its name begins with takes them.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    return calls.arguments(_case(case), _seed(seed), _device(device))


def _case(name: str) -> Case:
    for case in calls.cases():
        if case.name == name:
            return case
    raise ValueError(
        f"case must be an operation, a dtype and a layout, such as {next(calls.cases()).name!r}; got {shown(name)}"
    )


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _MAX_SEED:
        raise ValueError(f"seed must be a whole number from 0 to {_MAX_SEED - 1}, got {shown(seed)}")
    return seed


def _device(device: Any) -> torch.device:
    found = device_named(device)
    if found.type == "meta":
        raise ValueError("device must hold numbers, and 'meta' does not")
    return found


def _devices(device: torch.device | str | None) -> list[torch.device]:
    if device is not None:
        return [_device(device)]
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def _plans(backends: Collection[str] | None, devices: Sequence[torch.device], report: Report) -> Iterator[_Plan]:
    """What is checked; what is not goes to the report."""
    if isinstance(backends, str):
        raise TypeError(f"backends must hold names of back ends, got {shown(backends)}")
    missing = choice.unavailable_backends()
    for name in choice.NAMES if backends is None else dict.fromkeys(backends):
        if backends is not None:
            choice.usable(name, "backends")
        elif name in missing:
            report.absent[name] = missing[name].partition(": ")[2]
            continue
        served = [device for device in devices if choice.serves(name, device.type)]
        if not served and backends is not None:
            raise RuntimeError(f"the back end {name!r} cannot serve {devices[0].type} tensors")
        if not served:
            report.absent[name] = f"it does not serve {devices[0].type} tensors"
        elif choice.interprets(name):
            if backends is None:
                report.absent[name] = (
                    f"its kernels are interpreted here, slowly; name it (--backend {name}) all the same"
                )
                continue
            report.notes.append(f"{name}: interpreted, so a part of the calls")
            yield from (_Plan(name, device, lambda case: case.small) for device in served)
        elif name == "triton" and backends is None:
            report.notes.append(f"{name}: compiled on first use, so a part of the calls; --backend {name} makes all")
            yield from (_Plan(name, device, lambda case: case.first, compiles=True) for device in served)
        else:
            yield from (_Plan(name, device) for device in served)


# ------------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fdistill_ops.selfcheck",
        description="Checks the kernels on this machine: values and gradients of every operation against the formulas "
        "in float64. Exit status 0: all right; 1: something is off; 2: a wrong option.",
    )
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(choice.NAMES)}; may be given several times (default: those that are there)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the CPU and, where there is one, the GPU)")
    parser.add_argument("--seed", type=int, default=0, help="of the numbers in the tensors (default: 0)")
    parser.add_argument("--case", metavar="NAME", help="the only case to run, as a failure names it")
    options = parser.parse_args(argv)
    shows = sys.stderr.isatty()

    def progress(text: str) -> None:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)

    try:
        report = run(
            options.backend,
            device=options.device,
            seed=options.seed,
            case=options.case,
            progress=progress if shows else None,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    finally:
        if shows:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
