"""f-divergences and their f-distill weighting functions.

For teacher density p and student density q, ``r = p/q``, the gradient of ``D_f(p || q) = E_q[f(r)]`` weighs the score
difference by ``h(r) = f''(r) r^2`` (f-distill, arXiv 2502.15681, Theorem 1). Kernels evaluate h from the log-ratio
``l = log r``, a discriminator's logit, so that nothing overflows where h itself does not.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ._validation import flag, number, real, same_device, shown

ScalarMap = Callable[[Tensor], Tensor]
_ALPHA_KIND = 8


class Divergence:
    """An f-divergence: its generator f and its f-distill weight h.

    Attributes:
        name: canonical name.
        a: the parameter of the alpha family, None for every other divergence.
        kind: the code the kernels know this divergence by, None for a registered one (its h is then evaluated in
            PyTorch on the B log-ratios).
    """

    __slots__ = ("_f", "_h", "_h_from_log", "_log_h", "a", "kind", "name")

    def __init__(
        self,
        name: str,
        f: ScalarMap | None,
        h: ScalarMap,
        log_h: ScalarMap,
        h_from_log: ScalarMap,
        *,
        kind: int | None = None,
        a: float | None = None,
    ) -> None:
        self.name, self.kind, self.a = name, kind, a
        self._f, self._h, self._log_h, self._h_from_log = f, h, log_h, h_from_log

    def f(self, r: Tensor | float) -> Tensor:
        """f(r), elementwise, in r's shape and dtype (float64 for a Python number). NotImplementedError where only h
        was registered."""
        if self._f is None:
            raise NotImplementedError(f"divergence {self.name!r} was registered by h alone: its f is not known")
        return self._f(_as_tensor(r))

    def h(self, r: Tensor | float) -> Tensor:
        """h(r) = f''(r) r^2, elementwise, in r's shape and dtype (float64 for a Python number)."""
        return self._h(_as_tensor(r))

    def log_h(self, log_r: Tensor | float) -> Tensor:
        """log h(exp(log_r)), elementwise, in log_r's shape and dtype (float64 for a Python number)."""
        return self._log_h(_as_tensor(log_r))

    def h_from_log(self, log_r: Tensor | float) -> Tensor:
        """h(exp(log_r)) without forming exp(log_r) where that would overflow and h does not."""
        return self._h_from_log(_as_tensor(log_r))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied by name: what was registered must be so again where it is read."""
        return get_divergence, (self.name, self.a)

    def __repr__(self) -> str:
        return f"Divergence({self.name!r}{'' if self.a is None else f', a={self.a:g}'})"


def _as_tensor(value: Tensor | float) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _alpha_f(r: Tensor, a: float) -> Tensor:
    """(r^a - a r - (1-a)) / (a (a-1)), written around whichever of a = 0 and a = 1 is nearer so that both limits
    (-log r + r - 1 and r log r - r + 1) are reached continuously."""
    log_r = r.log()
    if abs(a) < abs(a - 1):
        return ((torch.expm1(a * log_r) / a if a else log_r) - (r - 1)) / (a - 1)
    b = a - 1
    quotient = torch.expm1(b * log_r) / b if b else log_r
    return (torch.where(r == 0, 0 if b > -1 else torch.inf, r * quotient) - (r - 1)) / a


def _alpha(a: float) -> Divergence:
    return Divergence(
        "alpha",
        f=lambda r: _alpha_f(r, a),
        h=lambda r: r**a,
        log_h=lambda log_r: a * log_r,
        h_from_log=lambda log_r: torch.exp(a * log_r),
        kind=_ALPHA_KIND,
        a=a,
    )


_LOG2, _LOG4 = math.log(2.0), math.log(4.0)

# name: (aliases, divergence). The order is the kernels' (csrc/include/fdistill/divergence.h).
_TABLE: tuple[tuple[tuple[str, ...], Divergence], ...] = (
    (
        ("rkl", "reverse-kl"),
        Divergence(
            "reverse_kl",
            f=lambda r: -r.log(),
            h=torch.ones_like,
            log_h=torch.zeros_like,
            h_from_log=torch.ones_like,
            kind=0,
        ),
    ),
    (
        ("kl", "fkl", "forward-kl"),
        Divergence(
            "forward_kl",
            f=lambda r: torch.xlogy(r, r),
            h=lambda r: r.clone(),
            log_h=lambda log_r: log_r.clone(),
            h_from_log=torch.exp,
            kind=1,
        ),
    ),
    (
        ("js", "jensen-shannon"),
        Divergence(
            "jensen_shannon",
            # r log r - (r+1) log((r+1)/2), without the difference of two that overflow
            f=lambda r: r * _LOG2 - torch.special.xlog1py(r, 1 / r) - torch.log((r + 1) / 2),
            h=lambda r: 1 / (1 + 1 / r),
            log_h=logsigmoid,
            h_from_log=torch.sigmoid,
            kind=2,
        ),
    ),
    (
        ("sf", "softened-rkl"),
        Divergence(
            "softened_reverse_kl",
            f=lambda r: (r + 1) * torch.log1p((1 - r) / (2 * r)),
            h=lambda r: 1 / (r + 1),
            log_h=lambda log_r: logsigmoid(-log_r),
            h_from_log=lambda log_r: torch.sigmoid(-log_r),
            kind=3,
        ),
    ),
    (
        ("sh", "hellinger"),
        Divergence(
            "squared_hellinger",
            f=lambda r: 1 - r.sqrt(),
            h=lambda r: r.sqrt() / 4,
            log_h=lambda log_r: log_r / 2 - _LOG4,
            h_from_log=lambda log_r: torch.exp(log_r / 2) / 4,
            kind=4,
        ),
    ),
    (
        ("jf",),
        Divergence(
            "jeffreys",
            f=lambda r: (r - 1) * r.log(),
            h=lambda r: r + 1,
            log_h=lambda log_r: softplus(log_r, threshold=40.0),
            h_from_log=lambda log_r: torch.exp(log_r) + 1,
            kind=5,
        ),
    ),
    (
        ("neyman",),
        Divergence(
            "neyman_chi2",
            f=lambda r: (1 - r) ** 2 / r,
            h=lambda r: 2 / r,
            log_h=lambda log_r: _LOG2 - log_r,
            h_from_log=lambda log_r: 2 * torch.exp(-log_r),
            kind=6,
        ),
    ),
    (
        ("pearson",),
        Divergence(
            "pearson_chi2",
            f=lambda r: (r - 1) ** 2,
            h=lambda r: 2 * r**2,
            log_h=lambda log_r: _LOG2 + 2 * log_r,
            h_from_log=lambda log_r: 2 * torch.exp(2 * log_r),
            kind=7,
        ),
    ),
    ((), _alpha(0.5)),
)

_registry: dict[str, Divergence] = {}
_aliases: dict[str, str] = {}

DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(_registry)
"""Every known divergence by canonical name, registered ones included (read-only)."""


def _normalized(name: str) -> str:
    return name.strip().lower().replace("-", "_").replace(" ", "_")


def _add(divergence: Divergence, aliases: Iterable[str]) -> None:
    _registry[divergence.name] = divergence
    for alias in (divergence.name, *aliases):
        _aliases[_normalized(alias)] = divergence.name


for _names, _divergence in _TABLE:
    _add(_divergence, _names)


def _likeness(key: str, alias: str) -> float:
    """Of a mistyped name to a known one, or to its first word."""
    first = alias.split("_")[0]
    return max(difflib.SequenceMatcher(None, key, candidate).ratio() for candidate in (alias, first))


_ALPHA_SPELLING = re.compile(r"alpha\s*[:=(]\s*([^()]+?)\s*\)?$")


def get_divergence(name: str | Divergence, a: float | None = None) -> Divergence:
    """The divergence of that name or alias; case, ``-`` and ``_`` do not matter.

    Args:
        name: a name, an alias, or a Divergence (returned as it is). The alpha family also reads ``"alpha:0.3"``,
            ``"alpha=0.3"`` and ``"alpha(0.3)"``; a bare ``"alpha"`` has a = 0.5.
        a: the parameter of the alpha family.

    Raises:
        TypeError: name is neither a string nor a Divergence; a is no number.
        ValueError: unknown name (the message lists the known ones and the nearest), a not finite, or a given to a
            divergence that has no parameter.
    """
    if isinstance(name, Divergence):
        if a is None or name.kind == _ALPHA_KIND:
            return name if a is None else _alpha(number(a, "a"))
        raise ValueError(f"a: divergence {name.name!r} has no parameter")
    if a is None and type(name) is str and name in _aliases:
        return _registry[_aliases[name]]
    if not isinstance(name, str):
        raise TypeError(f"divergence must be a name or a Divergence, got {type(name).__name__}")
    key = _normalized(name)
    spelled = _ALPHA_SPELLING.match(name.strip().lower())
    if spelled:
        if a is not None:
            raise ValueError(f"a: given twice, by divergence={name!r} and a={a!r}")
        return _alpha(_spelled(spelled.group(1)))
    if key not in _aliases:
        nearest = max(_aliases, key=lambda alias: _likeness(key, alias))
        hint = f"; did you mean {_aliases[nearest]!r}?"
        known = ", ".join(
            f"{canonical} ({', '.join(short)})" if short else canonical
            for canonical in _registry
            for short in [[k for k, v in _aliases.items() if v == canonical and k != _normalized(canonical)]]
        )
        raise ValueError(f"divergence: {name!r} is unknown{hint} Known: {known}")
    found = _registry[_aliases[key]]
    if a is None:
        return found
    if found.kind != _ALPHA_KIND:
        raise ValueError(f"a: divergence {found.name!r} has no parameter")
    return _alpha(number(a, "a"))


def divergence_of(kind: int, a: float) -> Divergence:
    """The divergence that the kernels know by this code; ``a``: the parameter of the alpha family."""
    return _alpha(a) if kind == _ALPHA_KIND else _TABLE[kind][1]


def _spelled(text: str) -> float:
    """The parameter in a name."""
    try:
        return number(float(text), "a")
    except ValueError:
        raise ValueError(f"a: the parameter of the alpha family must be a finite number, got {shown(text)}") from None


def register_divergence(
    name: str,
    *,
    f: Any = None,
    h: ScalarMap | None = None,
    aliases: Iterable[str] = (),
    overwrite: bool = False,
) -> Divergence:
    """Adds a divergence, by its generator f or by its weight h.

    Args:
        name: what it will be called; must be new unless ``overwrite``.
        f: an expression in ``r``, as a string (``"r*log(r)"``) or a sympy expression; h = f''(r) r^2 is derived from
            it symbolically. A string is evaluated as code, so take none from strangers. Either f or h, not both.
        h: a callable from r (a float64 tensor of any shape) to h(r) of the same shape, made of PyTorch operations.
        aliases: further names.
        overwrite: replace a divergence registered before. The built-in ones cannot be replaced.

    Returns:
        The Divergence, which every ``divergence=`` argument now knows by its name.

    Raises:
        TypeError: name or an alias is no string, h is not callable, overwrite no bool.
        ValueError: both or neither of f and h; a name or alias in use; an expression that does not parse, has another
            variable than r or a function PyTorch lacks; an h that is negative or not finite somewhere on
            r = exp(l), l in [-10, 10]. Nothing is registered then.
    """
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"name must be a non-empty string, got {shown(name)}")
    if (f is None) == (h is None):
        raise ValueError("f, h: give exactly one of the two")
    aliases = _alias_names(aliases)
    flag(overwrite, "overwrite")
    builtin = {_normalized(entry.name) for _, entry in _TABLE}
    for label in (name, *aliases):
        if _ALPHA_SPELLING.match(label.strip().lower()):
            raise ValueError(f"name: {label!r} is a spelling of the alpha family")
        owner = _aliases.get(_normalized(label))
        if owner is not None and (not overwrite or owner in builtin or owner != _aliases.get(_normalized(name))):
            raise ValueError(f"name: {label!r} already names the divergence {owner!r}")
    f_map: ScalarMap | None = None
    if f is not None:
        f_map, h_map = _from_expression(f)
    elif callable(h):
        h_map = h
    else:
        raise TypeError(f"h must be callable, got {type(h).__name__}")
    _check_weight(name, h_map)

    def h_from_log(log_r: Tensor) -> Tensor:
        return h_map(log_r.double().exp()).to(log_r.dtype)

    def log_h(log_r: Tensor) -> Tensor:
        return h_map(log_r.double().exp()).log().to(log_r.dtype)

    divergence = Divergence(name, f=f_map, h=h_map, log_h=log_h, h_from_log=h_from_log)
    previous = _aliases.get(_normalized(name))
    if previous is not None:
        del _registry[previous]
        for label in [k for k, v in _aliases.items() if v == previous]:
            del _aliases[label]
    _add(divergence, aliases)
    return divergence


def _alias_names(aliases: Any) -> tuple[str, ...]:
    if isinstance(aliases, str | bytes) or not isinstance(aliases, Iterable):
        raise TypeError(f"aliases must be an iterable of names, got {shown(aliases)}")
    names = tuple(aliases)
    for alias in names:
        if not isinstance(alias, str) or not alias.strip():
            raise TypeError(f"aliases must be non-empty strings, got {shown(alias)}")
    return names


def _check_weight(name: str, h: ScalarMap) -> None:
    log_r = torch.linspace(-10.0, 10.0, 2001, dtype=torch.float64, device="cpu")
    log_r[1000] = 0.0
    r = log_r.exp()
    try:
        value = h(r)
    except Exception as error:
        raise ValueError(f"h: divergence {name!r}: evaluating h on a grid of r failed: {error}") from error
    if not isinstance(value, Tensor) or value.shape != r.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"h: divergence {name!r}: h must map a tensor of shape {tuple(r.shape)} to that shape, got {got}"
        )
    try:
        real(value, "its result")
        same_device(value, "its result", r, "r")
        value = value.detach().double()
    except (TypeError, ValueError) as error:
        raise ValueError(f"h: divergence {name!r}: h must map real numbers to real numbers: {error}") from None
    for bad, what in ((~value.isfinite(), "not finite"), (value < 0, "negative (f is not convex there)")):
        if bool(bad.any()):
            at = int(bad.nonzero()[0])
            raise ValueError(f"h: divergence {name!r}: h(r) = {float(value[at]):g} at r = {float(r[at]):g} is {what}")


def _from_expression(expression: Any) -> tuple[ScalarMap, ScalarMap]:
    """f and h = f'' r^2 as functions of a tensor, from an expression in r."""
    import sympy  # comes with torch; imported here because it takes a third of a second

    r = sympy.Symbol("r", positive=True)
    try:
        parsed = sympy.sympify(expression, locals={"r": r})
        parsed = parsed.subs({symbol: r for symbol in parsed.free_symbols if symbol.name == "r"})
    except (sympy.SympifyError, SyntaxError, TypeError, AttributeError) as error:
        raise ValueError(f"f: cannot read {expression!r} as an expression in r: {error}") from error
    if parsed.free_symbols - {r}:
        others = ", ".join(sorted(symbol.name for symbol in parsed.free_symbols - {r}))
        raise ValueError(f"f: the expression must depend on r alone, found {others}")
    return _compile(parsed, r), _compile(sympy.simplify(sympy.diff(parsed, r, 2) * r**2), r)


def _compile(expression: Any, r: Any) -> ScalarMap:
    import sympy

    def on_tensors(name: str) -> Callable[[Any], Any]:
        of_tensor, of_number = getattr(torch, name), getattr(math, name)
        return lambda v: of_tensor(v) if isinstance(v, Tensor) else of_number(v)

    functions = ("log", "exp", "sqrt", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asinh", "atan", "erf")
    table: dict[str, Any] = {name: on_tensors(name) for name in functions}
    table |= {"Abs": abs, "sign": torch.sign, "pi": math.pi, "E": math.e}
    unknown = {node.func.__name__ for node in expression.atoms(sympy.Function)} - set(table)
    if unknown or expression.has(sympy.I, sympy.Derivative, sympy.Integral, sympy.Piecewise):
        raise ValueError(
            f"f: {expression} uses {', '.join(sorted(unknown)) or 'a form'} that has no PyTorch equivalent"
        )
    compiled = sympy.lambdify(r, expression, modules=[table])

    def evaluate(value: Tensor) -> Tensor:
        return torch.as_tensor(compiled(value), dtype=value.dtype, device=value.device).expand_as(value)

    return evaluate
