"""A run of the fuzzer: batches of calls in child processes, and what becomes of those that are wrong."""

from __future__ import annotations

import importlib
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fdistill_ops as fd

from . import script
from .compare import Problem
from .execute import Outcome, Undrawable, execute
from .generate import generate, level_of
from .process import Death, in_child
from .shrink import fault_of, shrink
from .specs import Call

_BATCH = {"cuda-emulated": 100, "triton": 20}
LATE = (
    "sympy",
    "torch._dynamo",
    "torch.masked",
    "torch.testing._internal.two_tensor",
    "torch._subclasses.fake_tensor",
)
LATE += ("fdistill_ops.testing",)
MOST_SHRUNK = 6  # of one fault: what is left of it tells whether there is more than one cause


@dataclass
class Finding:
    """``seen``: how many calls had this fault before they were shrunk."""

    call: Call
    outcome: Outcome
    number: int
    backend: str
    path: Path | None = None
    seen: int = 1
    alone: bool = True


@dataclass
class Tally:
    calls: int = 0
    levels: Counter[str] = field(default_factory=Counter)
    undrawable: int = 0
    seconds: float = 0.0


def attempt(call: Call) -> Outcome | str | None:
    """What is wrong with the call; None where nothing is."""
    try:
        outcome = execute(call)
    except Undrawable:
        return "undrawable"
    except Exception:  # of the fuzzer itself: to be seen, and no reason to stop
        return Outcome([Problem("fuzzer", traceback.format_exc()[-1500:])])
    return outcome if outcome.problems else None


