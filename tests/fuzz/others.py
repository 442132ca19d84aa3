"""The functions without samples: divergences, back ends, warmup, statistics; and the simple ones, of one formula.

Their arguments come from tables, which say what is wrong with each value that is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

import fdistill_ops as fd
from fdistill_ops import _oracle as oracle
from fdistill_ops import divergences

from .compare import Array, Problems, numbers_of
from .contract import Verdict, as_number, is_tensor
from .expected import computed_in, rows
from .expected_weights import unit
from .rules import divergence_of, prediction_of
from .specs import Call, Lit, after_lines, differentiated

GOOD: dict[str, dict[str, tuple[str, ...]]] = {
    "get_divergence": {
        "name": ("'js'", "'Alpha:0.3'", "' kl '", "'jensen-shannon'", "'alpha'", "fd.get_divergence('sh')"),
        "a": ("None", "0.3", "np.float32(2)", "-1", "0", "1"),
    },
    "register_divergence": {
        "name": ("'fuzzed'", "'My Own-one'", "StrSubclass('fuzzed')"),
        "f": ("'r*log(r)'", "'(r - 1)**2'", "'-log(r)'"),
        "h": ("lambda r: r", "torch.sqrt", "torch.ones_like", "lambda r: 2 * r**2"),
        "aliases": ("()", "('fz',)", "['fz', 'f z z']", "iter(('fz',))"),
        "overwrite": ("True", "False"),
    },
    "set_backend": {"name": ("None", "'reference'", "'cpu'")},
    "use_backend": {"name": ("None", "'reference'", "'cpu'")},
    "crossed": {"first": ("'reference'", "'cpu'"), "second": ("'cpu'", "'reference'", "None")},
    "warmup": {
        "shapes": (
            "[(2, 3)]",
            "[(1,)]",
            "[(0, 2)]",
            "()",
            "[torch.Size([2, 3])]",
            "[[2, 3], (4, 1, 2)]",
            "iter([(2, 3)])",
        ),
        "dtypes": ("[torch.float32]", "(torch.bfloat16, torch.float16)", "[torch.float64]", "()"),
        "device": ("None", "'cpu'", "torch.device('cpu')"),
        "divergence": ("'kl'", "'alpha:0.3'", "fd.get_divergence('js')"),
        "heads": ("1", "3"),
        "bins": ("None", "5", "1"),
        "normalize": ("None", "'mean'"),
        "guidance": ("True", "False"),
        "mask": ("True", "False"),
        "prediction": ("'x0'", "'v'", "'score'"),
        "normalizer": ("None", "'mean_abs'"),
        "reduction": ("'sum'", "'sample'", "'none'"),
        "nonfinite": ("'zero'",),
        "return_stats": ("True", "False"),
    },
    "LossStats": {"vector": ("torch.arange(14.0)", "torch.arange(14.0, dtype=torch.float64)", "torch.ones(28)[::2]")},
}
_NO_TEXT = ("3", "None", "b'js'", "BadEqual()", "['js']", "np.array(['js', 'kl'])")
_NO_BACKEND = tuple(text for text in _NO_TEXT if text != "None")
BAD: dict[str, dict[str, tuple[str, ...]]] = {
    "get_divergence": {
        "name": ("'jss'", "''", "'alpha:x'", "'alpha:inf'", "'alpha:1e400'", "'alpha:'", *_NO_TEXT, "0.5", "True"),
        "a": ("inf", "nan", "'0.5'", "10**400", "True", "[0.5]", "1j", "BadFloat()", "Anything()", "-10**400"),
    },
    "register_divergence": {
        "name": ("'js'", "''", "'  '", "'alpha:0.3'", "'Jensen-Shannon'", "'alpha'", *_NO_TEXT),
        "f": ("'r*log('", "'q*r'", "'gamma(r)'", "''", "'-r*log(r)'", "'1/(r - 1)'", "Anything()", "'[r]'"),
        "h": (
            *("lambda r: -r", "lambda r: r * nan", "lambda r: r[:3]", "lambda r: 1.0", "lambda r: None", "3", "'r'"),
            *("lambda r: 1 / 0", "lambda r: {}[0]", "lambda r: r + 1j", "lambda r: r.to('meta')", "lambda: 1"),
            *("lambda r: r.to_sparse()", "lambda r: r.log()", "BadClass()", "True"),
        ),
        "aliases": ("(1,)", "('js',)", "None", "3", "(None,)", "('alpha:1',)", "('fz', 2.5)", "(b'fz',)"),
    },
    "set_backend": {
        "name": ("'gpu'", "''", "'CPU'", "'cuda'", "True", "nan", "('cpu',)", "torch.ones(2)", *_NO_BACKEND)
    },
    "use_backend": {
        "name": ("'gpu'", "''", "'CPU'", "'cuda'", "True", "nan", "('cpu',)", "torch.ones(2)", *_NO_BACKEND)
    },
    "warmup": {
        "shapes": (
            *(
                "None",
                "3",
                "[()]",
                "[3]",
                "[(2, -1)]",
                "[(2, 1.5)]",
                "'ab'",
                "[('a',)]",
                "(2, 3)",
                "[None]",
            ),
            *("Anything()", "[(2, 3), None]", "[(2, 10**30)]"),
        ),
        "dtypes": (
            "None",
            "torch.float32",
            "[torch.int64]",
            "['float32']",
            "[torch.float8_e5m2]",
            "3",
            "[None]",
            "[[]]",
        ),
        "device": ("'gpu'", "Anything()", "'cuda:99'", "3.5", "[]", "''"),
        "divergence": ("'jss'", "3", "None"),
        "heads": ("0", "-1", "1.5", "True", "'2'", "None", "10**30"),
        "bins": ("0", "-1", "2.5", "True", "'x'", "10**30", "Anything()"),
        "normalize": ("'sum'", "True"),
        "prediction": ("'noise'", "None", "3"),
        "normalizer": ("'rms'", "2.0"),
        "reduction": ("'nothing'", "None"),
        "nonfinite": ("'ignore'", "True"),
    },
    "LossStats": {"vector": ("None", "3", "torch.zeros(13)", "torch.zeros(())", "[0.0] * 14", "torch.zeros(14, 1)")},
}
DOUBTFUL = {
    "get_divergence": {"a": ("Fraction(1, 3)", "torch.tensor(0.5)", "np.array(0.5)", "GoodFloat()", "Decimal('0.3')")},
    "register_divergence": {
        "aliases": ("'fz'", "('fz', 'fz')", "('fuzzed',)"),
        "h": ("lambda r: r.float()",),
        "f": ("3",),
    },
    "set_backend": {"name": ("StrSubclass('reference')",)},
    "warmup": {"shapes": ("[(2, True)]", "[(2, np.int64(3))]"), "bins": ("torch.ones(3)",), "mask": ("1",)},
}
TARGETS = (*GOOD, "Divergence")
# Other words by which a refusal may name an argument.
_ALSO = {
    "name": ("divergence", "a"),
    "f": ("h",),
    "h": ("f",),
    "aliases": ("name",),
    "dtypes": ("dtype",),
    "a": ("divergence",),
}
_WORD_OF = {"'cuda'": "cuda", "'cuda:99'": "cuda"}
_SLOPES = {"'r*log(r)'": lambda r: r, "'(r - 1)**2'": lambda r: 2 * r**2, "'-log(r)'": np.ones_like}
_SLOPES |= {"lambda r: r": lambda r: r, "torch.sqrt": np.sqrt, "torch.ones_like": np.ones_like}
_SLOPES |= {"lambda r: 2 * r**2": lambda r: 2 * r**2}


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """The registry of divergences as before, afterwards."""
    tables = (divergences._registry, divergences._aliases)
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, content in zip(tables, before, strict=True):
            if table != content:
                table.clear()
                table.update(content)  # type: ignore[arg-type]


def judge(call: Call, given: Mapping[str, Any]) -> Verdict:
    """By the tables, and what goes together."""
    verdict, texts = Verdict(), {name: spec.text for name, spec in call.arguments.items() if isinstance(spec, Lit)}
    for name, text in texts.items():
        if text in BAD.get(call.target, {}).get(name, ()):
            verdict.fault(" ".join((name, *_ALSO.get(name, ()))), f"is {text}")
            verdict.wrong |= {_WORD_OF[text]} if text in _WORD_OF else set()
        elif text in DOUBTFUL.get(call.target, {}).get(name, ()):
            verdict.doubt(name)
    if call.target == "register_divergence":
        if (texts.get("f", "None") == "None") == (texts.get("h", "None") == "None"):
            verdict.fault("f h", "is given together with h, or neither")
        if "name" not in texts:
            verdict.fault("name", "is not given")
    elif call.target == "get_divergence":
        a = texts.get("a", "None")
        known = divergence_of(given.get("name"))
        spelled = type(given.get("name")) is str and ":" in given["name"]
        if "name" not in texts:
            verdict.fault("name", "is not given")
        elif a != "None" and known is not None and (known[0] != "alpha" or spelled):
            verdict.fault("a", "has no use")
    elif call.target == "warmup" and "shapes" not in texts:
        verdict.fault("shapes", "is not given")
    return verdict


# ------------------------------------------------------------------------------------------------------------- results


def check(call: Call, given: Mapping[str, Any], names: Mapping[str, Any], backend: str, problems: Problems) -> None:
    result = names.get("result")
    if call.target == "get_divergence":
        _check_divergence(given, result, problems)
    elif call.target == "Divergence":
        _check_method(call, given, names, problems)
    elif call.target == "register_divergence":
        _check_registered(call, given, result, problems)
    elif call.target == "set_backend":
        chosen = given["name"]
        problems.same(
            fd.backends.choose(torch.device("cpu")), chosen or "cpu", "fd.backends.choose(torch.device('cpu'))"
        )
    elif call.target == "use_backend":
        problems.same(names["inside"], given["name"] or "cpu", "inside")
        problems.same(fd.backends.choose(torch.device("cpu")), backend, "fd.backends.choose(torch.device('cpu'))")
    elif call.target == "crossed":
        for place, name in enumerate(("first", "second")):
            problems.same(result[place], [given[name] or "cpu"] * 2, f"result[{place}]")
        problems.same(fd.backends.choose(torch.device("cpu")), backend, "fd.backends.choose(torch.device('cpu'))")
    elif call.target == "warmup":
        problems.same(result, None, "result")
    elif call.target == "LossStats":
        vector = given["vector"]
        problems.same(list(names["fields"].values()), vector.tolist(), "list(fields.values())")
        problems.same(float(result.nonfinite), float(vector[13]), "float(result.nonfinite)")


def _check_divergence(given: Mapping[str, Any], result: Any, problems: Problems) -> None:
    known = divergence_of(given["name"])
    assert known is not None
    problems.same(result.name, known[0], "result.name")
    if known[0] == "alpha":
        a = known[1] if given.get("a") is None else as_number(given["a"])[0]
        problems.same(result.a, a, "result.a")
    else:
        problems.same(result.a, None, "result.a")


def _check_method(call: Call, given: Mapping[str, Any], names: Mapping[str, Any], problems: Problems) -> None:
    """h, log h and h(exp l), elementwise."""
    method = call.lines[0].split(").")[1].split("(")[0]
    name, a = divergence_of(given["name"]) or ("js", 0.5)
    value = given["r"]
    dtype = value.dtype if is_tensor(value) else torch.float64
    shape = tuple(value.shape) if is_tensor(value) else ()
    points = numbers_of(value) if is_tensor(value) else np.asarray([value], dtype=np.float64)
    found = problems.tensor(names["result"], "result", shape, dtype)
    if found is None or method == "f" or points is None:
        return
    with np.errstate(all="ignore"):
        log_r = np.log(points) if method == "h" else points
    want = np.asarray([oracle.h_from_log(name, float(v), a) if math.isfinite(v) else math.nan for v in log_r])
    sure = np.isfinite(log_r) & (np.abs(log_r) < 30)
    noise = torch.finfo(dtype).eps * (8 + 4 * np.abs(log_r)) * np.abs(want)
    if method == "log_h":
        with np.errstate(all="ignore"):
            want = np.log(want)
        noise = torch.finfo(dtype).eps * (8 + 8 * np.abs(log_r) + 8 * np.abs(want))
    problems.close(found, want, noise, "result", dtype, 1.0, sure & np.isfinite(want))


def _check_registered(call: Call, given: Mapping[str, Any], result: Any, problems: Problems) -> None:
    problems.same(fd.get_divergence(given["name"]) is result, True, "fd.get_divergence(name) is result")
    texts = {name: spec.text for name, spec in call.arguments.items() if isinstance(spec, Lit)}
    slope = _SLOPES.get(texts.get("f", "None"), _SLOPES.get(texts.get("h", "None")))
    if slope is None:
        return
    r = np.asarray([0.2, 1.0, 3.0])
    problems.close(numbers_of(result.h(torch.from_numpy(r))), slope(r), 1e-12, "result.h", torch.float64)
    logits = torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64)
    weights = fd.f_weights(logits, divergence=given["name"], normalize=None)
    problems.close(numbers_of(weights), slope(np.exp(logits.numpy())), 1e-12, "weights", torch.float64)


def check_histogram(given: Mapping[str, Any], result: Any, problems: Problems) -> None:
    for name, default in (("min_t", None), ("max_t", None), ("ema_rate", 0.9)):
        number = as_number(given.get(name, default))[0]
        problems.same(float(getattr(result, name)), number, f"result.{name}")
    bins = given.get("bins", 10)
    if is_tensor(bins):
        problems.same(result.bins.data_ptr() == bins.data_ptr(), True, "result.bins.data_ptr() == bins.data_ptr()")
    else:
        problems.same(result.bins.tolist(), [1.0] * int(bins), "result.bins.tolist()")


# --------------------------------------------------------------------------------------------- functions of one formula


def _softplus(value: Array) -> Array:
    return np.maximum(value, 0.0) + np.log1p(np.exp(-np.abs(value)))


def check_simple(
    call: Call, given: Mapping[str, Any], before: Mapping[str, Array], names: dict[str, Any], problems: Problems
) -> None:
    (_check_x0 if call.target == "to_x0" else _check_gan)(call, given, before, names, problems)


def _gradients(call: Call, names: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """What backward gives, by argument."""
    if not call.after.kind or call.grad_mode or problems.found or not differentiated(call):
        return {}
    try:
        exec("\n".join(after_lines(call)), names)
    except Exception as error:
        problems.add("backward", f"backward raises {type(error).__name__}: {error}")
        return {}
    return dict(zip(differentiated(call), names["gradients"], strict=True))


def _check_gan(
    call: Call, given: Mapping[str, Any], before: Mapping[str, Array], names: dict[str, Any], problems: Problems
) -> None:
    dtype, total, noise = computed_in(*given.values()), 0.0, 0.0
    with np.errstate(all="ignore"):
        for name, value in before.items():
            terms = _softplus(value if name == "fake_logits" else -value)
            mean = float(terms.sum()) / max(terms.size, 1)
            kind = computed_in(given[name])
            smallest = 0.0 if kind is torch.float64 else 1e-37  # below which they may be 0
            total += mean
            noise += (oracle.growth(terms.size) + 16) * unit(kind) * mean + smallest
    found = problems.tensor(names["result"], "result", (), dtype)
    problems.close(found, np.asarray(total), noise, "result", dtype, 1.0, math.isfinite(total))
    for name, gradient in _gradients(call, names, problems).items():
        sign = 1.0 if name == "fake_logits" else -1.0
        value = before[name]
        with np.errstate(all="ignore"):
            want = sign / (1 + np.exp(-sign * value)) / max(value.size, 1)
        leaf = given[name]
        got = problems.tensor(gradient, f"gradient of {name}", tuple(leaf.shape), leaf.dtype)
        allowed = 16 * unit(computed_in(leaf)) * np.abs(want) + 1e-37
        problems.close(got, want, allowed, f"gradient of {name}", leaf.dtype, 1.0, np.isfinite(value))


def _check_x0(
    call: Call, given: Mapping[str, Any], before: Mapping[str, Array], names: dict[str, Any], problems: Problems
) -> None:
    pred, prediction = given["pred"], prediction_of(given)
    shape = tuple(pred.shape)
    rest = shape if shape else (1,)
    coefficients = {name: rows(given[name], before.get(name), rest) for name in ("alpha", "sigma")}
    flat = (rest[0], math.prod(rest[1:]))
    dtype = computed_in(pred, given["x_t"])
    with np.errstate(all="ignore"):
        want, noise = oracle.to_x0(
            before["pred"].reshape(flat),
            before["x_t"].reshape(flat),
            prediction=prediction,
            u=unit(dtype),
            **coefficients,
        )
        sure = np.abs(want) < 1e37
        for name in ("pred", "x_t"):
            sure &= (np.abs(before[name].reshape(flat)) > 1e-30) | (before[name].reshape(flat) == 0)
        if prediction == "x0":
            sure = np.ones_like(sure, dtype=bool)
    if dtype is torch.float64 and pred.dtype in (torch.float16, torch.bfloat16):  # PyTorch rounds by way of float32
        noise = noise + unit(torch.float32) * np.abs(want)
    found = problems.tensor(names["result"], "result", shape, pred.dtype)
    problems.close(found, want, noise + 1e-37, "result", pred.dtype, 0.5, sure.reshape(-1))
    if prediction == "x0" or call.after.kind != "grad":
        return
    a, c = oracle.x0_coefficients(prediction, coefficients["alpha"], coefficients["sigma"])
    for name, gradient in _gradients(call, names, problems).items():
        leaf = given[name]
        slope = np.broadcast_to(np.asarray(a if name == "x_t" else c, dtype=np.float64), flat)
        got = problems.tensor(gradient, f"gradient of {name}", shape, leaf.dtype)
        allowed = 4 * unit(dtype) * np.abs(slope) + 1e-37
        problems.close(got, slope, allowed, f"gradient of {name}", leaf.dtype, 0.5)
