"""What can be wrong with a call: one change of one argument. Whether it is wrong then, the contract says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from . import others
from .draw import LAYOUTS, WRAPPERS, Draw
from .rules import LOSSES
from .signatures import POSITIONAL, known_arguments
from .specs import Call, Histogram, Lit, Spec, Tens
from .values import COUNTS, DIVERGENCES, DTYPES, FLAGS, GROUPS, HISTOGRAMS, NUMBERS, OBJECTS, PAIRS, REFUSED, WORDS

_TENSORS = {
    "x",
    "teacher",
    "fake",
    "teacher_uncond",
    "x_t",
    "out",
    "logits",
    "t",
    "mask",
    "pred",
    "real_logits",
    "fake_logits",
}
_NUMBERS = {"eps", "logit_clip", "guidance_scale", "weight", "alpha", "sigma", "min_t", "max_t", "ema_rate", "max_norm"}
_WORDS = {"normalizer", "normalize", "nonfinite", "reduction", "prediction"}
_TABLES = {
    "ratio_clip": PAIRS,
    "divergence": DIVERGENCES,
    "histogram": HISTOGRAMS,
    "group": GROUPS,
    "return_stats": FLAGS,
}
_TABLES |= {"bins": COUNTS, **dict.fromkeys(_NUMBERS, NUMBERS), **dict.fromkeys(_WORDS, WORDS)}


def _changed_shape(draw: Draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape, close by."""
    sizes = list(shape)
    kind = draw.rng.random()
    place = draw.rng.randrange(len(sizes)) if sizes else 0
    if not sizes or kind < 0.2:
        sizes.insert(place, draw.pick((1, 1, 2)))
    elif kind < 0.4:
        del sizes[place]
    elif kind < 0.6:
        sizes[place] += draw.pick((1, -1)) if sizes[place] > 1 else 1
    elif kind < 0.75:
        sizes[place] = 1
    elif kind < 0.85:
        sizes = []
    elif kind < 0.95:
        sizes.reverse()
    else:
        sizes[place] = 0
    return tuple(sizes)


def tensor(draw: Draw, name: str, spec: Spec | None, call: Call) -> Spec:
    """Another value of a tensor argument."""
    now = spec if isinstance(spec, Tens) else Tens(dtype="bool" if name == "mask" else "float32", seed=draw.seed())
    kind = draw.rng.random()
    if kind < 0.25:
        return Lit(draw.pick(OBJECTS))
    if kind < 0.45:
        return replace(now, dtype=draw.pick(DTYPES), layout="", wrap="", grad=False)
    if kind < 0.65:
        return replace(now, shape=_changed_shape(draw, now.sizes(call.shape)), grad=False, layout="")
    if kind < 0.9:
        return replace(now, wrap=draw.pick(REFUSED if draw.chance(0.7) else WRAPPERS), grad=False, layout="")
    if name == "out":
        return _out(draw, now, call)
    return replace(now, puts=((0, draw.pick((float("nan"), float("inf")))),), layout=draw.pick(LAYOUTS[:9]))


def _out(draw: Draw, now: Tens, call: Call) -> Spec:
    if draw.chance(0.3):
        return replace(
            now, layout=draw.pick(("expanded", "inner_expanded", "one_value", "windows", "no_memory", "negated"))
        )
    if draw.chance(0.2):
        return replace(now, grad=True)
    other = draw.pick(("x", "teacher", "fake"))
    where = draw.pick(("storage_offset() - 1", "storage_offset() + 1", "storage_offset()"))
    strides = draw.pick(("stride()", "stride()", "stride()[::-1]"))
    return Lit(f"{other}.detach().as_strided(x.shape, {other}.{strides}, {other}.{where})", f"a view of {other}")


def histogram(draw: Draw, call: Call) -> Call:
    """Another histogram, or another state of it set later."""
    now = call.arguments.get("histogram")
    if not isinstance(now, Histogram) or draw.chance(0.3):
        return _with(call, "histogram", Lit(draw.pick(HISTOGRAMS)))
    attribute = draw.pick(("ema_rate", "ema_rate", "min_t", "max_t", "bins", "bins", "load"))
    value: Lit | Tens
    if attribute in ("bins", "load"):
        shape = draw.pick(((4,), (2, 2), (0,), (5,), ()))
        value = Tens(shape, draw.pick(("float32", "int64", "complex64", "float64", "bool")), draw.seed(), 0.1, 3.0)
        value = replace(value, wrap=draw.pick(("", "", "on_meta", "sparse", "two", "sub")))
        if draw.chance(0.3):
            value = Lit(draw.pick(("None", "[1.0]", "3", "'ones'", "Anything()", "torch.ones(4).requires_grad_()")))
    else:
        value = Lit(draw.pick((*NUMBERS, "5", "1.1", "0.5", "2.0", "1e6", "-1e6", "0")))
    return replace(call, setup=((attribute, value),))


