"""Numbers as arguments: what is none, or has no float, is refused by name wherever a number is taken."""

from __future__ import annotations

import fractions
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend

import fdistill_ops as fd

HUGE = 10**400
# What is no number, and what is none that can be used. Each for every argument below.
NO_NUMBERS: list[Any] = ["1", b"1", True, np.True_, 1j, [1.0], torch.ones(1), torch.tensor(True), np.ones(2), object()]
OUT_OF_RANGE: list[Any] = [HUGE, -HUGE, 10**5000, fractions.Fraction(HUGE), math.nan, np.float32("nan")]


class Hostile:
    """Counts as no number, and cannot be printed."""

    def __repr__(self) -> str:
        raise KeyError

    def __float__(self) -> float:
        return 1.0


def losses(backend: Backend, **changes: Any) -> list[Callable[[], Any]]:
    x = backend.randn(3, 4)
    logits = backend.randn(3)
    of_alpha = "alpha" in changes
    calls: list[Callable[[], Any]] = []
    if not of_alpha and "sigma" not in changes and "guidance_scale" not in changes:
        calls.append(lambda: fd.score_identity_loss(x, x, x, **changes))
    if of_alpha or "sigma" in changes:
        changes = {"prediction": "v", "x_t": x, "alpha": 0.8, "sigma": 0.6} | changes
        calls = [lambda: fd.to_x0(x, x, prediction="v", alpha=changes["alpha"], sigma=changes["sigma"])]
        if of_alpha:
            calls.append(lambda: fd.score_identity_loss(x, x, x, alpha=changes["alpha"]))
    if "guidance_scale" in changes:
        changes = {"teacher_uncond": x} | changes
    calls.append(lambda: fd.distribution_matching_loss(x, x, x, **changes))
    calls.append(lambda: fd.reference.distribution_matching_loss(x, x, x, **changes))
    calls.append(lambda: fd.score_difference(x, x, x, **changes))
    if "weight" not in changes:
        calls.append(lambda: fd.f_distill_loss(x, x, x, logits, **changes))
    return calls


@pytest.mark.parametrize("name", ["eps", "guidance_scale", "weight", "alpha", "sigma"])
def test_of_the_losses(backend: Backend, name: str) -> None:
    tensors = name in ("guidance_scale", "weight", "alpha", "sigma")  # these may be tensors too
    for values, error in (([*NO_NUMBERS, Hostile()], TypeError), (OUT_OF_RANGE, ValueError)):
        for value in values:
            if tensors and isinstance(value, torch.Tensor):
                continue
            for call in losses(backend, **{name: value}):
                with pytest.raises(error, match=name):
                    call()


def test_of_the_weights(backend: Backend) -> None:
    logits = backend.randn(3)
    for values, error in (([*NO_NUMBERS, Hostile()], TypeError), (OUT_OF_RANGE, ValueError)):
        for value in values:
            for name, changes in {
                "eps": {"eps": value},
                "logit_clip": {"logit_clip": value},
                r"ratio_clip\[0\]": {"ratio_clip": (value, 20.0)},
                r"ratio_clip\[1\]": {"ratio_clip": [0.1, value]},
            }.items():
                for function in (fd.f_weights, fd.reference.f_weights):
                    with pytest.raises(error, match=name):
                        function(logits, **changes)


@pytest.mark.parametrize(
    "value", ["19", b"19", {0.1, 20.0}, {0.1: 20.0}, np.ones(2), torch.ones(2), 19, (1.0,), Hostile()]
)
def test_a_pair_of_clips(backend: Backend, value: Any) -> None:
    with pytest.raises(TypeError, match="ratio_clip"):
        fd.f_weights(backend.randn(3), ratio_clip=value)


