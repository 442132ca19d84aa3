"""What a comparison has found: does the paper's claim hold on a data set?

Each divergence is compared with reverse KL by a paired, one-sided t-test over the seeds (runs of one seed share the
data, the teacher and the random numbers), for the claim and for its opposite; the p-values of one claim on one data set
are corrected by Holm's method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import fdistill_ops as fd

REFERENCE = "reverse_kl"
LEVEL = 0.05

Result = dict[str, Any]  # of one run: "data", "seed", "divergence", and numbers by name


def canonical(divergence: str) -> str:
    return fd.get_divergence(divergence).name


def less_mode_seeking(divergence: str) -> bool:
    """Whether it weighs samples by more where the student has too few of them: h grows with r = p/q."""
    low, high = (fd.get_divergence(divergence).h(r) for r in (0.1, 10.0))
    return bool(high > low)


class Claim(NamedTuple):
    """That ``metric`` is higher (sign 1) or lower (-1) than reverse KL's, for the divergences it is about."""

    text: str
    metric: str
    sign: int
    about: Callable[[str], bool]


CLAIMS = (
    Claim("loses fewer modes than reverse KL", "modes_lost", -1, less_mode_seeking),
    Claim("has a higher recall than reverse KL", "recall", 1, less_mode_seeking),
    Claim(
        "has a higher gradient variance than reverse KL",
        "gradient_variance_common",
        1,
        lambda divergence: canonical(divergence) in ("forward_kl", "jeffreys"),
    ),
)


@dataclass(frozen=True)
class Finding:
    """What became of a claim.

    Attributes:
        verdict: "reproduced", "contradicted", "not significant" or "not tested".
        p: corrected, of the claim, or of its opposite where that is contradicted; None where there is no test.
        means: of the metric, the divergence's and reverse KL's; None where not tested.
        reason: why it could not be tested.
    """

    data: str
    divergence: str
    claim: str
    seeds: int
    verdict: str
    p: float | None = None
    means: tuple[float, float] | None = None
    reason: str = ""

    @property
    def sentence(self) -> str:
        start = f"{self.data}: {self.divergence} {self.claim}: {self.verdict}"
        if self.means is None:
            return f"{start} ({self.reason})."
        numbers = f"{self.means[0]:.3g} against {self.means[1]:.3g}"
        if self.verdict == "not significant":
            difference = f"difference {self.means[0] - self.means[1]:+.2g}"
            p = self.reason if self.p is None else f"p = {self.p:.2g}"
            return f"{start} with {self.seeds} seeds ({numbers}, {difference}, {p})."
        return f"{start} (p = {self.p:.2g}, {numbers}, {self.seeds} seeds)."


class OneSided(NamedTuple):
    """One-sided p-values of "higher" and of "lower"."""

    higher: float
    lower: float


def paired_test(values: Sequence[float], reference: Sequence[float]) -> OneSided | str:
    """The t-test of pairs; a reason where there is none."""
    if len(values) < 2:
        return "one seed is no sample" if values else "no seed has both"
    if not all(map(math.isfinite, [*values, *reference])):
        return "values are missing or not finite"
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    if max(differences) == min(differences):
        return f"the difference is {differences[0]:+.2g} in every seed"
    from scipy.stats import ttest_rel

    higher, lower = (float(ttest_rel(values, reference, alternative=side).pvalue) for side in ("greater", "less"))
    return OneSided(higher, lower)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for the number of tests (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def findings(results: Sequence[Result]) -> list[Finding]:
    """Every claim on every data set whose results have the metric."""
    found: list[Finding] = []
    for data in dict.fromkeys(result["data"] for result in results):
        here = [result for result in results if result["data"] == data]
        for claim in CLAIMS:
            if any(claim.metric in result for result in here):
                found += _judged(data, claim, here)
    return found


def _judged(data: str, claim: Claim, results: list[Result]) -> list[Finding]:
    names = list(dict.fromkeys(result["divergence"] for result in results))
    metrics = {
        name: {
            result["seed"]: math.nan if result.get(claim.metric) is None else float(result[claim.metric])
            for result in results
            if result["divergence"] == name
        }
        for name in names
    }
    reference = next((metrics[name] for name in names if canonical(name) == REFERENCE), None)
    about = [name for name in names if canonical(name) != REFERENCE and claim.about(name)]
    if reference is None:
        reason = f"{REFERENCE} is not among the divergences"
        return [Finding(data, name, claim.text, 0, "not tested", reason=reason) for name in about]
    pairs = {}
    for name in about:
        seeds = sorted(metrics[name].keys() & reference.keys())
        pairs[name] = [metrics[name][seed] for seed in seeds], [reference[seed] for seed in seeds]
    tests = {name: paired_test(*pair) for name, pair in pairs.items()}
    tested = {name: test for name, test in tests.items() if isinstance(test, OneSided)}
    higher = dict(zip(tested, holm([test.higher for test in tested.values()]), strict=True))
    lower = dict(zip(tested, holm([test.lower for test in tested.values()]), strict=True))
    for_claim, against = (higher, lower) if claim.sign > 0 else (lower, higher)
    found = []
    for name, (values, others) in pairs.items():
        count, test = len(values), tests[name]
        if isinstance(test, str):
            same = bool(values) and values == others and count > 1
            verdict = "not significant" if same else "not tested"
            means = (_mean(values), _mean(others)) if same else None
            found.append(Finding(data, name, claim.text, count, verdict, means=means, reason=test))
            continue
        verdict, p = "not significant", for_claim[name]
        if p < LEVEL:
            verdict = "reproduced"
        elif against[name] < LEVEL:
            verdict, p = "contradicted", against[name]
        found.append(Finding(data, name, claim.text, count, verdict, p, (_mean(values), _mean(others))))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
