"""Records with rounds that are made up, and plans that measure next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from fdistill_ops.bench import measure
from fdistill_ops.bench.cases import SHAPES, Case, batch_sweep, size_sweep
from fdistill_ops.bench.measure import Plan
from fdistill_ops.bench.record import Record, Result

import fdistill_ops as fd

SHAPE = (6, 3, 8, 10)
BRIEF = Plan(rounds=2, seconds=0.0, compile=False, costs=False)
STEADY = [1.0, 1.01, 0.99, 1.0, 1.0, 1.0, 1.01]
fused = pytest.mark.skipif("cpu" not in fd.available_backends(), reason="the compiled module is not built")


@pytest.fixture(autouse=True)
def few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that no cache holds are for measuring."""
    monkeypatch.setattr(measure, "_MOST_SETS", 3)


def by_name(results: Sequence[Result]) -> dict[str, Result]:
    return {result.contender: result for result in results}


def scaled(factor: float, rounds: list[float] | None = None) -> list[float]:
    return [factor * value for value in rounds or STEADY]


def record_of(times: dict[str, list[float]], case: Case | None = None, load: float = 0.5, **errors: str) -> Record:
    kinds = {"cpu": "fused", "cuda": "fused"}
    case = case or Case("f_distill", SHAPES["cifar10"], "cifar10")
    results = [
        Result(case, name, kinds.get(name, name), 4000, rounds, load=load, error=errors.get(name))
        for name, rounds in times.items()
    ]
    machine: dict[str, Any] = {"processor": "a", "cores": 4, "cache_bytes": 1024}
    return Record(
        machine,
        {"torch": "2.x", "python": "3.y", "isa": "avx"},
        results,
        started="2026-01-31T00:00:00+00:00",
        commit="abc",
    )


def example() -> Record:
    record = record_of({"cpu": [1e-3] * 9, "eager": [4e-3] * 9, "compile": [2e-3] * 9, "copy": [5e-4] * 9})
    record.results[0].forward, record.results[0].backward = [7e-4] * 9, [3e-4] * 9
    record.results[2].first_call = 7.5
    for name, shape in size_sweep(1 << 20, 4).items():
        times = {"cpu": [1e-4] * 9, "eager": [4e-4] * 9, "copy": [5e-5] * 9}
        record.results += record_of(times, Case("f_distill", shape, name)).results
    for name, shape in batch_sweep(1 << 20, 4).items():
        record.results += record_of({"cpu": [1e-4] * 9, "eager": []}, Case("f_distill", shape, name)).results
    return record
