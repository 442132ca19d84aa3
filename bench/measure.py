"""Times the contenders of a case beside each other, round by round, after checking what they return."""

from __future__ import annotations

import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops import backends
from fdistill_ops.trainer.files import reason
from fdistill_ops.trainer.interruption import Interrupted, handled

from . import check, cost
from .cases import Case
from .clock import Step, cache_bytes, load_average, seconds_per_call, synchronize
from .ops import OPS, Call, Inputs, make_inputs, model_bytes
from .record import Result

_LOSS_SCALE = 32768.0  # without one the published formulas lose float16 gradients to underflow
_MOST_SETS = 64


@dataclass
class Plan:
    """How much is measured. ``seconds`` is what a contender takes in one round; ``contenders`` names those wanted, None
    for all; ``reference`` says whether it is timed where there are kernels too, ``costs`` whether memory, launches and
    synchronisations are counted. No round of a case begins after so many seconds of ``patience``."""

    rounds: int = 15
    seconds: float = 0.01
    contenders: frozenset[str] | None = None
    compile: bool = True
    reference: bool = True
    costs: bool = True
    patience: float = math.inf

    def wants(self, name: str) -> bool:
        return self.contenders is None or name in self.contenders


@dataclass
class Contender:
    """``step(i)`` is one call on set i: ``forward(i)``, and ``backward`` of its value where there is one.
    ``results(i)`` does it too and returns what came out."""

    name: str
    kind: str
    forward: Step
    results: Callable[[int], list[Tensor]]
    backend: str | None = None
    backward: Callable[[Any], object] | None = None

    def step(self, i: int) -> Any:
        value = self.forward(i)
        if self.backward is not None:
            self.backward(value)
        return value


def serving(device: str) -> list[str]:
    """The back ends for tensors of a device. Triton's interpreter, which serves a CPU, is not one to time."""
    found = []
    for name in fd.available_backends():
        if name == "triton" and torch.device(device).type == "cpu":
            continue
        try:
            with fd.use_backend(name):
                backends.choose(torch.device(device))
        except RuntimeError:
            continue
        found.append(name)
    return found


def measure(case: Case, plan: Plan) -> list[Result]:
    """A result for every contender, those that are wrong or do not run without a time; a single one of kind "failed"
    where the case itself cannot be measured, for instance for want of memory. Where it was interrupted in its rounds,
    those so far: go_on_unless_interrupted() says so."""
    with _undisturbed(case.threads):
        try:
            return Measurement(case, plan).run()
        except Exception as error:  # what was measured before is not lost to it
            go_on_unless_interrupted()
            return [Result(case, "-", "failed", model_bytes(case), error=_in_words(error))]


_noted: list[int] = []


def _interrupt(number: int, frame: FrameType | None) -> None:
    _noted.append(number)
    raise Interrupted(number)


