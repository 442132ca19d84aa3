"""A legal call of each function with samples or logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from .draw import FLOATS, PREDICTIONS, Draw
from .specs import Call, Lit, Spec, Tens

Maker = Callable[[Draw], Call]


def _reordered(given: dict[str, Spec], *first: str) -> dict[str, Spec]:
    return {name: given[name] for name in first if name in given} | given


def _max_norm(draw: Draw, given: dict[str, Spec]) -> None:
    if draw.chance(0.12):
        given["max_norm"] = draw.pick((draw.number(0.01, 3.0), Lit("1e-3"), Lit("1e6"), Lit("None")))


def matching(draw: Draw) -> Call:
    shape = draw.shape()
    given = draw.samples(shape)
    if draw.chance(0.35):
        given["weight"] = draw.rows(shape, 0.0, 3.0)
    draw.guidance(given, shape)
    draw.prediction(given, shape)
    draw.common(given, shape)
    _max_norm(draw, given)
    return Call("distribution_matching_loss", shape=shape, arguments=given)


def difference(draw: Draw) -> Call:
    f_weighted = draw.chance(0.3)
    call = f_distill(draw) if f_weighted else matching(draw)
    given = {name: spec for name, spec in call.arguments.items() if name not in ("reduction", "return_stats")}
    x = given["x"]
    assert isinstance(x, Tens)
    if draw.chance(0.5):
        plain = replace(x, grad=False)
        outs: list[Spec] = [draw.laid(Tens(dtype=x.dtype, seed=draw.seed()), math.prod(call.shape)) for _ in range(3)]
        out = draw.pick((*outs, Lit("x"), Lit("teacher"), Lit("fake"), Lit("None")))
        given["x"] = plain if draw.chance(0.9) else x
        for name in ("teacher", "fake"):
            of = given[name]
            if out == Lit(name) and isinstance(of, Tens):
                given[name] = replace(of, dtype=x.dtype)
        given["out"] = out
    return Call("f_score_difference" if f_weighted else "score_difference", shape=call.shape, arguments=given)


def identity(draw: Draw) -> Call:
    shape = draw.shape()
    given = draw.samples(shape)
    for name in ("teacher", "fake"):
        of = given[name]
        if isinstance(of, Tens) and draw.chance(0.5) and of.wrap != "made_in_inference":
            given[name] = replace(of, grad=True)
    if draw.chance(0.6):
        given["alpha"] = draw.number(-2.0, 2.0)
    if draw.chance(0.3):
        given["weight"] = draw.rows(shape, 0.0, 3.0)
    draw.common(given, shape)
    return Call("score_identity_loss", shape=shape, arguments=given)


def weights(draw: Draw) -> Call:
    batch = draw.pick((1, 2, 3, 5, 8, 17, 33)) if draw.chance(0.9) else draw.pick((0, 300, 1025))
    batch = min(batch, draw.limits.most)
    given: dict[str, Spec] = {"logits": draw.logits(batch)}
    draw.weight_options(given, batch)
    if draw.chance(0.3):
        given["eps"] = draw.eps()
    if draw.chance(0.3):
        given["nonfinite"] = Lit(draw.pick(("'zero'", "'propagate'")))
    return Call("f_weights", shape=(batch,), arguments=_reordered(given, "logits", "t"))


def f_distill(draw: Draw) -> Call:
    shape = draw.shape()
    given = draw.samples(shape)
    given["logits"] = draw.logits(shape[0])
    draw.weight_options(given, shape[0])
    if draw.chance(0.15):
        given["weight"] = draw.rows(shape, 0.0, 3.0)
    draw.guidance(given, shape)
    draw.prediction(given, shape)
    draw.common(given, shape)
    _max_norm(draw, given)
    return Call("f_distill_loss", shape=shape, arguments=_reordered(given, "x", "teacher", "fake", "logits", "t"))


_SETTINGS = (
    "divergence",
    "histogram",
    "logit_clip",
    "ratio_clip",
    "normalize",
    "normalizer",
    "eps",
    "nonfinite",
    "reduction",
)


def module(draw: Draw) -> Call:
    call = weights(draw) if draw.chance(0.3) else f_distill(draw)
    given = {name: spec for name, spec in call.arguments.items() if name != "group"}
    only_weights = call.target == "f_weights"
    settings = [name for name in given if name in _SETTINGS and (only_weights or draw.chance(0.7))]
    settings = [name for name in settings if not (name == "normalizer" and isinstance(given[name], Tens))]
    target = "FDistillLoss.weights" if only_weights else "FDistillLoss"
    return replace(call, target=target, arguments=given, settings=tuple(settings))


def gan(draw: Draw) -> Call:
    shape = draw.shape()
    target = draw.pick(("gan_generator_loss", "gan_discriminator_loss"))
    names = ("logits",) if target == "gan_generator_loss" else ("real_logits", "fake_logits")
    given: dict[str, Spec] = {}
    for name in names:
        size = () if draw.chance(0.05) else shape if draw.chance(0.5) else draw.shape()
        spec = Tens(size, draw.dtype(), draw.seed(), None, draw.pick((1.0, 10.0, 100.0)))
        given[name] = replace(draw.laid(spec, math.prod(size)), grad=draw.chance(0.5))
    for name, spec in given.items():
        if isinstance(spec, Tens) and spec.wrap == "made_in_inference":
            given[name] = replace(spec, wrap="")
    return Call(target, shape=shape, arguments=given)


def converted(draw: Draw) -> Call:
    shape = draw.shape()
    given: dict[str, Spec] = {"pred": draw.tensor(shape), "x_t": draw.tensor(shape)}
    for name, spec in given.items():
        if isinstance(spec, Tens) and draw.chance(0.5) and spec.wrap != "made_in_inference":
            given[name] = replace(spec, grad=True)
    given["prediction"] = Lit(draw.pick((*PREDICTIONS, "'x0'", "'sample'")))
    given["alpha"], given["sigma"] = draw.rows(shape, 0.25, 1.0), draw.rows(shape, 0.0625, 2.0)
    return Call("to_x0", shape=shape, arguments=given)


def histogram(draw: Draw) -> Call:
    given: dict[str, Spec] = {"min_t": draw.number(-3.0, 0.0), "max_t": draw.number(0.5, 100.0)}
    if draw.chance(0.6):
        sizes = (draw.pick((1, 3, 10)),)
        stored = Tens(sizes, draw.pick(FLOATS), draw.seed(), 0.1, 3.0)
        given["bins"] = draw.pick((Lit("1"), Lit("7"), Lit("1000"), stored))
    if draw.chance(0.6):
        given["ema_rate"] = draw.number(0.0, 1.0)
    return Call("RatioHistogram", arguments=given)


MAKERS: tuple[tuple[float, Maker], ...] = (
    (0.24, matching),
    (0.14, difference),
    (0.14, identity),
    (0.14, weights),
    (0.16, f_distill),
    (0.06, module),
    (0.03, gan),
    (0.04, converted),
    (0.02, histogram),
)
