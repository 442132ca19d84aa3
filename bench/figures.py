"""What the record says, figure by figure: each with its interval and spread, and with what makes it worthless."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from .clock import LEVEL, Spread

if TYPE_CHECKING:
    from .record import Overhead, Result

WIDE = 0.25
LEAST_ROUNDS = 6
"""Fewer have no interval of LEVEL."""
MOST_LOAD = 1.25
"""The benchmark's own threads make at most 1 a core."""
MARK = "!"
DOUBTS = {
    "rounds": f"fewer than {LEAST_ROUNDS} rounds",
    "spread": f"spread over {WIDE:.0%} (between quartiles, or half of the interval)",
    "load": f"load average over {MOST_LOAD:g} a core",
    "baseline": "the ratio is no further from 1 than one side is spread",
}
"""What makes a figure worthless, and nothing else does: the one definition for tables, JSON, CSV and plots."""
INTERVAL = f"{LEVEL:.0%} interval of the median"


@dataclass(frozen=True)
class Figure:
    """``unit``: "s", "B/s", "B", "1" for a ratio, "n" for a count. Between ``low`` and ``high`` is the INTERVAL;
    ``spread`` is the distance of the quartiles, relative to the value. All three are None for what has no rounds."""

    name: str
    unit: str
    value: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    doubts: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """What it has, with five digits, as the rounds."""
        kept = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in kept.items()}

    @property
    def mark(self) -> str:
        """MARK and the initials of the doubts, or nothing."""
        return MARK + "".join(doubt[0] for doubt in self.doubts) if self.doubts else ""

    @classmethod
    def of(cls, name: str, unit: str, rounds: Sequence[float], load: float | None) -> Figure:
        found = Spread.of(rounds)
        doubts = {
            "rounds": len(rounds) < LEAST_ROUNDS,
            "spread": max(found.relative, (found.high - found.low) / 2 / found.median) > WIDE,
            "load": load is not None and load > MOST_LOAD,
        }
        named = tuple(doubt for doubt, there in doubts.items() if there)
        return cls(name, unit, found.median, found.low, found.high, found.relative, named)

    @classmethod
    def ratio(cls, name: str, over: Sequence[float], under: Sequence[float], load: float | None) -> Figure:
        """Round by round. The baseline is whichever of the two varies more, of a ratio that varies at all."""
        found = cls.of(name, "1", [a / b for a, b in zip(over, under, strict=False)], load)
        spread = max(Spread.of(over).relative, Spread.of(under).relative)
        swallowed = found.spread and spread > WIDE and spread >= max(found.value, 1 / found.value) - 1
        return replace(found, doubts=(*found.doubts, "baseline")) if swallowed else found


def figures(result: Result, others: dict[str, Result]) -> dict[str, Figure]:
    """Of a result, by name; ``others`` are those of the same case by contender."""
    found: list[Figure] = []
    if result.rounds:
        found.append(Figure.of("time", "s", result.rounds, result.load))
        rates = [result.bytes / seconds for seconds in result.rounds]
        found.append(Figure.of("bandwidth", "B/s", rates, result.load))
    for name, rounds in (("forward", result.forward), ("backward", result.backward)):
        found += [Figure.of(name, "s", rounds, result.load)] if rounds else []
    for name in ("copy", "eager", "compile"):
        if name != result.contender and name in others and result.rounds and others[name].rounds:
            found.append(Figure.ratio(f"{name}/it", others[name].rounds, result.rounds, result.load))
    single = {"first call": "s", "memory": "B", "launches": "n", "synchronizations": "n"}
    costs = zip(single.items(), result.costs(), strict=True)
    found += [Figure(name, unit, value) for (name, unit), value in costs if value is not None]
    return {figure.name: figure for figure in found}


def of_overhead(entry: Overhead, scale: Overhead | None) -> dict[str, Figure]:
    """Of a host overhead, as ratios to forward and backward together of ``scale``."""
    parts = {"host forward": entry.forward, "host backward": entry.backward, "host both": entry.both()}
    return {
        name: Figure.ratio(name, rounds, scale.both(), entry.load)
        for name, rounds in parts.items()
        if rounds and scale is not None
    }


def explain(text: str) -> str:
    """The line below a table or a plot: what the marks in it mean. Empty where there are none."""
    there = set("".join(re.findall(rf"(?<=\S){MARK}(\w+)", text)))
    found = ", ".join(f"{doubt[0]}: {words}" for doubt, words in DOUBTS.items() if doubt[0] in there)
    return f"{MARK} worthless; {found}" if found else ""
