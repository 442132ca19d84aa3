"""Every divergence against mpmath, and f-weighted score differences against the derivative of the divergence itself."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from conftest import Backend
from scipy.integrate import quad

import fdistill_ops as fd
from fdistill_ops import _oracle as oracle

mp = mpmath.mp.clone()
mp.dps = 60
NAMES = oracle.NAMES
LOGS = [
    -100.0,
    -87.5,
    -50.0,
    -20.0,
    -10.0,
    -3.0,
    -1.0,
    -0.1,
    -1e-6,
    0.0,
    1e-9,
    0.3,
    1.0,
    2.9957,
    10.0,
    44.0,
    88.5,
    100.0,
]

# f of the contract's table, and the sizes of the terms it adds up (its condition).
F: dict[str, Callable[[Any], Any]] = {
    "reverse_kl": lambda r: -mp.log(r),
    "forward_kl": lambda r: r * mp.log(r),
    "jensen_shannon": lambda r: r * mp.log(r) - (r + 1) * mp.log((r + 1) / 2),
    "softened_reverse_kl": lambda r: (r + 1) * mp.log(mp.mpf(1) / 2 + 1 / (2 * r)),
    "squared_hellinger": lambda r: 1 - mp.sqrt(r),
    "jeffreys": lambda r: (r - 1) * mp.log(r),
    "neyman_chi2": lambda r: (1 - r) ** 2 / r,
    "pearson_chi2": lambda r: (r - 1) ** 2,
}
TERMS: dict[str, Callable[[Any], Any]] = {
    "reverse_kl": lambda r: 0,
    "forward_kl": lambda r: 0,
    "jensen_shannon": lambda r: abs(r * mp.log(r)) + (r + 1) * (1 + abs(mp.log((r + 1) / 2))),
    "softened_reverse_kl": lambda r: (r + 1) * (1 + abs(F["softened_reverse_kl"](r) / (r + 1))),
    "squared_hellinger": lambda r: 1 + mp.sqrt(r),
    "jeffreys": lambda r: (r + 1) * (1 + abs(mp.log(r))),
    "neyman_chi2": lambda r: abs(1 - r) * (1 + r) / r,
    "pearson_chi2": lambda r: abs(r - 1) * (1 + r),
}
H: dict[str, Callable[[Any], Any]] = {
    "reverse_kl": lambda r: mp.mpf(1),
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (r + 1),
    "softened_reverse_kl": lambda r: 1 / (r + 1),
    "squared_hellinger": lambda r: mp.sqrt(r) / 4,
    "jeffreys": lambda r: r + 1,
    "neyman_chi2": lambda r: 2 / r,
    "pearson_chi2": lambda r: 2 * r**2,
}


def alpha_f(r: Any, a: Any) -> Any:
    """The contract's f of the alpha family; its limits at a = 0 and a = 1."""
    r, a = mp.mpf(r), mp.mpf(a)
    if a == 0:
        return r - 1 - mp.log(r)
    if a == 1:
        return r * mp.log(r) - r + 1
    return (r**a - a * r - (1 - a)) / (a * (a - 1))


def test_the_known_names_are_those_of_the_contract() -> None:
    assert set(fd.DIVERGENCES) >= set(oracle.ALIASES)
    with pytest.raises(TypeError):
        fd.DIVERGENCES["x"] = fd.get_divergence("js")  # type: ignore[index]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("log_r", [-3.0, -0.5, 0.0, 0.7, 2.5])
def test_the_table_agrees_with_itself(name: str, log_r: float) -> None:
    """h = f'' r^2, by a high-precision derivative: the table that the other tests trust."""
    r = mp.exp(log_r)
    assert abs(mp.diff(F[name], r, 2) * r**2 - H[name](r)) < mp.mpf(10) ** -20