def settle() -> None:
    """What every child inherits: quiet, one thread, and the modules that PyTorch imports when they are first needed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in LATE:
        importlib.import_module(name)


def quick_interpreter() -> None:
    """Triton's interpreter replaces the functions of its language at every call of a device function, also where that
    is done already: nine tenths of its time."""
    from triton.language import core
    from triton.runtime import interpreter

    def call(self, *arguments, **more):  # type: ignore[no-untyped-def]
        languages = [v for v in self.fn.__globals__.values() if v is interpreter.tl or v is core]
        if any(core.is_builtin(language.full) for language in languages):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **more)

    interpreter.InterpretedFunction.__call__ = call


class Campaign:
    """``backends``: their names. ``out``: the folder of the scripts; None: none are written."""

    def __init__(
        self,
        backends: list[str],
        seed: int,
        out: Path | None = None,
        limit: float = 20.0,
        make: Callable[[int, str, int], Call] = generate,
    ) -> None:
        for name in backends:
            fd.set_backend(name)  # raises where it cannot run here
        fd.set_backend(None)
        if "triton" in backends:
            quick_interpreter()
        settle()
        self.backends, self.seed, self.out, self.limit, self.make = backends, seed, out, limit, make
        self.tallies = {name: Tally() for name in backends}
        self.findings: list[Finding] = []
        for path in [] if out is None else out.glob("finding-*.py"):
            path.unlink()
        self._faults: Counter[tuple[str, ...]] = Counter()

    # ---------------------------------------------------------------------------------------------------------- batches

    def run(self, seconds: float | None = None, calls: int | None = None, first: int = 0) -> None:
        """Until so many calls of each back end have been made, or the time is over."""
        until = time.monotonic() + (60.0 if seconds is None else seconds)
        following = dict.fromkeys(self.backends, first)
        while True:
            open_ = [name for name in self.backends if calls is None or following[name] < first + calls]
            if not open_ or ((calls is None or seconds is not None) and time.monotonic() > until):
                break
            name = min(open_, key=lambda name: self.tallies[name].seconds)
            size = _BATCH.get(name, 500)
            size = size if calls is None else min(size, first + calls - following[name])
            following[name] += self.batch(name, following[name], size)

    def batch(self, backend: str, first: int, size: int) -> int:
        """Some calls in one child process; how many came to an end."""
        start, tally = time.monotonic(), self.tallies[backend]
        numbers = range(first, first + size)

        def work(number: int) -> Outcome | str | None:
            return attempt(self.make(self.seed, backend, number))

        results, death = in_child(work, numbers, self._limit(backend))
        done = size if death is None else death.place + 1
        tally.seconds += time.monotonic() - start
        tally.calls += done
        for number in numbers[:done]:
            tally.levels[level_of(self.seed, backend, number)] += 1
        for place, outcome in results:
            if isinstance(outcome, str):
                tally.undrawable += 1
            else:
                self._found(backend, numbers[place], outcome)
        if death is not None:
            self._found(backend, numbers[death.place], _dead(death))
        return done

    def _limit(self, backend: str) -> float:
        return self.limit * (10 if backend in _BATCH else 1)

    # --------------------------------------------------------------------------------------------------------- findings

    def _outcome(self, call: Call, backend: str) -> Outcome | None:
        """Of the call alone, in a process of its own."""
        results, death = in_child(attempt, [call], self._limit(backend))
        if death is not None:
            return _dead(death)
        outcome = results[0][1] if results else None
        return None if isinstance(outcome, str) else outcome

    def _found(self, backend: str, number: int, outcome: Outcome) -> None:
        call = self.make(self.seed, backend, number)
        fault = fault_of(outcome)
        if fault[0] in ("value", "crash", "hang", "changed", "backward"):
            fault = (*fault, call.target, backend)
        self._faults[fault] += 1
        if self._faults[fault] > MOST_SHRUNK:
            for finding in self.findings:
                if finding.outcome.problems and fault_of(finding.outcome)[:2] == fault[:2]:
                    finding.seen += 1
                    break
            return
        alone = self._outcome(call, backend)
        if alone is None:
            self._record(Finding(call, outcome, number, backend, alone=False))
            return
        wanted = fault_of(alone)

        smallest = shrink(call, lambda simpler: self._first_with(wanted, simpler, backend))
        self._record(Finding(smallest, self._outcome(smallest, backend) or alone, number, backend))

    def _first_with(self, wanted: tuple[str, ...], calls: list[Call], backend: str) -> int | None:
        """The place of the first call with that fault."""

        def same(outcome: Outcome | str) -> bool:
            return not isinstance(outcome, str) and fault_of(outcome) == wanted

        start = 0
        while start < len(calls):
            results, death = in_child(attempt, calls[start:], self._limit(backend), same)
            for place, outcome in results:
                if same(outcome):
                    return start + place
            if death is None:
                break
            if fault_of(_dead(death)) == wanted:
                return start + death.place
            start += death.place + 1
        return None

    def _record(self, finding: Finding) -> None:
        """Once for each fault and what is left of the call."""
        fault, features = fault_of(finding.outcome), finding.call.features()
        for other in self.findings:
            by_place = fault[0] in ("accepted", "type", "unnamed", "refused")
            if fault_of(other.outcome) == fault and (by_place or other.call.features() == features):
                other.seen += 1
                return
        self.findings.append(finding)
        command = (
            f"python -m tests.fuzz --seed {self.seed} --backends {finding.backend} --first {finding.number} --calls 1"
        )
        text = script.script(finding.call, finding.outcome, command)
        place = len(self.findings)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            finding.path = self.out / f"finding-{place}.py"
            finding.path.write_text(text, encoding="utf-8")
        print(
            f"[{place}] {finding.backend}, call {finding.number}: {script.title(finding.call, finding.outcome)[:400]}"
        )
        sys.stdout.flush()

    def summary(self) -> str:
        """Calls and findings as text."""
        lines = [""]
        for name, tally in self.tallies.items():
            levels = ", ".join(f"{count} {level}" for level, count in sorted(tally.levels.items()))
            rate = tally.calls / tally.seconds if tally.seconds else 0.0
            lines.append(
                f"{name}: {tally.calls} calls, {rate:.0f} a second ({levels}; {tally.undrawable} could not be made)"
            )
        lines.append(f"{len(self.findings)} finding(s), seed {self.seed}")
        for place, finding in enumerate(self.findings, 1):
            where = f" {finding.path}" if finding.path else ""
            note = "" if finding.alone else " (not by itself: after the calls before it)"
            problem = finding.outcome.problems[0]
            lines.append(f"  [{place}] {problem.kind}, {finding.call.target}, {finding.seen} seen{note}{where}")
        return "\n".join(lines)


def _dead(death: Death) -> Outcome:
    kind = "hang" if death.reason == "hang" else "crash"
    return Outcome([Problem(kind, f"the process ends by {death.reason}" if kind == "crash" else "does not end")])
