"""Host overhead: what a call takes on tensors so small that nothing else takes time.

Microseconds say more about the machine than about the code. So the figure is a ratio to PyTorch's ``mse_loss``, forward
and backward, which takes turns with everything else in the same process (see figures.of_overhead).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

import fdistill_ops as fd
from fdistill_ops.trainer.interruption import Interrupted

from .cases import Case
from .clock import load_average, synchronize
from .measure import serving
from .ops import OPS, make_inputs
from .record import SCALE, Overhead

_SHAPE = (4, 8)


def measure_overhead(device: str, rounds: int, calls: int = 200) -> list[Overhead]:
    """Every operation on every back end that has kernels for it, and SCALE; each forward with the graph for backward,
    and backward by itself. After an interruption: the rounds so far."""
    subjects, load = list(_subjects(device)), load_average()
    found = [Overhead(op, contender, device, [], []) for op, contender, *_ in subjects]
    with suppress(Interrupted):
        for turn in range(rounds + 1):
            for entry, (_, _, backend, call, leaves) in zip(found, subjects, strict=True):
                with fd.use_backend(backend):
                    forward, backward = _seconds(call, leaves, device, calls)
                if turn == 0:  # the first is not counted
                    continue
                entry.forward.append(float(f"{forward:.5g}"))
                if leaves:
                    entry.backward.append(float(f"{backward:.5g}"))
    load = load_average(load)
    return [replace(entry, load=load) for entry in found if entry.forward]


def _subjects(device: str) -> Iterator[tuple[str, str, str | None, Callable[[], Tensor], list[Tensor]]]:
    for op in OPS:
        inputs = make_inputs(Case(op, _SHAPE, device=device), 0)
        leaves = [inputs[name] for name in OPS[op].leaves]
        call = OPS[op].ours(Case(op, _SHAPE, device=device), inputs)
        for backend in serving(device) if OPS[op].fused else ["reference"]:
            if backend != "reference" or not OPS[op].fused:
                yield op, backend, backend, call, leaves
    x, y = torch.randn(2, *_SHAPE, device=device)
    x.requires_grad_()
    yield SCALE, "torch", None, lambda: mse_loss(x, y), [x]


def _seconds(call: Callable[[], Tensor], leaves: list[Tensor], device: str, calls: int) -> tuple[float, float]:
    synchronize(device)
    start = time.perf_counter()
    values = [call() for _ in range(calls)]
    forward = time.perf_counter() - start
    synchronize(device)
    if not leaves:
        return forward / calls, 0.0
    ones = torch.ones_like(values[0]) if values[0].ndim else None
    start = time.perf_counter()
    for value in values:
        value.backward(ones)
        for leaf in leaves:
            leaf.grad = None
    return forward / calls, (time.perf_counter() - start) / calls
