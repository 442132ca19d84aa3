"""The cases under pytest-benchmark, on warm caches: ``pytest bench``. Results are checked; nothing about time is
asserted."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from fdistill_ops.bench.cases import Case, shape_of
from fdistill_ops.bench.clock import synchronize
from fdistill_ops.bench.measure import Contender, Measurement, Plan, serving
from fdistill_ops.bench.ops import OPS

import fdistill_ops as fd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTENDERS = [*serving(DEVICE), "eager", "copy"]


@functools.cache
def measurement(op: str) -> tuple[Measurement, dict[str, Contender]]:
    """On one shape, and those of its contenders whose results are right."""
    name, shape = shape_of("cifar10")
    case = Case(op, shape, name, OPS[op].modes()[-1], device=DEVICE, threads=torch.get_num_threads(), warm=True)
    made = Measurement(case, Plan(contenders=frozenset(CONTENDERS)))
    return made, {contender.name: contender for contender in made.checked()}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("op", OPS)
def test_speed(benchmark: Any, op: str, contender: str) -> None:
    made, right = measurement(op)
    if contender not in made.results:
        pytest.skip(f"{op} has no kernels: it is the reference on every back end")
    assert contender in right, made.results[contender].error
    benchmark.group = f"{op}, {made.case.mode}, {made.case.name}"

    def call() -> None:
        right[contender].step(0)
        synchronize(DEVICE)

    with fd.use_backend(right[contender].backend):
        benchmark(call)
