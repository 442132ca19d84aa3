"""A call as a record, and the record as source text: what runs is what a script that reproduces it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import operands

ALL = -1
"""As a shape: that of x."""

_CONVERTED = {"uint8", "uint16", "uint32", "uint64"}
_ZEROS_ALONE = ("uint1", "uint4", "int4", "bits8", "float4_e2m1fn_x2", "quint8")


_WRITTEN = {"float64": torch.float64, "float32": torch.float32}
_WRITTEN |= {"float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64, "int32": torch.int32}


def _shortest(values: torch.Tensor) -> str:
    """Nested lists of numbers with no more digits than tell a float32 from its neighbours."""
    if values.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return repr(_as_lists(values.float().numpy()))
    return repr(values.tolist())


def _as_lists(array: np.ndarray) -> Any:
    if array.ndim == 0:
        value = float(array)
        return float(str(array)) if math.isfinite(value) else value
    return [_as_lists(part) for part in array]


@dataclass(frozen=True, slots=True)
class Tens:
    """A tensor. ``shape``: sizes, where None stands for the call's size in that place, counted from the last; or how
    many leading dimensions of the call's shape (ALL: every one)."""

    shape: tuple[int | None, ...] | int = ALL
    dtype: str = "float32"
    seed: int = 0
    low: float | None = None  # uniform from low to high; None: normal times high
    high: float = 1.0
    puts: tuple[tuple[int, float], ...] = ()
    layout: str = ""
    wrap: str = ""
    grad: bool = False
    leaf: bool = True
    digits: int | None = None  # after the point

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(self.shape, tuple):
            whole = (1,) * (len(self.shape) - len(shape)) + shape[max(len(shape) - len(self.shape), 0) :]
            return tuple(w if size is None else size for size, w in zip(self.shape, whole, strict=True))
        return shape if self.shape == ALL else shape[: self.shape]

    def source(self, shape: tuple[int, ...], explicit: bool) -> str:
        sizes = self.sizes(shape)
        text = self._values(sizes, explicit)
        for function in (self.layout, self.wrap):
            if function:
                text = f"{function}({text})"
        if self.grad:
            text += ".requires_grad_()" if self.leaf else ".requires_grad_().mul(1.0)"
        return text

    def _values(self, sizes: tuple[int, ...], explicit: bool) -> str:
        if self.dtype in _ZEROS_ALONE:
            return f"torch.empty({sizes}, dtype=torch.{self.dtype})"
        if self.low is None:
            text = f"numbers({sizes}, {self.seed}{'' if self.high == 1 else f', {self.high!r}'})"
        else:
            text = f"uniform({sizes}, {self.seed}, {self.low!r}, {self.high!r})"
        if self.digits is not None:
            text += f".round(decimals={self.digits})"
        count = math.prod(sizes)
        puts = {index: value for index, value in self.puts if index < count}
        if puts:
            text = f"put({text}, {puts})"
        if explicit and count <= 24:
            return self._explicit(eval(text, namespace()), sizes)
        if self.dtype == "bool":
            return f"({text} > 0)"
        if self.dtype in _CONVERTED:
            text += ".abs()"
        return text if self.dtype == "float64" else f"{text}.to(torch.{self.dtype})"

    def _explicit(self, values: Any, sizes: tuple[int, ...]) -> str:
        """The values written out, as the dtype holds them."""
        if self.dtype == "bool":
            values = values > 0
        elif self.dtype in _WRITTEN:
            values = values.to(_WRITTEN[self.dtype])
        else:
            conversion = f"{'.abs()' if self.dtype in _CONVERTED else ''}.to(torch.{self.dtype})"
            return f"torch.tensor({values.tolist()}, dtype=torch.float64).reshape({sizes}){conversion}"
        nested = (0 < len(sizes) < 6 and values.numel()) or not sizes
        text = f"torch.tensor({_shortest(values if nested else values.reshape(-1))}, dtype=torch.{self.dtype})"
        return text if nested else f"{text}.reshape({sizes})"

    def features(self, name: str) -> set[str]:
        found = {f"{name} {part}" for part in (self.layout, self.wrap) if part}
        if self.dtype != ("bool" if name == "mask" else "float32"):
            found.add(f"{name} {self.dtype}")
        if isinstance(self.shape, tuple) and None in self.shape:
            found.add(f"{name} broadcast")
        elif isinstance(self.shape, tuple) and name not in ("logits", "t", "r", "real_logits", "fake_logits"):
            found.add(f"{name} has a shape of its own")
        found |= {f"{name} non-finite" for _, value in self.puts if not math.isfinite(value)}
        return found


@dataclass(frozen=True, slots=True)
class Lit:
    """An expression. ``label``: what kind of value it is, for telling findings apart."""

    text: str
    label: str = ""

    def source(self, shape: tuple[int, ...], explicit: bool) -> str:
        return self.text

    def features(self, name: str) -> set[str]:
        return {f"{name} {self.label or self.text}"}


