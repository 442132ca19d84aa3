"""The smallest call with the same fault."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from .execute import Outcome
from .operands import HOSTILE
from .specs import After, Call, Histogram, Lit, Tens

MOST_SECONDS = 20.0


def fault_of(outcome: Outcome) -> tuple[str, ...]:
    """What makes two findings the same, but for the calls themselves."""
    problem = outcome.problems[0]
    raised = outcome.raised.partition(":")[0]
    if problem.kind == "accepted":
        return ("accepted", *sorted(outcome.why))
    if problem.kind == "type" and any(text in outcome.raised for text in HOSTILE):
        return ("type", outcome.raised)
    if problem.kind in ("type", "unnamed", "refused"):
        words = re.sub(r"\d+|\(.*", "", outcome.raised.partition(":")[2]).split()
        return (problem.kind, raised, outcome.place, *words[:4])
    if problem.kind in ("crash", "hang"):
        return (problem.kind, problem.what)
    if problem.kind == "value":
        return ("value", problem.expression.partition("[")[0].partition("(")[0])
    return (problem.kind, " ".join(problem.what.split()[:4]))


def shrink(call: Call, first_same: Callable[[list[Call]], int | None]) -> Call:
    """Tries simpler calls until none has the fault. ``first_same``: the place of the first one that has it."""
    until = time.monotonic() + MOST_SECONDS
    while time.monotonic() < until:
        simpler = [candidate for candidate in simplifications(call) if candidate != call]
        place = first_same(simpler)
        if place is None:
            break
        call = simpler[place]
    return call


def simplifications(call: Call) -> Iterator[Call]:
    """Calls that are simpler by one thing, the largest steps first."""
    plain = {
        "grad_mode": "",
        "threads": 1,
        "poison": False,
        "after": After(),
        "extra": "",
        "setup": (),
        "backend": None,
    }
    for name, value in plain.items():
        if getattr(call, name) != value and not (name == "backend" and call.backend not in ("cpu", None)):
            yield replace(call, **{name: value})
    if call.space != "fd":
        yield replace(call, space="fd")
    yield from _with_fewer_arguments(call)
    if call.target in ("f_distill_loss", "FDistillLoss") and call.settings == ():
        given = {name: spec for name, spec in call.arguments.items() if name in _MATCHING}
        yield replace(call, target="distribution_matching_loss", arguments=given)
    if call.target == "f_score_difference":
        given = {name: spec for name, spec in call.arguments.items() if name in _MATCHING or name == "out"}
        yield replace(call, target="score_difference", arguments=given)
    if call.target == "FDistillLoss":
        yield replace(call, target="f_distill_loss", settings=())
    if call.target == "FDistillLoss.weights":
        yield replace(call, target="f_weights", settings=())
    yield from _of_smaller_shape(call)
    for name, spec in call.arguments.items():
        for simpler in _simpler_values(spec):
            yield replace(call, arguments=dict(call.arguments) | {name: simpler})
    if call.after.kind not in ("", "grad"):
        yield replace(call, after=replace(call.after, kind="grad"))
    if call.after.upstream:
        yield replace(call, after=replace(call.after, upstream=""))


_REQUIRED = {
    "x",
    "teacher",
    "fake",
    "logits",
    "pred",
    "x_t",
    "real_logits",
    "fake_logits",
    "min_t",
    "max_t",
    "name",
    "r",
}
_OF_THE_BATCH = ("logits", "t", "real_logits", "fake_logits")
_MATCHING = {"x", "teacher", "fake", "teacher_uncond", "guidance_scale", "mask", "prediction", "x_t", "alpha", "sigma"}
_MATCHING |= {"weight", "max_norm", "normalizer", "eps", "nonfinite", "reduction", "return_stats"}


def _with_fewer_arguments(call: Call) -> Iterator[Call]:
    together = (("teacher_uncond", "guidance_scale"), ("prediction", "x_t", "alpha", "sigma"), ("t", "histogram"))
    names = list(call.arguments)
    sets = [group for group in together if set(group) <= set(names)]
    sets += [(name,) for name in names if name not in _REQUIRED or (name == "x_t" and call.target != "to_x0")]
    for group in sets:
        given = {name: spec for name, spec in call.arguments.items() if name not in group}
        place = min(names.index(name) for name in group)
        settings = tuple(name for name in call.settings if name not in group)
        setup = () if "histogram" in group else call.setup
        positional = min(call.positional, place)
        yield replace(call, arguments=given, positional=positional, settings=settings, setup=setup)


def _of_smaller_shape(call: Call) -> Iterator[Call]:
    """Fewer dimensions, then smaller ones. Operands of a shape of their own keep it, but where it is the batch."""
    shape = call.shape
    candidates = [shape[:half] for half in (2, len(shape) // 2, len(shape) - 1) if 0 < half < len(shape)]
    candidates += [shape[:d] + shape[d + 1 :] for d in range(len(shape)) if len(shape) > 1][:8]
    for d, size in enumerate(shape[:10]):
        candidates += [
            (*shape[:d], smaller, *shape[d + 1 :]) for smaller in (1, 2, size // 2, size - 1) if 0 < smaller < size
        ]
    for smaller in dict.fromkeys(candidates):
        given = dict(call.arguments)
        for name, spec in given.items():
            if not (isinstance(spec, Tens) and isinstance(spec.shape, tuple) and name in _OF_THE_BATCH):
                continue
            if spec.shape[:1] == shape[:1]:
                given[name] = replace(spec, shape=(smaller[0], *spec.shape[1:]))
        yield replace(call, shape=smaller, arguments=given)


def _simpler_values(spec: Tens | Lit | Histogram) -> Iterator[Tens | Lit | Histogram]:
    if isinstance(spec, Tens):
        plain = {"wrap": "", "layout": "", "puts": (), "grad": False, "leaf": True, "dtype": "float32"}
        for name, value in plain.items():
            if getattr(spec, name) != value and not (name == "dtype" and spec.dtype == "bool"):
                yield replace(spec, **{name: value})
        if isinstance(spec.shape, tuple) and len(spec.shape) > 1:
            yield replace(spec, shape=spec.shape[:1])
        if isinstance(spec.shape, tuple) and None in spec.shape:
            yield replace(spec, shape=spec.shape[1:])
            yield replace(spec, shape=1)
        if isinstance(spec.shape, tuple) and spec.shape and spec.shape[-1] not in (None, 0, 1):
            yield replace(spec, shape=(*spec.shape[:-1], 1))
        if spec.low is None and spec.high != 1.0:
            yield replace(spec, high=1.0)
        if spec.digits is None:
            yield replace(spec, digits=1)
    elif isinstance(spec, Histogram):
        plain_histogram = Histogram()
        for name in ("stored", "dtype", "training", "ema_rate", "min_t", "max_t", "bins"):
            if getattr(spec, name) != getattr(plain_histogram, name):
                yield replace(spec, **{name: getattr(plain_histogram, name)})
        if spec.stored is not None:
            for stored in _simpler_values(spec.stored):
                assert isinstance(stored, Tens)
                yield replace(spec, stored=stored)
