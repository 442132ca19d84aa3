"""What got slower between two records, told from noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from .cases import Case
from .record import Record, Result

CONTROLS = ("copy", "eager")
"""Contenders whose code is not ours: where they slowed down too, the machine did."""
LEAST_ROUNDS = 3
"""Quartiles of fewer say nothing about the noise."""


@dataclass(frozen=True)
class Change:
    """One of our back ends on one case in both records. ``factor``: how many times as long it takes now, the machine's
    own change taken out; ``noise``: the factor that noise alone explains."""

    result: Result
    factor: float
    noise: float
    broken: str | None = None  # right before, and now this

    @property
    def slower(self) -> bool:
        return self.broken is not None or self.factor > self.noise

    @property
    def faster(self) -> bool:
        return self.broken is None and self.factor < 1 / self.noise


def require_rounds(old: Record) -> None:
    """ValueError where it has too few of them to tell its noise."""
    if any(0 < len(result.rounds) < LEAST_ROUNDS for result in old.results):
        raise ValueError(f"the old record has fewer than {LEAST_ROUNDS} rounds")


def compare(old: Record, new: Record, least: float = 1.05) -> list[Change]:
    """The results of our back ends that both records have, in the order of the new one, and those that the old one has
    of a case that the new one has without them (unless it was told which contenders to measure).

    A result is slower if its median grew by more than a factor of ``least`` and by more than the noise: the logarithm
    of the change must exceed the distances of the quartiles of both measurements, in units of their medians, added in
    quadrature. A change of the machine is divided out where every control (copy, eager formulas) of the same case took
    at least that much longer too; a machine that got faster is given no credit.

    Raises:
        ValueError: the records have no case in common, or the old one has too few rounds to tell its noise.
    """
    require_rounds(old)
    before = {(result.case, result.contender): result for result in old.results}
    changes = []
    for group in new.groups():
        drift = _drift(before, group)
        for result in group:
            earlier = before.get((result.case, result.contender))
            if not result.ours or earlier is None or not earlier.rounds:
                continue
            if not result.rounds:
                changes.append(Change(result, math.inf, 1.0, broken=result.error or "no time"))
                continue
            factor = median(result.rounds) / median(earlier.rounds) / drift
            noise = math.hypot(earlier.seconds.relative, result.seconds.relative)
            changes.append(Change(result, factor, max(least, math.exp(noise))))
    if not any(part.startswith("--contender") for part in new.command):
        cases, there = {result.case for result in new.results}, {(r.case, r.contender) for r in new.results}
        for (case, contender), earlier in before.items():
            if earlier.ours and earlier.rounds and case in cases and (case, contender) not in there:
                changes.append(Change(earlier, math.inf, 1.0, broken="it was not measured"))
    if not changes:
        raise ValueError("the two records have no case in common")
    return changes


def _drift(before: dict[tuple[Case, str], Result], group: list[Result]) -> float:
    factors = []
    for result in group:
        earlier = before.get((result.case, result.contender))
        if result.contender in CONTROLS and earlier is not None and earlier.rounds and result.rounds:
            factors.append(median(result.rounds) / median(earlier.rounds))
    return max(1.0, min(factors, default=1.0))


def report(changes: list[Change], old: Record, new: Record) -> str:
    """In words, the worst first."""
    lines = []
    for key in ("processor", "gpu"):
        if old.machine.get(key) != new.machine.get(key):
            lines.append(f"warning: other machines: {old.machine.get(key)} before, {new.machine.get(key)} now")
    for change in sorted(changes, key=lambda change: -change.factor):
        case = change.result.case
        where = f"{change.result.contender} {case.op} {case.mode} {case.label} {case.dtype}"
        if change.broken is not None:
            lines.append(f"broken  {where}: {change.broken}")
        elif change.slower or change.faster:
            word = "slower" if change.slower else "faster"
            lines.append(f"{word}  {where}: {change.factor:.2f} times as long (noise: up to {change.noise:.2f})")
    slower, faster = (sum(getattr(change, word) for change in changes) for word in ("slower", "faster"))
    lines.append(
        f"{len(changes)} compared with {old.commit or 'a record'} of {old.started[:10]}: {slower} slower, "
        f"{faster} faster, {len(changes) - slower - faster} the same"
    )
    return "\n".join(lines)