@pytest.mark.parametrize("name", ["min_t", "max_t", "ema_rate"])
def test_of_a_histogram(backend: Backend, name: str) -> None:
    """When it is made, and when an attribute was set later: before anything has changed."""
    logits, t = backend.randn(3), backend.randn(3).sigmoid()
    for values, error in (([*NO_NUMBERS, Hostile()], TypeError), (OUT_OF_RANGE, ValueError)):
        for value in values:
            with pytest.raises(error, match=f"^{name}"):
                fd.RatioHistogram(**{"min_t": 0.0, "max_t": 1.0, "ema_rate": 0.5} | {name: value})
            histogram = fd.RatioHistogram(0.0, 1.0, ema_rate=0.5).to(backend.device)
            setattr(histogram, name, value)
            with pytest.raises(error, match=rf"histogram\.{name}"):
                fd.f_weights(logits, t, histogram=histogram)
            assert histogram.bins.tolist() == [1.0] * 10


def test_attributes_of_a_histogram_set_later(backend: Backend) -> None:
    logits, t = backend.randn(3), backend.randn(3).sigmoid()
    wrong: list[tuple[str, Any, type[Exception]]] = [
        ("ema_rate", 5, ValueError),
        ("ema_rate", -0.5, ValueError),
        ("min_t", 1.0, ValueError),
        ("max_t", -1.0, ValueError),
        ("bins", torch.ones(10, dtype=torch.int64), TypeError),
        ("bins", torch.ones(2, 5), ValueError),
        ("bins", torch.ones(0), ValueError),
        ("bins", torch.ones(3, requires_grad=True), ValueError),
        ("bins", None, TypeError),
        ("bins", torch.empty(10, device="meta"), ValueError),
    ]
    for name, value, error in wrong:
        histogram = fd.RatioHistogram(0.0, 1.0, ema_rate=0.5).to(backend.device)
        setattr(histogram, name, value)
        with pytest.raises(error, match=rf"histogram(\.{name})?"):
            fd.f_weights(logits, t, histogram=histogram)
    good = fd.RatioHistogram(0.0, 1.0).to(backend.device)
    good.ema_rate, good.max_t = 1, np.float32(2.0)  # type: ignore[assignment]
    kept = fd.RatioHistogram(0.0, 2.0, ema_rate=1.0).to(backend.device)
    assert torch.equal(fd.f_weights(logits, t, histogram=good), fd.f_weights(logits, t, histogram=kept))


def test_numbers_of_every_kind_are_taken(backend: Backend) -> None:
    """As the float they stand for."""
    x, teacher, fake = (backend.randn(3, 4, seed=seed) for seed in range(3))
    kinds: list[Callable[[int], Any]] = [int, np.int64, np.float32, np.float64, fractions.Fraction, np.asarray]
    kinds.append(lambda n: torch.tensor(float(n)))
    expected = fd.distribution_matching_loss(x, teacher, fake, eps=2.0)
    for kind in kinds:
        assert torch.equal(fd.distribution_matching_loss(x, teacher, fake, eps=kind(2)), expected)
    expected = fd.distribution_matching_loss(x, teacher, fake, weight=2.0)
    for kind in kinds[:-2]:
        assert torch.equal(fd.distribution_matching_loss(x, teacher, fake, weight=kind(2)), expected)
    logits = backend.randn(3)
    expected = fd.f_weights(logits, logit_clip=2.0, ratio_clip=(0.0, math.inf))
    for kind in kinds:
        assert torch.equal(fd.f_weights(logits, logit_clip=kind(2), ratio_clip=[kind(0), math.inf]), expected)


@pytest.mark.parametrize("value", [1, "yes", None, torch.tensor(True)])
def test_flags(backend: Backend, value: Any) -> None:
    x = backend.randn(3, 4)
    for function in (fd.distribution_matching_loss, fd.score_identity_loss, fd.reference.distribution_matching_loss):
        with pytest.raises(TypeError, match="return_stats"):
            function(x, x, x, return_stats=value)
    with pytest.raises(TypeError, match="return_stats"):
        fd.f_distill_loss(x, x, x, x[:, 0], return_stats=value)