@dataclass(frozen=True, slots=True)
class Histogram:
    """A RatioHistogram: its arguments, what its buffer holds, its mode."""

    min_t: str = "0.0"
    max_t: str = "1.0"
    bins: int = 4
    ema_rate: str = "0.0"
    stored: Tens | None = None
    dtype: str = "float32"
    training: bool = True

    def source(self, shape: tuple[int, ...], explicit: bool) -> str:
        bins = self.bins if self.stored is None else self.stored.source(shape, explicit)
        text = f"fd.RatioHistogram({self.min_t}, {self.max_t}, {bins}, {self.ema_rate})"
        text += "" if self.dtype == "float32" else f".to(torch.{self.dtype})"
        return text if self.training else f"{text}.eval()"

    def features(self, name: str) -> set[str]:
        found = {name} | ({f"{name} {self.dtype}"} if self.dtype != "float32" else set())
        return found | (set() if self.stored is None else self.stored.features("bins"))


Spec = Tens | Lit | Histogram


@dataclass(frozen=True, slots=True)
class After:
    """What is done with a loss. ``upstream``: an expression of the incoming gradient."""

    kind: str = ""
    upstream: str = ""


@dataclass(frozen=True)
class Call:
    """One call.

    ``positional``: how many arguments are given without their names. ``settings``: those that go to the constructor of
    a module. ``setup``: attributes of the histogram that are set before the call, and what to ("load" for its state).
    ``extra``: text added to the arguments. ``lines``: the call itself, where it is none of a function by its name.
    """

    target: str
    space: str = "fd"
    backend: str | None = None
    shape: tuple[int, ...] = ()
    arguments: Mapping[str, Spec] = field(default_factory=dict)
    positional: int = 0
    settings: tuple[str, ...] = ()
    setup: tuple[tuple[str, Lit | Tens], ...] = ()
    extra: str = ""
    grad_mode: str = ""
    threads: int = 1
    poison: bool = False
    after: After = After()
    level: str = "legal"
    lines: tuple[str, ...] = ()

    def features(self) -> set[str]:
        """What is not as plain as it could be: two findings with the same features are one."""
        roles = {
            name: "operand" for name in ("teacher", "fake", "teacher_uncond", "x_t", "weight", "sigma", "normalizer")
        }
        roles |= {name: "operand" for name in ("guidance_scale", "mask", "alpha", "logits", "t")}
        tensors = {name for name, spec in self.arguments.items() if isinstance(spec, Tens)}
        found: set[str] = set().union(
            *(
                spec.features(roles.get(name, name) if name in tensors and name != "mask" else name)
                for name, spec in self.arguments.items()
            )
        )
        found |= {f"{attribute} set to {value.features('')}" for attribute, value in self.setup}
        found |= {self.extra, self.grad_mode, self.after.kind}
        found |= {"upstream " + self.after.upstream.partition("(")[0]} if self.after.upstream else set()
        found |= {"more than 64 dimensions"} if len(self.shape) > 64 else set()
        found |= {f"{self.threads} threads"} if self.threads > 1 else set()
        return found - {""}


# --------------------------------------------------------------------------------------------------------- source text

_GIVEN_FIRST = ("x", "teacher", "fake", "logits", "t", "pred", "x_t", "real_logits", "fake_logits")


def operand_lines(call: Call, explicit: bool = False) -> list[tuple[str, str]]:
    """Names and the expressions that make them, in order: those that speak of others come last."""
    lines = [(name, spec.source(call.shape, explicit)) for name, spec in call.arguments.items()]
    return sorted(lines, key=lambda line: isinstance(call.arguments[line[0]], Lit))


def arguments_text(call: Call, names: list[str]) -> str:
    parts = [name if i < call.positional else f"{name}={name}" for i, name in enumerate(names)]
    if call.extra:
        parts.insert(len(parts) if "=" in call.extra else call.positional, call.extra)
    return ", ".join(parts)


def wants_stats(call: Call) -> bool:
    spec = call.arguments.get("return_stats") if call.target != "warmup" else None
    return isinstance(spec, Lit) and spec.text == "True"


def call_lines(call: Call) -> list[str]:
    """The call, which leaves ``result``, or ``loss`` and ``stats``."""
    if call.lines:
        return list(call.lines)
    names = list(call.arguments)
    result = "loss, stats" if wants_stats(call) else "result"
    if call.target.startswith("FDistillLoss"):
        method = call.target.removeprefix("FDistillLoss")
        given = ", ".join(f"{name}={name}" for name in names if name in call.settings)
        rest = arguments_text(call, [name for name in names if name not in call.settings])
        lines = [f"module = fd.FDistillLoss({given})", f"{result} = module{method}({rest})"]
    elif call.target == "RatioHistogram":
        lines = [f"result = fd.RatioHistogram({arguments_text(call, names)})"]
    else:
        lines = [f"{result} = {call.space}.{call.target}({arguments_text(call, names)})"]
    return [*setup_lines(call), *lines]