def _with(call: Call, name: str, spec: Spec) -> Call:
    """With that argument, in the place where it is."""
    given = dict(call.arguments) | {name: spec}
    settings = call.settings
    if call.target.startswith("FDistillLoss") and name in (
        "divergence",
        "histogram",
        "logit_clip",
        "ratio_clip",
        "eps",
    ):
        settings = (*settings, name) if name not in settings else settings
    if call.target == "FDistillLoss.weights" and name not in ("logits", "t") and name not in settings:
        settings = (*settings, name)
    setup = () if name == "histogram" and not isinstance(spec, Histogram) else call.setup
    return replace(call, arguments=given, settings=settings, setup=setup)


def _without(call: Call, name: str) -> Call:
    given = {key: spec for key, spec in call.arguments.items() if key != name}
    place = list(call.arguments).index(name)
    positional = min(call.positional, place)
    setup = () if name == "histogram" else call.setup
    settings = tuple(setting for setting in call.settings if setting != name)
    return replace(call, arguments=given, positional=positional, setup=setup, settings=settings)


def mutate(draw: Draw, call: Call) -> Call:
    """One change."""
    names = list(call.arguments)
    kind = draw.rng.random()
    if kind < 0.03 and call.settings == ():
        extra = draw.pick(("colour=3", "1.0", "Weight=1.0", "divergenc='js'"))
        if extra == "1.0" and (call.positional < len(POSITIONAL[call.target]) or call.target not in LOSSES):
            extra = "colour=3"
        return replace(call, extra=extra)
    if kind < 0.1 and names:
        return _without(call, draw.pick(names))
    name = draw.pick(known_arguments(call.target) if draw.chance(0.6) or not names else names)
    spec = call.arguments.get(name)
    if name == "histogram" and call.target != "RatioHistogram":
        return histogram(draw, call)
    if name in _TENSORS:
        return _with(call, name, tensor(draw, name, spec, call))
    by_tensor = isinstance(spec, Tens) or (name in ("weight", "normalizer", "guidance_scale") and draw.chance(0.3))
    if by_tensor and draw.chance(0.6) and call.target != "RatioHistogram":
        now = spec if isinstance(spec, Tens) else Tens(1, "float32", draw.seed(), 0.5, 2.0)
        return _with(call, name, tensor(draw, name, now, call))
    table: Sequence[str] = _TABLES[name]
    return _with(call, name, Lit(draw.pick(table)))


# --------------------------------------------------------------------------------------- the functions without samples

_OFTEN = {"get_divergence": 4.0, "set_backend": 2.0, "use_backend": 3.0, "register_divergence": 3.0, "LossStats": 1.0}
_OFTEN |= {"Divergence": 3.0, "warmup": 0.8, "crossed": 0.1}
_LINES: dict[str, tuple[str, ...]] = {
    "use_backend": (
        "with fd.use_backend(name):",
        "    inside = fd.backends.choose(torch.device('cpu'))",
    ),
    "crossed": ("result = crossed(first, second)",),
    "LossStats": ("result = fd.LossStats(vector)", "fields = result.to_dict()", "text = repr(result)"),
}


def other(draw: Draw, level: str) -> Call:
    """A call of a function without samples."""
    target = draw.rng.choices(list(_OFTEN), list(_OFTEN.values()))[0]
    if target == "Divergence":
        return _method(draw)
    given: dict[str, Spec] = {}
    good, bad = others.GOOD[target], others.BAD.get(target, {})
    for name, values in good.items():
        if name in ("name", "first", "second", "shapes", "vector") or draw.chance(0.25):
            given[name] = Lit(draw.pick(values))
    if target == "register_divergence":
        given.pop("f" if draw.chance(0.97) else "h", None)
        given.setdefault("h", Lit(draw.pick(good["h"]))) if "f" not in given else given.pop("h", None)
    if target == "get_divergence" and "a" in given and draw.chance(0.8):
        given["name"] = Lit("'alpha'")
    for _ in range({"legal": 0, "one": 1}.get(level, 2)):
        tables = bad if draw.chance(0.85) else others.DOUBTFUL.get(target, bad)
        if tables:
            name = draw.pick(list(tables))
            given[name] = Lit(draw.pick(tables[name]))
            if target == "register_divergence" and name == "f" and draw.chance(0.9):
                given.pop("h", None)
            if target == "get_divergence" and name == "a":
                given["name"] = Lit("'alpha'")
    lines = _LINES.get(target, ())
    return Call(target, arguments=given, lines=lines, level=level)


def _method(draw: Draw) -> Call:
    name = draw.pick(("js", "rkl", "kl", "sf", "sh", "jf", "neyman", "pearson", "alpha:0.3", "alpha:-1.5", "alpha:1"))
    method = draw.pick(("h", "h", "log_h", "h_from_log", "f"))
    low, high = (1e-4, 30.0) if method in ("h", "f") else (-12.0, 12.0)
    r: Spec = Tens(
        draw.pick(((), (3,), (2, 5), (0,))),
        draw.pick(("float32", "float64", "float16", "bfloat16")),
        draw.seed(),
        low,
        high,
    )
    if draw.chance(0.3):
        r = draw.number(max(low, -5.0), 5.0)
    elif isinstance(r, Tens):
        r = draw.laid(r, 10)
        if r.wrap in WRAPPERS:
            r = replace(r, wrap="")
    lines = (f"result = fd.get_divergence(name).{method}(r)",)
    return Call("Divergence", arguments={"name": Lit(repr(name)), "r": r}, lines=lines)