def go_on_unless_interrupted() -> None:
    if _noted:
        raise Interrupted(_noted[0])


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM end a measurement, also where a compiler makes an error of its own of it."""
    try:
        with handled(_interrupt):
            yield
    finally:
        _noted.clear()


def _in_words(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {reason(error)}"


class Measurement:
    """Of one case: its inputs, and a result for every contender."""

    def __init__(self, case: Case, plan: Plan) -> None:
        self.case, self.plan = case, plan
        self.op = OPS[case.op]
        self.sets = _input_sets(case)
        self.upstream = _upstream(case, self.sets[0]) if case.mode != "forward" else None
        self.wanted: dict[int, list[Tensor]] = {}
        self.results: dict[str, Result] = {}

    def run(self) -> list[Result]:
        contenders = self.checked()
        costly = [contender for contender in contenders if contender.kind != "copy"]
        if self.plan.costs and costly:
            self.add_costs(costly)
        self.time(contenders)
        return [result for result in self.results.values() if result.rounds or result.error]

    def checked(self) -> list[Contender]:
        """Those whose results are right. ``results`` has an entry for each, and for those that are wrong."""
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder):
            right = [contender for contender in self.contenders() if self.is_right(contender)]
        self.wanted.clear()
        if self.plan.wants("copy"):
            right.append(self.copies())
            self.results["copy"] = Result(self.case, "copy", "copy", model_bytes(self.case))
        return right

    # ------------------------------------------------------------------------------------------------------ contenders

    def contenders(self) -> Iterator[Contender]:
        ours = [self.op.ours(self.case, inputs) for inputs in self.sets]
        names = serving(self.case.device) if self.op.fused else ["reference"]
        if len(names) > 1 and not self.plan.reference:
            names.remove("reference")
        for name in names:
            kind = "reference" if name == "reference" else "fused"
            if self.plan.wants(name):
                yield self.contender(name, kind, ours, name)
            if kind == "fused" and torch.device(self.case.device).type == "cuda" and self.plan.wants(f"{name} graph"):
                yield self.graphs(name, ours)
        eager = [self.op.eager(self.case, inputs) for inputs in self.sets]
        if self.plan.wants("eager"):
            yield self.contender("eager", "eager", eager)
        if self.plan.compile and self.plan.wants("compile"):
            torch.compiler.reset()
            compiled = torch.compile(eager[0].func, dynamic=False)
            calls = [partial(compiled, *call.args, **call.keywords) for call in eager]
            yield self.contender("compile", "compile", calls)

    def contender(self, name: str, kind: str, calls: Sequence[Call], backend: str | None = None) -> Contender:
        leaves, upstream = self.leaves, self.upstream
        differentiated = self.case.mode != "forward"

        def forward(i: int) -> Tensor:
            for leaf in leaves[i]:
                leaf.grad = None
            return calls[i]()

        def backward(value: Tensor) -> None:
            value.backward(upstream)

        def results(i: int) -> list[Tensor]:
            value = made.step(i).detach()
            return [value, *(leaf.grad for leaf in leaves[i] if differentiated and leaf.grad is not None)]

        made = Contender(name, kind, forward, results, backend, backward if differentiated else None)
        return made

    def graphs(self, backend: str, calls: Sequence[Call]) -> Contender:
        """The steps as CUDA graphs: captured when results or step are first asked for."""
        plain = self.contender(f"{backend} graph", "fused", calls, backend)
        captured: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

        def capture(i: int) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
            if i not in captured:
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    plain.step(i)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    results = plain.results(i)
                captured[i] = (graph, results)
            return captured[i]

        def step(i: int) -> None:
            capture(i)[0].replay()

        def results(i: int) -> list[Tensor]:
            step(i)
            return capture(i)[1]

        return Contender(plain.name, plain.kind, step, results, backend)

    def copies(self) -> Contender:
        """Half of the bytes read and half of them written, like the operation, by PyTorch's own copy."""
        elements = max(1, model_bytes(self.case) // 8)
        pairs = [torch.ones(2, elements, device=self.case.device) for _ in self.sets]

        def step(i: int) -> None:
            pairs[i][0].copy_(pairs[i][1])

        return Contender("copy", "copy", step, lambda i: [])

    @property
    def leaves(self) -> list[list[Tensor]]:
        return [[inputs[name] for name in self.op.leaves] for inputs in self.sets]

    def release(self) -> None:
        for leaves in self.leaves:
            for leaf in leaves:
                leaf.grad = None

    # ------------------------------------------------------------------------------------------------- what they cost

    def is_right(self, contender: Contender) -> bool:
        """Runs it on every set, times the first call, and compares what it returns with the reference."""
        result = Result(self.case, contender.name, contender.kind, model_bytes(self.case))
        self.results[contender.name] = result
        tolerance = check.tolerance(self.case, contender.kind in ("fused", "reference"))
        for i in range(len(self.sets)):
            self.expected(i)  # what is wrong with that is not the contender's fault
        try:
            with fd.use_backend(contender.backend):
                synchronize(self.case.device)
                start = time.perf_counter()
                contender.step(0)
                synchronize(self.case.device)
                result.first_call = time.perf_counter() - start
                for i in range(len(self.sets)):
                    result.error = check.difference(self.unscaled(contender.results(i)), self.expected(i), tolerance)
                    if result.error is not None:
                        result.error = f"wrong result: {result.error}"
                        break
        except Exception as error:  # whatever a compiler or a back end raises: the others are timed all the same
            result.error = _in_words(error)
        go_on_unless_interrupted()
        self.release()
        return result.error is None

    def unscaled(self, results: list[Tensor]) -> list[Tensor]:
        if self.upstream is None or self.upstream.ndim > 0:
            return results
        return [results[0], *(gradient.double() / self.upstream.double() for gradient in results[1:])]

    def expected(self, i: int) -> list[Tensor]:
        if i not in self.wanted:
            self.wanted[i] = check.expected(self.case, self.sets[i])
        return self.wanted[i]

    def add_costs(self, contenders: Sequence[Contender]) -> None:
        def step(contender: Contender) -> None:
            with fd.use_backend(contender.backend):
                contender.step(0)

        steps = [partial(step, contender) for contender in contenders]
        for contender, bytes_ in zip(contenders, cost.extra_memory(steps, self.release, self.case.device), strict=True):
            self.results[contender.name].extra_memory = bytes_
        if torch.device(self.case.device).type == "cuda":
            for contender, call in zip(contenders, steps, strict=True):
                self.results[contender.name].launches = cost.launches(call)
                self.results[contender.name].synchronizations = cost.host_synchronizations(call)

    def time(self, contenders: Sequence[Contender]) -> None:
        """An interruption keeps the rounds so far."""
        load, begun = load_average(), time.monotonic()
        with suppress(Interrupted):
            once = {contender.name: self.seconds(contender, self.rotation(0, 3))[0] for contender in contenders}
            calls = {name: max(1, min(1000, round(self.plan.seconds / seconds))) for name, seconds in once.items()}
            for turn in range(self.plan.rounds):
                if turn > 0 and time.monotonic() - begun > self.plan.patience:
                    break
                shift = turn % len(contenders) if contenders else 0  # nobody always runs after the same one
                for contender in (*contenders[shift:], *contenders[:shift]):
                    seconds, forward = self.seconds(contender, self.rotation(turn, calls[contender.name]))
                    self.results[contender.name].add(seconds, forward)
        load = load_average(load)
        for contender in contenders:
            self.results[contender.name].load = load

    def seconds(self, contender: Contender, rotation: Sequence[int]) -> tuple[float, float | None]:
        """Of a call, and of forward in it. The gradients of whoever ran before go first, or they would be freed at this
        one's expense; then every set has its turn untimed, so that each is as long ago as the rotation is long. A
        single set takes some twenty calls to settle in the caches, and gets as many as are timed."""
        self.release()
        settle = rotation if len(self.sets) == 1 else self.rotation(rotation[0], len(self.sets))
        with fd.use_backend(contender.backend):
            return seconds_per_call(contender.forward, contender.backward, settle, rotation, self.case.device)

    def rotation(self, start: int, calls: int) -> list[int]:
        return [(start + i) % len(self.sets) for i in range(calls)]


def _input_sets(case: Case) -> list[Inputs]:
    """As many as make the caches useless, or one for a warm case."""
    first = make_inputs(case, 0)
    if case.warm:
        return [first]
    bytes_ = sum(tensor.numel() * tensor.itemsize for tensor in first.values())
    count = max(2, min(_MOST_SETS, -(-4 * cache_bytes(case.device) // bytes_)))
    return [first, *(make_inputs(case, seed) for seed in range(1, count))]


def _upstream(case: Case, inputs: Inputs) -> Tensor | None:
    """The incoming gradient: None for 1."""
    if case.op == "to_x0":
        return torch.ones_like(inputs["x"], requires_grad=False)
    if case.torch_dtype is torch.float16:
        return torch.tensor(_LOSS_SCALE, device=case.device)
    return None


@contextmanager
def _undisturbed(threads: int) -> Iterator[None]:
    """With so many threads, and without the garbage collector going through all that was there before: where that is
    much it takes a tenth of a second, in some round of somebody."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    gc.freeze()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        gc.collect()
        gc.unfreeze()
        fd.empty_cache()