def setup_lines(call: Call, explicit: bool = False) -> list[str]:
    lines = []
    for attribute, value in call.setup:
        text = value.source(call.shape, explicit)
        load = f"histogram.load_state_dict({{'bins': {text}}})"
        lines.append(load if attribute == "load" else f"histogram.{attribute} = {text}")
    return lines


def in_context(call: Call, lines: list[str]) -> list[str]:
    contexts = []
    if call.grad_mode:
        contexts.append({"no_grad": "torch.no_grad()", "inference": "torch.inference_mode()"}[call.grad_mode])
    if call.poison:
        contexts.append("fd.testing.poison()")
    if not contexts:
        return lines
    return [f"with {', '.join(contexts)}:", *(f"    {line}" for line in lines)]


def differentiated(call: Call) -> list[str]:
    """The arguments that the loss is differentiable in and that require a gradient."""
    names = ("x", "teacher", "fake") if call.target == "score_identity_loss" else ("x",)
    names = {"to_x0": ("pred", "x_t"), "gan_generator_loss": ("logits",)}.get(call.target, names)
    names = ("real_logits", "fake_logits") if call.target == "gan_discriminator_loss" else names
    given = {name: call.arguments.get(name) for name in names}
    return [name for name, spec in given.items() if isinstance(spec, Tens) and spec.grad]


_HOOKS = {
    "hook on x": "{x}.register_hook(fail)",
    "hook on the loss": "loss.register_hook(fail)",
    "hook before": "loss.grad_fn.register_prehook(fail)",
    "hook after": "loss.grad_fn.register_hook(fail)",
}


def after_lines(call: Call) -> list[str]:
    """Backward. Leaves ``gradients`` (of :func:`differentiated`), and what else the kind is about."""
    kind, names = call.after.kind, differentiated(call)
    if not kind:
        return []
    lines = [] if wants_stats(call) else ["loss = result"]
    inputs = ", ".join(names)
    lines.append(f"upstream = {call.after.upstream or 'torch.ones_like(loss)'}")
    grad = f"torch.autograd.grad(loss, [{inputs}], upstream%s)"
    if kind == "grad":
        lines.append("gradients = " + grad % "")
    elif kind == "backward":
        lines += ["loss.backward(upstream)", f"gradients = [{', '.join(f'{name}.grad' for name in names)}]"]
    elif kind == "twice":
        lines += ["first = " + grad % ", retain_graph=True", "kept = [gradient.clone() for gradient in first]"]
        lines += [
            "attempt(lambda: [gradient.fill_(nan) for gradient in first])",
            "gradients = " + grad % "",
            "first = kept",
        ]
    elif kind == "freed":
        lines += ["first = " + grad % "", "gradients = [gradient.clone() for gradient in first]"]
        lines += ["refused = attempt(lambda: " + grad % "" + ")"]
    elif kind == "unused":
        others = [name for name in call.arguments if name not in names and _gets_no_gradient(call, name)]
        lines.append(f"others = [{', '.join(others)}]")
        lines.append(
            f"found = torch.autograd.grad(loss, [{inputs}, *others], upstream, allow_unused=True)\n"
            f"gradients, unused = found[:{len(names)}], found[{len(names)}:]"
        )
    elif kind == "create_graph":
        lines.append("gradients = " + grad % ", create_graph=True")
        lines.append("refused = attempt(lambda: sum(g.sum() for g in gradients).backward())")
    elif kind in _HOOKS:
        lines += ["def fail(*_):", "    raise KeyError('hook')", f"hook = {_HOOKS[kind].format(x=names[0])}"]
        lines += ["failed = attempt(lambda: " + grad % "" + ")", "hook.remove()", "gradients = []"]
        lines.append("again = attempt(lambda: gradients.extend(" + grad % "" + "))")
    else:
        raise KeyError(kind)
    return lines


def _gets_no_gradient(call: Call, name: str) -> bool:
    spec = call.arguments[name]
    return isinstance(spec, Tens) and spec.grad


def namespace() -> dict[str, Any]:
    """The names that the source text may use."""
    global _names
    if not _names:
        from decimal import Decimal
        from fractions import Fraction

        import fdistill_ops as fd

        own = {name: value for name, value in vars(operands).items() if not name.startswith("_")}
        _names = own | {"torch": torch, "fd": fd, "np": np, "Decimal": Decimal, "Fraction": Fraction}
        _names |= {"inf": math.inf, "nan": math.nan}
    return dict(_names)


_names: dict[str, Any] = {}
