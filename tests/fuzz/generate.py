"""The call of a number: legal ones mostly, some with one thing wrong, some with several."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import wrong
from .calls import MAKERS
from .draw import Draw
from .specs import Call, Tens

ONE_WRONG, WILD = 0.25, 0.125
_OTHERS = 0.03
_WEIGHTS = [weight for weight, _ in MAKERS]
_MAKERS: list[Callable[[Draw], Call]] = [maker for _, maker in MAKERS]


def _begun(seed: int, backend: str, number: int) -> tuple[random.Random, str]:
    rng = random.Random(f"{seed}/{backend}/{number}")
    kind = rng.random()
    return rng, "one" if kind < ONE_WRONG else "wild" if kind < ONE_WRONG + WILD else "legal"


def level_of(seed: int, backend: str, number: int) -> str:
    """How much is wrong with that call: "legal", "one" or "wild"."""
    return _begun(seed, backend, number)[1]


def generate(seed: int, backend: str, number: int) -> Call:
    """The same for the same arguments, always."""
    rng, level = _begun(seed, backend, number)
    draw = Draw(rng, backend)
    if draw.chance(_OTHERS):
        call = wrong.other(draw, level)
    else:
        call = draw.surrounded(rng.choices(_MAKERS, _WEIGHTS)[0](draw))
        for _ in range(1 if level == "one" else rng.randint(2, 4) if level == "wild" else 0):
            call = wrong.mutate(draw, call)
        if level == "legal" and draw.chance(0.01):
            call = _on_meta(call)
    in_reference = backend == "reference" and call.target in _IN_REFERENCE and draw.chance(0.5)
    chosen: str | None = backend
    if backend == "cpu" and draw.chance(0.5):
        chosen = None  # the default
    if in_reference and draw.chance(0.5):
        chosen = None
    return replace(call, backend=chosen, level=level, space="fd.reference" if in_reference else "fd")


_IN_REFERENCE = (
    *("distribution_matching_loss", "f_distill_loss", "f_weights", "gan_discriminator_loss", "gan_generator_loss"),
    *("f_score_difference", "score_difference", "score_identity_loss", "to_x0"),
)


def _on_meta(call: Call) -> Call:
    """Every tensor without memory, on the device for that."""
    given: dict[str, Any] = dict(call.arguments)
    for name, spec in given.items():
        if isinstance(spec, Tens):
            given[name] = replace(spec, wrap="on_meta", grad=False, layout="")
    given.pop("histogram", None)
    return replace(call, arguments=given, after=replace(call.after, kind="", upstream=""))
