"""The options of the public functions: their types, defaults and signatures, each in one place. The functions take them
as ``**options``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, TypeVar

from torch import Tensor

from .divergences import Divergence
from .histogram import RatioHistogram

_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Common(TypedDict, total=False):
    weight: Tensor | float | None
    mask: Tensor | None
    normalizer: str | Tensor | None
    eps: float
    nonfinite: str


class _Matching(_Common, total=False):
    teacher_uncond: Tensor | None
    guidance_scale: float | Tensor | None
    prediction: str
    x_t: Tensor | None
    alpha: Tensor | float | None
    sigma: Tensor | float | None
    max_norm: float | None


class MatchingOptions(_Matching, total=False):
    """Keyword arguments of :func:`fdistill_ops.distribution_matching_loss`, but ``return_stats``."""

    reduction: str


class DifferenceOptions(_Matching, total=False):
    """Keyword arguments of :func:`fdistill_ops.score_difference`."""

    out: Tensor | None


class WeightOptions(TypedDict, total=False):
    """Keyword arguments of :func:`fdistill_ops.f_weights`."""

    divergence: str | Divergence
    logit_clip: float | None
    ratio_clip: tuple[float, float] | None
    histogram: RatioHistogram | None
    normalize: str | None
    eps: float
    nonfinite: str
    group: Any


class FDistillOptions(MatchingOptions, WeightOptions, total=False):
    """Keyword arguments of :func:`fdistill_ops.f_distill_loss`, but ``return_stats``."""


class FDifferenceOptions(DifferenceOptions, WeightOptions, total=False):
    """Keyword arguments of :func:`fdistill_ops.f_score_difference`."""


class ScoreIdentityOptions(_Common, total=False):
    """Keyword arguments of :func:`fdistill_ops.score_identity_loss`, but ``return_stats``."""

    alpha: float
    reduction: str


# In the order of the signatures.
_DEFAULTS: dict[str, Any] = {
    "divergence": "js",
    "logit_clip": 10.0,
    "ratio_clip": (0.1, 20.0),
    "histogram": None,
    "normalize": "mean",
    "group": None,
    "weight": None,
    "teacher_uncond": None,
    "guidance_scale": None,
    "mask": None,
    "prediction": "x0",
    "x_t": None,
    "alpha": None,
    "sigma": None,
    "normalizer": "mean_abs",
    "eps": 1e-6,
    "nonfinite": "propagate",
    "max_norm": None,
    "reduction": "mean",
    "out": None,
    "return_stats": False,
}


def _defaults(kind: Any, **own: Any) -> dict[str, Any]:
    names = {*kind.__annotations__, *own}
    return {name: own.get(name, default) for name, default in _DEFAULTS.items() if name in names}


MATCHING = _defaults(MatchingOptions, return_stats=False)
DIFFERENCE = _defaults(DifferenceOptions)
WEIGHTS = _defaults(WeightOptions)
F_DISTILL = _defaults(FDistillOptions, return_stats=False)
F_DIFFERENCE = _defaults(FDifferenceOptions)
SCORE_IDENTITY = _defaults(ScoreIdentityOptions, return_stats=False, alpha=1.0)


def takes(kind: Any, defaults: Mapping[str, Any]) -> Callable[[_Function], _Function]:
    """Gives a function of ``**options`` of this kind the signature that it has for its users."""

    def decorate(function: _Function) -> _Function:
        written = inspect.signature(function)
        positional = [p for p in written.parameters.values() if p.kind is not p.VAR_KEYWORD]
        types = {name: getattr(hint, "__forward_arg__", hint) for name, hint in kind.__annotations__.items()}
        types["return_stats"] = "bool"
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
            for name, default in defaults.items()
        ]
        function.__signature__ = written.replace(parameters=[*positional, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate


def complete(function: str, options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The options given and the defaults of the others.

    Raises:
        TypeError: one is unknown.
    """
    found = {**defaults, **options}
    if len(found) > len(defaults):
        unknown = next(name for name in options if name not in defaults)
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown!r}")
    return found