@pytest.mark.parametrize("name", oracle.ALIASES)
def test_aliases(name: str) -> None:
    for label in (name, *oracle.ALIASES[name], name.upper(), name.replace("_", "-"), f" {name} "):
        assert fd.get_divergence(label).name == name
    found = fd.get_divergence(name)
    assert fd.get_divergence(found) is found
    assert name in repr(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_h_against_mpmath(name: str, dtype: torch.dtype) -> None:
    log_r = torch.tensor(LOGS + np.linspace(-100, 100, 401).tolist(), dtype=dtype)
    got = fd.get_divergence(name).log_h(log_r)
    assert got.dtype is dtype
    assert got.shape == log_r.shape
    u = torch.finfo(dtype).eps / 2
    for exponent, value in zip(log_r.tolist(), got.tolist(), strict=True):
        truth = mp.log(H[name](mp.exp(exponent)))
        # one rounding of the result, and the additive constant's (log 2, log 4) and product's own
        allowed = 4 * u * (abs(truth) + (name in _WITH_CONSTANT) * (abs(exponent) + 1)) + torch.finfo(dtype).tiny
        assert abs(mp.mpf(value) - truth) <= allowed, (name, exponent)


_WITH_CONSTANT = ("squared_hellinger", "neyman_chi2", "pearson_chi2")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_h_from_log_against_mpmath(name: str, dtype: torch.dtype) -> None:
    """No l in [-100, 100] overflows where h itself does not."""
    log_r = torch.tensor(LOGS + np.linspace(-100, 100, 401).tolist(), dtype=dtype)
    got = fd.get_divergence(name).h_from_log(log_r)
    info = torch.finfo(dtype)
    for exponent, value in zip(log_r.tolist(), got.tolist(), strict=True):
        truth = H[name](mp.exp(exponent))
        if truth > info.max:
            assert value == math.inf, (name, exponent)
        else:
            # exp magnifies the rounding of its argument (2 l for Pearson) by the argument
            allowed = 4 * info.eps / 2 * (2 + abs(exponent) * oracle.elasticity(name)) * truth + info.tiny
            assert abs(mp.mpf(value) - truth) <= allowed, (name, exponent)


@pytest.mark.parametrize("name", NAMES)
def test_h_of_r_against_mpmath(name: str) -> None:
    r = torch.tensor([math.exp(exponent) for exponent in LOGS], dtype=torch.float64)
    got = fd.get_divergence(name).h(r)
    for value, ratio in zip(got.tolist(), r.tolist(), strict=True):
        truth = H[name](mp.mpf(ratio))
        assert abs(mp.mpf(value) - truth) <= 4 * oracle.U64 * truth, (name, ratio)


@pytest.mark.parametrize("name", NAMES)
def test_f_of_r_against_mpmath(name: str) -> None:
    r = torch.tensor([math.exp(exponent) for exponent in LOGS if abs(exponent) <= 50], dtype=torch.float64)
    got = fd.get_divergence(name).f(r)
    for value, ratio in zip(got.tolist(), r.tolist(), strict=True):
        truth = F[name](mp.mpf(ratio))
        assert abs(mp.mpf(value) - truth) <= 4 * oracle.U64 * (abs(truth) + TERMS[name](mp.mpf(ratio))), (name, ratio)


@pytest.mark.parametrize("name", NAMES)
def test_f_vanishes_and_h_does_not_at_one(name: str) -> None:
    divergence = fd.get_divergence(name)
    assert float(divergence.f(1.0)) == 0.0
    assert float(divergence.h(1.0)) == pytest.approx(float(H[name](mp.mpf(1))), rel=1e-15)
    assert divergence.h(torch.ones(3, 2)).shape == (3, 2)
    assert divergence.f(1.0).dtype is torch.float64


@pytest.mark.parametrize("a", [-1.0, -0.5, -1e-9, 0.0, 1e-12, 1e-6, 0.3, 0.5, 0.7, 1 - 1e-9, 1.0, 1 + 1e-7, 2.0, 3.5])
def test_alpha_family(a: float) -> None:
    divergence = fd.get_divergence("alpha", a=a)
    assert divergence.a == a
    assert fd.get_divergence(f"alpha:{a!r}").a == a
    assert fd.get_divergence(f"alpha={a!r}").a == a
    assert fd.get_divergence(f"Alpha({a!r})").a == a
    for log_r in (-20.0, -3.0, -0.01, 0.0, 0.2, 2.0, 15.0):
        r = math.exp(log_r)
        exact = mp.mpf(r)
        truth_h = exact ** mp.mpf(a)
        assert abs(mp.mpf(float(divergence.h(r))) - truth_h) <= 4 * oracle.U64 * truth_h
        exponent = math.log(r)
        assert float(divergence.log_h(exponent)) == a * exponent
        size = 4 * oracle.U64 * (2 + abs(a * exponent)) * mp.exp(a * exponent)
        assert abs(mp.mpf(float(divergence.h_from_log(exponent))) - mp.exp(mp.mpf(a) * mp.mpf(exponent))) <= size
        truth = alpha_f(exact, a)
        # Written around the nearer of 0 and 1: two terms, whose exponentials magnify the rounding of their arguments.
        b, outer = (a, a - 1) if abs(a) < abs(a - 1) else (a - 1, a)
        quotient = (mp.exp(b * mp.log(exact)) - 1) / b if b else mp.log(exact)
        lead = exact if b != a else 1
        terms = (abs(lead * quotient) * (2 + abs(b * log_r)) + abs(exact - 1)) / abs(outer)
        assert abs(mp.mpf(float(divergence.f(r))) - truth) <= 8 * oracle.U64 * (terms + abs(truth)), (a, log_r)


def test_alpha_family_limits_and_members() -> None:
    """a = 0 weighs as reverse KL, a = 1 as forward KL, a = 2 half of Pearson, a = -1 half of Neyman."""
    r = torch.logspace(-3, 3, 50, dtype=torch.float64)
    for a, name, factor in ((0.0, "rkl", 1.0), (1.0, "kl", 1.0), (2.0, "pearson", 0.5), (-1.0, "neyman", 0.5)):
        torch.testing.assert_close(
            fd.get_divergence("alpha", a).h(r), factor * fd.get_divergence(name).h(r), rtol=1e-14, atol=0
        )
    near, at = fd.get_divergence("alpha", 1e-10).f(r), fd.get_divergence("alpha", 0.0).f(r)
    torch.testing.assert_close(near, at, rtol=1e-8, atol=1e-8)
    near, at = fd.get_divergence("alpha", 1 - 1e-10).f(r), fd.get_divergence("alpha", 1.0).f(r)
    torch.testing.assert_close(near, at, rtol=1e-7, atol=1e-7)
    assert fd.get_divergence("alpha").a == 0.5


# ------------------------------------------------------------------------------------------------- two Gaussians

MU_P, S_P, S_Q = 0.4, 1.0, 1.1
F64: dict[str, Callable[[float], float]] = {
    "reverse_kl": lambda r: -math.log(r),
    "forward_kl": lambda r: r * math.log(r),
    "jensen_shannon": lambda r: r * math.log(r) - (r + 1) * math.log((r + 1) / 2),
    "softened_reverse_kl": lambda r: (r + 1) * math.log(0.5 + 0.5 / r),
    "squared_hellinger": lambda r: 1 - math.sqrt(r),
    "jeffreys": lambda r: (r - 1) * math.log(r),
    "neyman_chi2": lambda r: (1 - r) ** 2 / r,
    "pearson_chi2": lambda r: (r - 1) ** 2,
    "alpha": lambda r: (r**0.3 - 0.3 * r - 0.7) / (0.3 * (0.3 - 1)),
}


def log_normal(x: Any, mean: float, deviation: float) -> Any:
    return -((x - mean) ** 2) / (2 * deviation**2) - math.log(deviation * math.sqrt(2 * math.pi))


def divergence_of_gaussians(name: str, theta: float) -> float:
    """D_f(p || q) = E_q[f(p/q)], p = N(MU_P, S_P^2), q = N(theta, S_Q^2), by quadrature."""

    def integrand(x: float) -> float:
        log_q = log_normal(x, theta, S_Q)
        return math.exp(log_q) * F64[name](math.exp(log_normal(x, MU_P, S_P) - log_q))

    return quad(integrand, -18.0, 18.0, epsabs=1e-13, epsrel=1e-13, limit=500, points=[theta, MU_P])[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", F64)
@pytest.mark.parametrize("theta", [0.9, -0.2])
def test_weighted_score_difference_is_the_derivative_of_the_divergence(
    backend: Backend, name: str, theta: float
) -> None:
    """d/dtheta D_f = E_q[h(r) (score_q - score_p) dx/dtheta], x = theta + S_Q z: through f_weights and score_difference
    with the scores as predictions, every clip and normaliser off."""
    step = 2e-3
    values = [divergence_of_gaussians(name, theta + k * step) for k in (-2, -1, 1, 2)]
    derivative = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)

    nodes, masses = np.polynomial.legendre.leggauss(600)
    sample = theta + 12.0 * nodes
    masses = 12.0 * masses * np.exp(log_normal(sample, theta, S_Q))
    log_ratio = log_normal(sample, MU_P, S_P) - log_normal(sample, theta, S_Q)
    x = backend.tensor(sample, torch.float64)
    weight = fd.f_weights(
        backend.tensor(log_ratio, torch.float64),
        divergence="alpha:0.3" if name == "alpha" else name,
        logit_clip=None,
        ratio_clip=None,
        normalize=None,
    )
    g = fd.score_difference(
        x,
        backend.tensor(-(sample - MU_P) / S_P**2, torch.float64),
        backend.tensor(-(sample - theta) / S_Q**2, torch.float64),
        weight=weight,
        prediction="score",
        x_t=x,
        alpha=1.0,
        sigma=1.0,
        normalizer=None,
        eps=0.0,
    )
    estimate = float((g.cpu().numpy() * masses).sum())
    # fourth-order difference at 2e-3: 1e-11 relative, plus the quadrature's 1e-13 over the step
    assert estimate == pytest.approx(derivative, rel=2e-8, abs=1e-9)
    assert (estimate > 0) == (theta > MU_P), "the divergence falls towards the teacher"


# ------------------------------------------------------------------------------------------------- registration


def test_register_by_expression() -> None:
    made = fd.register_divergence("le_cam", f="(r-1)**2/(2*(r+1))", aliases=["lc"])
    assert fd.get_divergence("LC") is made
    assert fd.DIVERGENCES["le_cam"] is made
    r = torch.logspace(-4, 4, 60, dtype=torch.float64)
    torch.testing.assert_close(made.h(r), 4 * r**2 / (r + 1) ** 3, rtol=1e-12, atol=0)
    torch.testing.assert_close(made.f(r), (r - 1) ** 2 / (2 * (r + 1)), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(made.log_h(r.log()), made.h(r).log(), rtol=1e-12, atol=1e-12)


def test_register_by_h_and_use(backend: Backend) -> None:
    fd.register_divergence("mine", h=lambda r: r / (r + 1))
    logits = backend.randn(17, seed=3) * 4
    torch.testing.assert_close(
        fd.f_weights(logits, divergence="mine"), fd.f_weights(logits, divergence="js"), rtol=4e-7, atol=0
    )
    x, teacher, fake = (backend.randn(17, 5, seed=s) for s in range(3))
    torch.testing.assert_close(
        fd.f_distill_loss(x, teacher, fake, logits, divergence="mine"),
        fd.f_distill_loss(x, teacher, fake, logits, divergence="js"),
        rtol=4e-7,
        atol=0,
    )
    with pytest.raises(NotImplementedError, match="mine"):
        fd.get_divergence("mine").f(2.0)


@pytest.mark.parametrize("expression", ["r*log(r)", "-log(r)", "1 - sqrt(r)", "r*log(r) - (r+1)*log((r+1)/2)"])
def test_registered_expressions_match_the_built_in(expression: str) -> None:
    builtin = {"r*log(r)": "kl", "-log(r)": "rkl", "1 - sqrt(r)": "sh"}.get(expression, "js")
    made = fd.register_divergence("copy", f=expression)
    r = torch.logspace(-4, 4, 60, dtype=torch.float64)
    torch.testing.assert_close(made.h(r), fd.get_divergence(builtin).h(r), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ValueError, "exactly one"),
        ({"f": "r", "h": lambda r: r}, ValueError, "exactly one"),
        ({"f": "r * s"}, ValueError, "s"),
        ({"f": "-(r-1)**2"}, ValueError, "negative"),
        ({"f": "r *** 2"}, ValueError, "f"),
        ({"h": 3.0}, TypeError, "h must be callable"),
        ({"h": lambda r: -r}, ValueError, "negative"),
        ({"h": lambda r: r / 0}, ValueError, "not finite"),
        ({"h": lambda r: r.sum()}, ValueError, "shape"),
        ({"h": lambda r: r, "aliases": ["js"]}, ValueError, "js"),
    ],
)
def test_registration_refuses(options: dict[str, Any], error: type[Exception], says: str) -> None:
    before = dict(fd.DIVERGENCES)
    with pytest.raises(error, match=says):
        fd.register_divergence("broken", **options)
    assert dict(fd.DIVERGENCES) == before
    with pytest.raises(ValueError, match="unknown"):
        fd.get_divergence("broken")