@pytest.mark.parametrize("name", ["normalizer", "nonfinite", "reduction", "prediction"])
def test_choices_are_compared_with_care(backend: Backend, name: str) -> None:
    """What has no hash, or an equality of its own, is refused by name as well."""
    x = backend.randn(3, 4)
    for value in ([], {}, np.asarray(["mean", "sum"]), True, Hostile(), 1 << 70):
        with pytest.raises((TypeError, ValueError), match=name):
            fd.distribution_matching_loss(x, x, x, **{name: value})


def test_of_a_divergence() -> None:
    for values, error in (([*NO_NUMBERS, Hostile()], TypeError), (OUT_OF_RANGE, ValueError)):
        for value in values:
            with pytest.raises(error, match=r"^a "):
                fd.get_divergence("alpha", a=value)
    assert fd.get_divergence("alpha", a=np.float64(0.25)).a == 0.25


@pytest.mark.parametrize("aliases", [(1,), (None,), ("",), (" ",), ("good", b"bad"), "name", b"name", 5, None, [["a"]]])
def test_aliases(aliases: Any) -> None:
    known = dict(fd.DIVERGENCES)
    with pytest.raises(TypeError, match="aliases"):
        fd.register_divergence("of_this_test", h=lambda r: r, aliases=aliases)
    assert dict(fd.DIVERGENCES) == known
    with pytest.raises(TypeError, match="overwrite"):
        fd.register_divergence("of_this_test", h=lambda r: r, overwrite="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"shapes": 5}, TypeError, "shapes"),
        ({"shapes": [5]}, TypeError, "shapes"),
        ({"shapes": [()]}, ValueError, "shapes"),
        ({"shapes": [(2, -1)]}, ValueError, "shapes"),
        ({"shapes": [(2, True)]}, ValueError, "shapes"),
        ({"shapes": ["ab"]}, ValueError, "shapes"),
        ({"shapes": [(2, 1 << 62)]}, ValueError, "shapes"),
        ({"shapes": [(2, HUGE)]}, ValueError, "shapes"),
        ({"dtypes": torch.float32}, TypeError, "dtypes"),
        ({"dtypes": ["float32"]}, ValueError, "dtypes"),
        ({"dtypes": [torch.int64]}, ValueError, "dtypes"),
        ({"dtypes": [[torch.float32]]}, ValueError, "dtypes"),
        ({"device": "nonsense"}, ValueError, "device"),
        ({"device": 5}, TypeError, "device"),
        ({"device": "meta"}, RuntimeError, "meta"),
        ({"heads": 0}, ValueError, "heads"),
        ({"heads": True}, ValueError, "heads"),
        ({"heads": 2.0}, ValueError, "heads"),
        ({"bins": 0}, ValueError, "bins"),
        ({"bins": "ten"}, ValueError, "bins"),
        ({"bins": HUGE}, ValueError, "bins"),
        ({"guidance": "yes"}, TypeError, "guidance"),
        ({"mask": 1}, TypeError, "mask"),
        ({"return_stats": None}, TypeError, "return_stats"),
        ({"divergence": "jss"}, ValueError, "divergence"),
        ({"prediction": "noise"}, ValueError, "prediction"),
        ({"prediction": 3}, ValueError, "prediction"),
        ({"normalize": "max"}, ValueError, "normalize"),
        ({"normalizer": "max"}, ValueError, "normalizer"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"nonfinite": True}, ValueError, "nonfinite"),
    ],
)
def test_warmup(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fd.warmup(**{"shapes": [(2, 3)], "device": "cpu"} | arguments)


@pytest.mark.parametrize("name", [5, True, [], ("cpu",), Hostile()])
def test_names_of_back_ends(name: Any) -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        fd.set_backend(name)
    with pytest.raises(ValueError, match="name must be one of"), fd.use_backend(name):
        pass
