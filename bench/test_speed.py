"""The cases under pytest-benchmark, on warm caches: ``pytest bench``. Results are checked; nothing about time is
asserted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fdistill_ops.bench.cases import Case, shape_of
from fdistill_ops.bench.clock import synchronize
from fdistill_ops.bench.measure import Measurement, Plan, serving
from fdistill_ops.bench.ops import OPS

import fdistill_ops as fd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTENDERS = [*serving(DEVICE), "eager", "copy"]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("op", OPS)
def test_speed(benchmark: Any, op: str, contender: str) -> None:
    name, shape = shape_of("cifar10")
    case = Case(op, shape, name, OPS[op].modes()[-1], device=DEVICE, threads=torch.get_num_threads(), warm=True)
    measurement = Measurement(case, Plan(contenders=frozenset({contender})))
    checked = measurement.checked()
    if contender not in measurement.results:
        pytest.skip(f"{op} has no kernels: it is the reference on every back end")
    assert checked, measurement.results[contender].error
    benchmark.group = f"{op}, {case.mode}, {name}"

    def call() -> None:
        checked[0].step(0)
        synchronize(DEVICE)

    with fd.use_backend(checked[0].backend):
        benchmark(call)
