"""What got slower or faster between two records, told from noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import median

from .cases import Case
from .figures import DOUBTS, LEAST_ROUNDS, Figure, figures
from .record import Record, Result

CONTROLS = ("copy", "eager")
"""Contenders whose code is not ours: what they say of each other is what the same code says of itself."""
LEAST = 1.05
"""No smaller change counts."""
RATE = 0.05
"""Of the same code at most so many results are called slower or faster, before they are measured again."""
SAME = "no difference seen"

Told = dict[str, dict[str, Figure]]
"""The figures of a case, by contender and name."""


@dataclass(frozen=True)
class Change:
    """One of our back ends on one case in both records. ``factor``: how many times as long it takes now, by the
    yardstick that is nearest to 1; ``low`` and ``high``: around the intervals by all of them; ``floor``: the factor
    that noise alone explains, infinite where nothing can be told."""

    result: Result
    factor: float
    low: float
    high: float
    floor: float
    broken: str | None = None  # right before, and now this
    doubts: frozenset[str] = frozenset()

    @property
    def verdict(self) -> str:
        if self.broken is not None:
            return "broken"
        return "slower" if self.low > self.floor else "faster" if self.high < 1 / self.floor else SAME


def require_rounds(old: Record) -> None:
    """ValueError where no result has enough of them to tell its noise."""
    if all(len(result.rounds) < LEAST_ROUNDS for result in old.results):
        raise ValueError(f"the old record has fewer than {LEAST_ROUNDS} rounds")


def compare(old: Record, new: Record) -> list[Change]:
    """The results of our back ends that both records have, in the order of the new one, and those that the old one has
    of a case that the new one has without them (unless it was told which contenders to measure).

    The yardsticks are the clock and, round by round, each of CONTROLS. A result is slower if by each of them the
    interval of the change lies above the floor, and faster if below its inverse. The floor is the largest of LEAST, of
    how far the controls of the case moved against each other between the two records, and of three times the median of
    that over all cases (n cases: 3 + 3 / n times, as few say little). So nothing is said where the machine changed and
    not the code, nor without a control, nor from a figure that is worthless.

    Raises:
        ValueError: the records have no case in common, or the old one has too few rounds to tell its noise.
    """
    require_rounds(old)
    before, after = _cases(old), _cases(new)
    told = {case: (_told(before.get(case, {})), _told(now)) for case, now in after.items()}
    moved = {case: abs(math.log(noise)) for case in after if (noise := _noise(*told[case])) is not None}
    typical = (3 + 3 / len(moved)) * median(moved.values()) if moved else 0.0
    chosen = any(part.startswith("--contender") for part in new.command)
    changes = []
    for case, now in after.items():
        floor = max(LEAST, math.exp(max(moved.get(case, 0.0), typical)))
        for result in before.get(case, {}).values():
            if result.ours and result.rounds and result.contender in now:
                changes.append(_change(now[result.contender], *told[case], floor))
            elif result.ours and result.rounds and not chosen:
                changes.append(_broken(result, "it was not measured"))
    if not changes:
        raise ValueError("the two records have no case in common")
    return changes


def confirmed(changes: list[Change], old: Record, again: Record) -> list[Change]:
    """Those that a second measurement says too; in the place of the others changes that say nothing."""
    try:
        second = {(change.result.case, change.result.contender): change.verdict for change in compare(old, again)}
    except ValueError:
        second = {}
    return [
        replace(change, floor=math.inf)
        if change.verdict in ("slower", "faster")
        and second.get((change.result.case, change.result.contender)) != change.verdict
        else change
        for change in changes
    ]


def _cases(record: Record) -> dict[Case, dict[str, Result]]:
    return {group[0].case: {result.contender: result for result in group} for group in record.groups()}


def _told(group: dict[str, Result]) -> Told:
    return {name: figures(result, group) for name, result in group.items()}


def _broken(result: Result, reason: str) -> Change:
    return Change(result, math.inf, math.inf, math.inf, 1.0, broken=reason)


def _noise(then: Told, now: Told) -> float | None:
    """By which factor the controls moved against each other; None where there are not two."""
    both = [told.get(CONTROLS[1], {}).get(f"{CONTROLS[0]}/it") for told in (then, now)]
    return None if both[0] is None or both[1] is None else both[1].value / both[0].value


def _change(result: Result, then: Told, now: Told, floor: float) -> Change:
    if not result.rounds:
        return _broken(result, result.error or "no time")
    old, new = then[result.contender], now[result.contender]
    pairs = [(old["time"], new["time"])]  # of what grows with our time
    pairs += [(new[name], old[name]) for control in CONTROLS if (name := f"{control}/it") in old and name in new]
    doubts = frozenset(doubt for pair in pairs for figure in pair for doubt in figure.doubts)
    return Change(
        result,
        factor=min((b.value / a.value for a, b in pairs), key=lambda factor: abs(math.log(factor))),
        low=min((b.low or 0.0) / (a.high or math.inf) for a, b in pairs),
        high=max((b.high or math.inf) / (a.low or math.inf) for a, b in pairs),
        floor=floor if len(pairs) > 1 and not doubts else math.inf,
        doubts=doubts,
    )


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
        elif change.verdict != SAME:
            interval = f"{change.low:.2f} to {change.high:.2f}; noise: up to {change.floor:.2f}"
            lines.append(f"{change.verdict}  {where}: {change.factor:.2f} times as long ({interval})")
    count = {word: sum(change.verdict == word for change in changes) for word in ("broken", "slower", "faster", SAME)}
    lines.append(
        f"{len(changes)} compared with {old.commit or 'a record'} of {old.started[:10]}: "
        + ", ".join(f"{number} {word}" for word, number in count.items())
    )
    worthless = [change for change in changes if change.doubts]
    reasons = ", ".join(words for doubt, words in DOUBTS.items() if any(doubt in change.doubts for change in worthless))
    return "\n".join([*lines, *([f"{len(worthless)} from figures that are worthless: {reasons}"] if worthless else [])])