def test_registration_does_not_replace() -> None:
    with pytest.raises(ValueError, match="js"):
        fd.register_divergence("js", h=lambda r: r, overwrite=True)
    fd.register_divergence("twice", h=lambda r: r)
    with pytest.raises(ValueError, match="twice"):
        fd.register_divergence("twice", h=lambda r: r)
    replaced = fd.register_divergence("twice", h=lambda r: r + 1, overwrite=True)
    assert fd.get_divergence("twice") is replaced


def test_pickled_and_copied_by_name() -> None:
    for name in ("js", "alpha:0.3"):
        divergence = fd.get_divergence(name)
        read = pickle.loads(pickle.dumps(divergence))
        assert (read.name, read.a) == (divergence.name, divergence.a)
    module = pickle.loads(pickle.dumps(fd.FDistillLoss("kl", histogram=fd.RatioHistogram(0.0, 1.0))))
    assert module.divergence is fd.get_divergence("kl")


def test_a_spelling_of_the_alpha_family_is_no_name() -> None:
    with pytest.raises(ValueError, match="alpha family"):
        fd.register_divergence("alpha:7", h=torch.ones_like)


def test_jensen_shannon_f_at_the_ends_of_float32() -> None:
    f = fd.get_divergence("js").f(torch.tensor([0.0, 1.0, 1e38]))
    assert f.tolist() == pytest.approx([math.log(2), 0.0, 1e38 * math.log(2)], rel=1e-6)
