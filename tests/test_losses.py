"""The losses and conversions against the oracle."""

from __future__ import annotations

import itertools
import math
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend, as_tensor, check_identity, check_matching, expected_matching, to_numpy, unit
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops import _oracle as oracle
from fdistill_ops.stats import FIELDS
from fdistill_ops.testing import assert_close, assert_gradient_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1,), (5,), (2, 3), (3, 1, 7), (4, 3, 8, 8), (2, 5, 3, 6, 7), (1, 4099), (3, 65537)]


def batch(backend: Backend, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    """x, a leaf, teacher and fake."""
    return {
        "x": backend.leaf(*shape, dtype=dtype, seed=seed),
        "teacher": backend.randn(*shape, dtype=dtype, seed=seed + 1),
        "fake": backend.randn(*shape, dtype=dtype, seed=seed + 2),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = batch(backend, *shape, dtype=dtype)
    _, gradient = check_matching(arguments)
    assert_gradient_close(gradient, as_tensor(expected_matching(arguments).gradients["x"]), roundings=1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
@pytest.mark.parametrize("normalizer", ["mean_abs", None, "tensor"])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_and_normalisers(backend: Backend, reduction: str, normalizer: Any, masked: bool) -> None:
    arguments = batch(backend, 5, 3, 11) | {"reduction": reduction, "normalizer": normalizer}
    if normalizer == "tensor":
        arguments["normalizer"] = backend.tensor([0.5, 1.0, 3.0, 1e-3, 20.0])
    if masked:
        arguments["mask"] = backend.randn(5, 3, 11, seed=9) > 0.4
        arguments["mask"][3] = False
    for eps in (1e-6, 0.0, 0.25):
        loss, _ = check_matching(arguments | {"eps": eps})
        assert loss.shape == ((5,) if reduction == "sample" else ())


@pytest.mark.parametrize("rows", ["float", (), (4,), (4, 3), (4, 3, 2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_of_leading_dimensions(backend: Backend, rows: Any, dtype: torch.dtype) -> None:
    arguments = batch(backend, 4, 3, 2, 5)
    arguments["weight"] = 0.7 if rows == "float" else backend.randn(*rows, dtype=dtype, seed=7).abs() + 0.1
    check_matching(arguments)
    arguments["mask"] = backend.randn(4, 1, 2, 1, seed=3).expand(4, 3, 2, 5) > 0
    check_matching(arguments | {"reduction": "sample"})


def test_zero_and_negative_weights(backend: Backend) -> None:
    arguments = batch(backend, 3, 7) | {"weight": backend.tensor([0.0, -1.5, 2.0])}
    loss, gradient = check_matching(arguments)
    assert gradient[0].tolist() == [0.0] * 7
    assert float(loss) > 0


@pytest.mark.parametrize("scale", [1.0, 0.0, 3.5, -1.0, 7.5, "tensor", "tensor64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_guidance(backend: Backend, scale: Any, dtype: torch.dtype) -> None:
    arguments = batch(backend, 3, 4, 9, dtype=dtype) | {"teacher_uncond": backend.randn(3, 4, 9, dtype=dtype, seed=5)}
    arguments["guidance_scale"] = scale
    if isinstance(scale, str):
        arguments["guidance_scale"] = backend.tensor(
            [1.0, 4.1, -2.3], torch.float64 if scale == "tensor64" else torch.float32
        )
    check_matching(arguments)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "score"])
@pytest.mark.parametrize("rows", ["float", (3,), (3, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_predictions(backend: Backend, prediction: str, rows: Any, dtype: torch.dtype) -> None:
    arguments = batch(backend, 3, 4, 9, dtype=dtype)
    arguments |= {"prediction": prediction, "x_t": backend.randn(3, 4, 9, dtype=dtype, seed=6)}
    if rows == "float":
        arguments |= {"alpha": 0.8, "sigma": 0.6}
    else:
        arguments["alpha"] = backend.randn(*rows, dtype=torch.float64, seed=7).abs() + 0.2
        arguments["sigma"] = backend.randn(*rows, dtype=torch.float32, seed=8).abs() + 0.05
    check_matching(arguments)
    check_matching(arguments | {"normalizer": None, "reduction": "sample"})
    arguments |= {"teacher_uncond": backend.randn(3, 4, 9, dtype=dtype, seed=9), "guidance_scale": 4.5}
    check_matching(arguments)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "score"])
def test_the_difference_does_not_go_through_x_t(backend: Backend, prediction: str) -> None:
    """fake - T = c (fake - teacher): nearly equal predictions keep their difference, which x0 conversion in float32
    would bury under the rounding of x_t / alpha."""
    teacher = backend.randn(2, 50, seed=1)
    fake = teacher * (1 + 2.0**-20)
    x = backend.leaf(2, 50, seed=2)
    check_matching(
        {"x": x, "teacher": teacher, "fake": fake, "prediction": prediction, "x_t": backend.randn(2, 50, seed=3) * 50}
        | {"alpha": 0.1, "sigma": 0.9, "normalizer": backend.tensor([1.0, 2.0])}
    )


def test_prediction_equals_converting_first(backend: Backend) -> None:
    """The kernel's conversion and to_x0 agree in float64."""
    x, teacher, fake, x_t = (backend.randn(3, 4, 5, dtype=torch.float64, seed=s) for s in range(4))
    alpha, sigma = backend.tensor([0.9, 0.5, 0.3], torch.float64), backend.tensor([0.1, 0.7, 0.95], torch.float64)
    for prediction in ("eps", "v", "flow", "score"):
        options = {"prediction": prediction, "alpha": alpha, "sigma": sigma}
        want = fd.distribution_matching_loss(x, *(fd.to_x0(p, x_t, **options) for p in (teacher, fake)))
        got = fd.distribution_matching_loss(x, teacher, fake, x_t=x_t, **options)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "score", "x0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_to_x0(backend: Backend, prediction: str, dtype: torch.dtype) -> None:
    pred, x_t = backend.leaf(3, 4, 5, dtype=dtype), backend.leaf(3, 4, 5, dtype=dtype, seed=1)
    for alpha, sigma in (
        (0.8, 0.6),
        (backend.tensor([0.9, 0.5, 0.3], torch.float64), backend.tensor([0.1, 0.7, 0.95], torch.float64)),
        (backend.randn(3, 4, seed=2).abs() + 0.2, 0.4),
    ):
        want, noise = oracle.to_x0(
            to_numpy(pred),
            to_numpy(x_t),
            prediction=prediction,
            alpha=to_numpy(alpha),
            sigma=to_numpy(sigma),
            u=unit(pred),
        )
        got = fd.to_x0(pred, x_t, prediction=prediction, alpha=alpha, sigma=sigma)
        assert got.dtype is dtype
        assert_close(got, as_tensor(want), noise=as_tensor(noise), what="x0")
        if prediction == "x0":
            continue
        a, c = oracle.x0_coefficients(prediction, to_numpy(alpha), to_numpy(sigma))
        d_pred, d_x_t = torch.autograd.grad(got.sum(), (pred, x_t))
        for gradient, coefficient in ((d_pred, c), (d_x_t, a)):
            full = np.broadcast_to(oracle.rows(coefficient, 3), (3, 4, 5))
            assert_close(gradient, as_tensor(full), ulps=1.0, what="gradient of to_x0")


def test_to_x0_inverts_the_noising(backend: Backend) -> None:
    x0, eps = backend.randn(4, 6, dtype=torch.float64), backend.randn(4, 6, dtype=torch.float64, seed=1)
    alpha, sigma = (
        backend.tensor([1.0, 0.9, 0.5, 0.1], torch.float64),
        backend.tensor([0.1, 0.4, 0.9, 0.99], torch.float64),
    )
    a, s = alpha[:, None], sigma[:, None]
    x_t = a * x0 + s * eps
    predictions = {"eps": eps, "v": a * eps - s * x0, "flow": eps - x0, "score": -eps / s}
    for prediction, value in predictions.items():
        got = fd.to_x0(value, x_t, prediction=prediction, alpha=alpha, sigma=sigma)
        torch.testing.assert_close(got, x0, rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- mask


def test_mask_counts_and_normaliser_ignores_it(backend: Backend) -> None:
    arguments = batch(backend, 3, 8)
    arguments["mask"] = torch.zeros(3, 8, dtype=torch.bool, device=backend.device)
    arguments["mask"][1, 2:5] = True
    loss, gradient = check_matching(arguments)
    assert bool((gradient[~arguments["mask"]] == 0).all())
    x, teacher, fake = (to_numpy(arguments[name]) for name in ("x", "teacher", "fake"))
    g = (fake - teacher)[1, 2:5] / (np.abs(x - teacher)[1].mean() + 1e-6)
    assert float(loss.detach()) == pytest.approx(float(0.5 * (g**2).mean()), rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_empty_mask_gives_zero(backend: Backend, reduction: str, eps: float) -> None:
    arguments = batch(backend, 3, 8) | {"reduction": reduction, "eps": eps}
    arguments["mask"] = torch.zeros(1, dtype=torch.bool, device=backend.device).expand(3, 8)
    loss, gradient = check_matching(arguments)
    assert bool((loss == 0).all())
    assert bool((gradient == 0).all())


@pytest.mark.parametrize("normalizer", [None, "mean_abs", "given"])
def test_statistics_of_samples_without_elements(backend: Backend, normalizer: str | None) -> None:
    """n_b is 1 or as given also there; a mean over nothing is none."""
    x = torch.zeros(2, 0, device=backend.device)
    given = torch.tensor([2.0, 3.0], device=backend.device) if normalizer == "given" else normalizer
    _, stats = fd.distribution_matching_loss(x, x, x, normalizer=given, return_stats=True)
    want = {None: (1.0, 1.0, 1.0), "mean_abs": (math.nan,) * 3, "given": (2.0, 2.5, 3.0)}[normalizer]
    got = (stats.normalizer_min, stats.normalizer_mean, stats.normalizer_max)
    np.testing.assert_array_equal([value.item() for value in got], want)


def test_nothing_leaks_from_outside_the_mask(backend: Backend) -> None:
    """A NaN in fake where the mask is False."""
    arguments = batch(backend, 2, 6)
    arguments["fake"][0, 3] = math.nan
    arguments["fake"][1, 0] = math.inf
    arguments["mask"] = arguments["fake"].isfinite()
    for reduction, nonfinite in itertools.product(("mean", "sum", "sample"), ("propagate", "zero")):
        loss, gradient = check_matching(arguments | {"reduction": reduction, "nonfinite": nonfinite})
        assert bool(loss.isfinite().all())
        assert bool(gradient.isfinite().all())


# ------------------------------------------------------------------------------------------------------- non-finite


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
@pytest.mark.parametrize("where", ["x", "teacher", "fake", "weight", "normalizer"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_sample_touches_no_other(
    backend: Backend, nonfinite: str, reduction: str, where: str, bad: float
) -> None:
    clean = batch(backend, 4, 3, 6) | {"nonfinite": nonfinite, "reduction": reduction}
    clean["weight"] = backend.tensor([0.5, 1.0, 1.5, 2.0])
    if where == "normalizer":
        clean["normalizer"] = backend.tensor([1.0, 2.0, 3.0, 4.0])
    spoiled = dict(clean)
    value = clean[where].detach().clone()
    value[(1, *(2,) * (value.ndim - 1))] = bad
    spoiled[where] = value.requires_grad_(where == "x")
    loss, gradient = check_matching(spoiled)
    clean_loss, clean_gradient = check_matching(clean)
    keep = [0, 2, 3]
    assert torch.equal(gradient[keep], clean_gradient[keep])
    if reduction == "sample":
        assert torch.equal(loss[keep], clean_loss[keep])
    if nonfinite == "zero":
        assert bool(loss.isfinite().all())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_zero_normaliser(backend: Backend, nonfinite: str) -> None:
    """x equal to the teacher's prediction: large with eps, infinite (or 0 / 0) without."""
    arguments = batch(backend, 3, 6) | {"nonfinite": nonfinite}
    arguments["x"] = torch.cat([arguments["teacher"][:2], arguments["x"][2:].detach()]).requires_grad_()
    arguments["fake"][1] = arguments["teacher"][1]
    check_matching(arguments | {"eps": 1e-6})
    loss, gradient = check_matching(arguments | {"eps": 0.0})
    if nonfinite == "zero":
        assert math.isfinite(float(loss))
        assert gradient[:2].tolist() == [[0.0] * 6] * 2
    else:
        assert not math.isfinite(float(loss))
    assert bool(gradient[2].isfinite().all())


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4), (0, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
def test_nothing_to_do(backend: Backend, shape: tuple[int, ...], reduction: str) -> None:
    x = backend.leaf(*shape)
    other = backend.randn(*shape)
    mask = torch.ones(shape, dtype=torch.bool, device=backend.device)
    for options in (
        {},
        {"mask": mask},
        {"weight": backend.randn(shape[0])},
        {"teacher_uncond": other} | {"guidance_scale": 2.0},
    ):
        loss = fd.distribution_matching_loss(x, other, other, reduction=reduction, **options)
        assert loss.shape == (shape[:1] if reduction == "sample" else ())
        assert bool((loss == 0).all())
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.shape == shape
    teacher = other.clone().requires_grad_()
    loss = fd.score_identity_loss(x, teacher, other, reduction=reduction)
    assert bool((loss == 0).all())
    torch.autograd.grad(loss.sum(), (x, teacher))
    loss, stats = fd.f_distill_loss(x, other, other, backend.randn(shape[0]), reduction=reduction, return_stats=True)
    assert bool((loss == 0).all())
    assert stats.to_dict()["nonfinite"] == 0.0
    assert fd.score_difference(x, other, other).shape == shape


# ------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics(backend: Backend, reduction: str, dtype: torch.dtype) -> None:
    arguments = batch(backend, 4, 5, 7, dtype=dtype) | {"reduction": reduction}
    arguments["weight"] = backend.tensor([0.5, 1.5, 2.0, 0.1])
    arguments["mask"] = backend.randn(4, 5, 7, seed=5) > 0
    check_statistics(arguments)
    arguments["weight"] = backend.randn(4, 5, seed=6).abs()
    check_statistics(arguments)
    for weight in (backend.randn(4, 3, seed=7)[:, 0], backend.tensor(0.7).expand(4), backend.randn(5, 4, seed=8).T):
        check_statistics(arguments | {"weight": weight})
    arguments["fake"][1, 2, 3] = math.inf
    arguments["mask"][1, 2, 3] = True
    arguments["fake"][2, 0, 0] = math.nan
    arguments["mask"][2, 0, 0] = False
    arguments["weight"][3, 1] = math.nan
    for nonfinite in ("propagate", "zero"):
        fields = check_statistics(arguments | {"nonfinite": nonfinite})
        assert fields["nonfinite"] == 1 + float(arguments["mask"][3, 1].sum())


def check_statistics(arguments: dict[str, Any]) -> dict[str, float]:
    expected = expected_matching(arguments).stats
    loss, stats = fd.distribution_matching_loss(**arguments, return_stats=True)
    assert stats.vector.shape == (len(FIELDS),)
    assert stats.vector.dtype is loss.dtype
    assert not stats.vector.requires_grad
    fields = stats.to_dict()
    tolerance = 1e-11 if loss.dtype is torch.float64 else 4e-6
    for name, value in expected.items():
        assert fields[name] == pytest.approx(value, rel=tolerance, nan_ok=True), name
        assert float(getattr(stats, name)) == pytest.approx(fields[name], nan_ok=True)
    without = fd.distribution_matching_loss(**arguments)
    assert torch.equal(without, loss) or (bool(loss.isnan().any()) and bool(without.isnan().any()))
    return fields


@pytest.mark.parametrize("heads", [2, 2000])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_statistics_of_weights_that_are_not_finite(backend: Backend, nonfinite: str, heads: int) -> None:
    """Left out, or zeros that count; whether the loss's kernel makes the weights or one before it."""
    inputs = [backend.randn(3, 5, seed=seed) for seed in range(3)]
    logits = backend.randn(3, heads, seed=4)
    logits[1, 1] = math.nan
    found = [
        loss(*inputs, logits, nonfinite=nonfinite, return_stats=True)[1].to_dict()
        for loss in (fd.f_distill_loss, fd.reference.f_distill_loss)
    ]
    for name in ("weight_min", "weight_mean", "weight_max", "effective_sample_size", "nonfinite"):
        assert found[0][name] == pytest.approx(found[1][name], rel=4e-6), name
    assert (found[0]["weight_min"] == 0.0) is (nonfinite == "zero")


def test_statistics_of_an_ignored_mask_and_of_nothing_finite(backend: Backend) -> None:
    arguments = batch(backend, 2, 5)
    mask = torch.zeros(2, 5, dtype=torch.bool, device=backend.device)
    _, stats = fd.distribution_matching_loss(**arguments, mask=mask, return_stats=True)
    fields = stats.to_dict()
    assert fields["loss"] == 0.0
    assert fields["nonfinite"] == 0.0
    assert fields["grad_norm"] == fields["grad_mean_abs"] == 0.0
    assert fields["normalizer_mean"] > 0
    arguments["weight"] = backend.tensor([math.nan, math.inf])
    fields = fd.distribution_matching_loss(**arguments, return_stats=True)[1].to_dict()
    assert all(math.isnan(fields[f"weight_{name}"]) for name in ("min", "mean", "max"))
    assert math.isnan(fields["effective_sample_size"])
    assert fields["nonfinite"] == 10


def test_effective_sample_size(backend: Backend) -> None:
    arguments = batch(backend, 4, 5)
    for weight, size in (([1.0, 1.0, 1.0, 1.0], 4.0), ([1.0, 0.0, 0.0, 0.0], 1.0), ([3.0, 1.0, 0.0, 0.0], 1.6)):
        _, stats = fd.distribution_matching_loss(**arguments, weight=backend.tensor(weight), return_stats=True)
        assert float(stats.effective_sample_size) == pytest.approx(size, rel=1e-6)


# -------------------------------------------------------------------------------------------------- score difference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["new", "x", "teacher", "fake"])
def test_score_difference_out(backend: Backend, dtype: torch.dtype, target: str) -> None:
    arguments = {name: value.detach() for name, value in batch(backend, 3, 70, dtype=dtype).items()}
    arguments["mask"] = backend.randn(3, 70, seed=4) > -0.5
    want = fd.score_difference(**arguments)
    out = torch.full_like(arguments["x"], math.nan) if target == "new" else arguments[target]
    got = fd.score_difference(**arguments, out=out)
    assert got is out or got.data_ptr() == out.data_ptr()
    assert torch.equal(out, want)
    strided = backend.randn(70, 3, dtype=dtype).t()
    if target == "new":
        assert torch.equal(fd.score_difference(**arguments, out=strided), want)
        assert torch.equal(strided, want)


@pytest.mark.parametrize("target", ["x", "teacher", "fake", "teacher_uncond"])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25, math.nan])
@pytest.mark.parametrize("guided", [False, True])
def test_score_difference_in_place(backend: Backend, target: str, scale: float, guided: bool) -> None:
    """Without a mask, and with values whose squares leave float32: nothing is read after it was written."""
    if target == "teacher_uncond" and not guided:
        pytest.skip("no such tensor without guidance")
    names = ("x", "teacher", "fake", *(["teacher_uncond"] if guided else []))
    arguments: dict[str, Any] = {name: backend.randn(3, 70, seed=s) * scale for s, name in enumerate(names)}
    arguments["normalizer"] = None
    if guided:
        arguments["guidance_scale"] = 3.0
    if math.isnan(scale):
        for name in names:
            arguments[name] = backend.randn(3, 70, seed=ord(name[0]))
        arguments["fake"][1, 3] = math.nan
    want = fd.score_difference(**arguments)
    fd.score_difference(**arguments, out=arguments[target])
    assert torch.equal(arguments[target].nan_to_num(nan=-7.0), want.nan_to_num(nan=-7.0))


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-12, 1e12, 1e25, 1e30])
def test_magnitudes_whose_squares_leave_float32(backend: Backend, scale: float) -> None:
    """g^2 overflows or vanishes in float32; g, its norm and its gradient do not."""
    arguments = batch(backend, 3, 700) | {"normalizer": None, "eps": 0.0}
    for name in ("teacher", "fake"):
        arguments[name] = arguments[name] * scale
    check_matching(arguments)
    expected = expected_matching(arguments)
    _, stats = fd.distribution_matching_loss(**arguments, return_stats=True)
    fields = stats.to_dict()
    for name in ("grad_norm", "grad_mean_abs"):
        assert fields[name] == pytest.approx(expected.stats[name], rel=4e-6), name


def test_score_difference_drives_backward(backend: Backend) -> None:
    """x.backward(g) is the gradient of the sum."""
    arguments = batch(backend, 3, 7)
    (want,) = torch.autograd.grad(fd.distribution_matching_loss(**arguments, reduction="sum"), arguments["x"])
    g = fd.score_difference(**arguments)
    arguments["x"].clone().backward(g)
    assert torch.equal(arguments["x"].grad, want)


# ---------------------------------------------------------------------------------------------------- score identity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [1.0, 1.2, 0.0, -0.5])
@pytest.mark.parametrize("options", ["plain", "mask", "rows", "tensor", "none"])
def test_score_identity(backend: Backend, dtype: torch.dtype, alpha: float, options: str) -> None:
    arguments: dict[str, Any] = batch(backend, 3, 4, 9, dtype=dtype)
    for name in ("teacher", "fake"):
        arguments[name].requires_grad_()
    arguments |= {
        "plain": {},
        "mask": {"mask": backend.randn(3, 4, 9, seed=4) > 0},
        "rows": {"weight": backend.randn(3, 4, seed=5).abs(), "reduction": "sample"},
        "tensor": {"normalizer": backend.tensor([0.3, 1.0, 7.0]), "reduction": "sum"},
        "none": {"normalizer": None, "eps": 0.5, "weight": 0.3},
    }[options]
    check_identity(arguments, alpha)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("where", ["x", "teacher", "fake"])
def test_score_identity_with_a_bad_sample(backend: Backend, nonfinite: str, where: str) -> None:
    clean: dict[str, Any] = batch(backend, 4, 9) | {"nonfinite": nonfinite, "reduction": "sample"}
    for name in ("teacher", "fake"):
        clean[name].requires_grad_()
    spoiled = dict(clean)
    spoiled[where] = clean[where].detach().clone()
    spoiled[where][2, 4] = math.inf
    spoiled[where].requires_grad_()
    got, want = check_identity(spoiled, 1.1), check_identity(clean, 1.1)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])
        assert nonfinite == "propagate" or bool(a.isfinite().all())


def test_score_identity_mixed_dtypes(backend: Backend) -> None:
    for x_dtype, teacher_dtype, fake_dtype in itertools.permutations(DTYPES, 3):
        arguments = {
            "x": backend.leaf(2, 11, dtype=x_dtype),
            "teacher": backend.leaf(2, 11, dtype=teacher_dtype, seed=1),
            "fake": backend.leaf(2, 11, dtype=fake_dtype, seed=2),
        }
        check_identity(arguments, 1.0)


# --------------------------------------------------------------------------------------------------------- GAN losses


@pytest.mark.parametrize("dtype", DTYPES)
def test_gan_losses(backend: Backend, dtype: torch.dtype) -> None:
    real = backend.leaf(7, 3, dtype=dtype)
    fake = (backend.randn(5, dtype=dtype, seed=1) * 10).requires_grad_()
    u = unit(real)
    loss = fd.gan_generator_loss(fake)
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    want = oracle.gan_generator(to_numpy(fake))
    assert float(loss.detach()) == pytest.approx(want, rel=16 * u)
    (gradient,) = torch.autograd.grad(loss, fake)
    assert_close(gradient, as_tensor(-1 / (1 + np.exp(to_numpy(fake))) / 5), ulps=4, noise=u, what="gradient")
    loss = fd.gan_discriminator_loss(real, fake)
    assert float(loss.detach()) == pytest.approx(oracle.gan_discriminator(to_numpy(real), to_numpy(fake)), rel=16 * u)
    gradients = torch.autograd.grad(loss, (real, fake))
    assert_close(gradients[0], as_tensor(-1 / (1 + np.exp(to_numpy(real))) / 21), ulps=4, noise=u, what="gradient")
    assert_close(gradients[1], as_tensor(1 / (1 + np.exp(-to_numpy(fake))) / 5), ulps=4, noise=u, what="gradient")


def test_gan_losses_of_extreme_and_empty_logits(backend: Backend) -> None:
    extreme = backend.tensor([-1e4, -100.0, -30.0, 30.0, 100.0, 1e4], torch.float64)
    assert float(fd.gan_generator_loss(extreme)) == pytest.approx(oracle.gan_generator(to_numpy(extreme)), rel=1e-14)
    for value in (-35.0, -25.0, -21.0, -19.0, 19.0, 21.0, 25.0, 35.0):
        one = backend.tensor([value], torch.float64)
        assert float(fd.gan_generator_loss(one)) == pytest.approx(oracle.softplus(-value), rel=1e-14)
    half = backend.tensor([6e4, -6e4], torch.float16)
    assert float(fd.gan_generator_loss(half)) == pytest.approx(oracle.gan_generator(to_numpy(half)))
    empty = backend.leaf(0)
    assert float(fd.gan_generator_loss(empty).detach()) == 0.0
    assert float(fd.gan_discriminator_loss(empty, empty).detach()) == 0.0
    fd.gan_generator_loss(empty).backward()


def test_the_optimal_discriminator_reads_the_ratio(backend: Backend) -> None:
    """The discriminator loss of two known samples is least at log(real/fake), per point."""
    p, q = 0.7, 0.2
    grid = np.linspace(-3, 3, 6001)
    best = grid[np.argmin([p * oracle.softplus(-v) + q * oracle.softplus(v) for v in grid])]
    assert best == pytest.approx(math.log(p / q), abs=1e-3)


# ------------------------------------------------------------------------------------------- order, threads, memory


BIG = [(1, 16, 21, 60, 104), (64, 3, 64, 64), (7, 12345), (3, 1, 100003), (257, 33)]


def everything(arguments: dict[str, Any], logits: Tensor, t: Tensor) -> list[Tensor]:
    """All outputs of the operations for one set of inputs."""
    results = []
    x, teacher, fake = (arguments[name] for name in ("x", "teacher", "fake"))
    for reduction in ("mean", "sample"):
        histogram = fd.RatioHistogram(0.0, 1.0, ema_rate=0.9).to(x.device)
        loss, stats = fd.f_distill_loss(
            **arguments, logits=logits, t=t, histogram=histogram, reduction=reduction, return_stats=True
        )
        results += [loss.detach(), *torch.autograd.grad(loss.sum(), x), stats.vector, histogram.bins]
    loss = fd.score_identity_loss(x, teacher, fake)
    results += [
        loss.detach(),
        *torch.autograd.grad(loss, x),
        fd.f_weights(logits),
        fd.score_difference(x, teacher, fake),
    ]
    return results


def same_bits(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(nan=-1.25), b.nan_to_num(nan=-1.25)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", BIG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not backend.compiled:
        pytest.skip("PyTorch's own reductions depend on the number of threads")
    if backend.emulated:
        pytest.skip("emulated kernels know nothing of threads")
    arguments = batch(backend, *shape, dtype=dtype)
    arguments["mask"] = (backend.randn(*shape[:-1], 1, seed=5) > -1).expand(shape)
    logits, t = backend.randn(shape[0], 2, seed=6), backend.randn(shape[0], seed=7).sigmoid()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = everything(arguments, logits, t)
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            assert same_bits(everything(arguments, logits, t), want), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(64, 3, 64, 64), (2, 40 * 16384), (40, 16384)], ids=str)
def test_the_count_of_the_mask_is_complete_before_it_divides(backend: Backend, shape: tuple[int, ...]) -> None:
    """Without a normaliser nothing but the count stands between the threads and the gradient; many short runs."""
    if not backend.compiled or backend.emulated:
        pytest.skip("plain PyTorch, or emulated kernels, which know nothing of threads")
    arguments = batch(backend, *shape) | {"normalizer": None}
    mask = backend.randn(*shape, seed=5) > -0.2
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = fd.score_difference(**arguments, mask=mask)
        want_loss = fd.distribution_matching_loss(**arguments, mask=mask)
        (want_gradient,) = torch.autograd.grad(want_loss, arguments["x"])
        torch.set_num_threads(4)
        for _ in range(40):
            loss = fd.distribution_matching_loss(**arguments, mask=mask)
            (gradient,) = torch.autograd.grad(loss, arguments["x"])
            assert torch.equal(gradient, want_gradient)
            assert torch.equal(loss, want_loss)
        assert torch.equal(fd.score_difference(**arguments, mask=mask), want)
    finally:
        torch.set_num_threads(before)


def test_same_bits_in_two_runs(backend: Backend) -> None:
    arguments = batch(backend, 4, 3, 64, 64)
    logits, t = backend.randn(4, 2, seed=6), backend.randn(4, seed=7).sigmoid()
    assert same_bits(everything(arguments, logits, t), everything(arguments, logits, t))


def test_a_sample_does_not_depend_on_the_batch_around_it(backend: Backend) -> None:
    if not backend.compiled:
        pytest.skip("PyTorch's own reductions depend on the shape")
    arguments = batch(backend, 6, 3, 50, 41)
    whole = fd.distribution_matching_loss(**arguments, reduction="sample")
    for b in range(6):
        alone = fd.distribution_matching_loss(
            **{name: value[b : b + 1] for name, value in arguments.items()}, reduction="sample"
        )
        assert torch.equal(alone[0], whole[b])


def test_two_python_threads_at_once(backend: Backend) -> None:
    if backend.name == "triton" and backend.emulated:
        pytest.skip("Triton's interpreter serves one thread")
    cases = [
        batch(backend, *shape, seed=10 * i) for i, shape in enumerate([(4, 3, 64, 64), (64, 1001), (2, 50000), (1, 7)])
    ]
    logits = [backend.randn(len(case["x"]), 2, seed=i) for i, case in enumerate(cases)]
    t = [backend.randn(len(case["x"]), seed=i + 5).sigmoid() for i, case in enumerate(cases)]
    want = [everything(*case) for case in zip(cases, logits, t, strict=True)]
    wrong: list[str] = []

    def work(i: int) -> None:
        try:
            with fd.use_backend(backend.name):
                for _ in range(8):
                    if not same_bits(everything(cases[i], logits[i], t[i]), want[i]):
                        wrong.append(f"case {i} differs")
        except Exception as error:
            wrong.append(f"case {i}: {error!r}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_the_interpreter_runs_during_a_kernel(backend: Backend) -> None:
    """Another Python thread makes progress while a kernel runs: the longest it is held up is far below a call."""
    if not backend.compiled:
        pytest.skip("plain PyTorch")
    if backend.emulated:
        pytest.skip("takes minutes when emulated")
    inputs = [backend.randn(1, 1 << 20, dtype=torch.bfloat16, seed=s).expand(400, 1 << 20) for s in range(3)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            start = time.perf_counter()
            fd.distribution_matching_loss(*inputs)
            call = time.perf_counter() - start
            worker = threading.Thread(target=lambda: [fd.distribution_matching_loss(*inputs) for _ in range(5)])
            longest, last = 0.0, time.perf_counter()
            worker.start()
            while worker.is_alive():
                now = time.perf_counter()
                longest, last = max(longest, now - last), now
            if longest < call / 2:
                return
        pytest.fail(f"held up for {longest:.3f} s by calls of {call:.3f} s")
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_memory(backend: Backend, dtype: torch.dtype, upstream: float) -> None:
    """Forward and backward hold one tensor of x's size beyond the inputs: the saved gradient. Measured by the kernel's
    own high-water mark of the process, so that no allocator escapes it."""
    if not backend.compiled or backend.emulated:
        pytest.skip("plain PyTorch, or an emulator's memory")
    peak = high_water_mark()
    if peak is None:
        pytest.skip("no resettable high-water mark here")
    arguments = batch(backend, 8, 1 << 22, dtype=dtype)
    size = arguments["x"].numel() * arguments["x"].element_size()
    small = batch(backend, 8, 1 << 12, dtype=dtype)
    logits = backend.randn(8)

    def step(inputs: dict[str, Any]) -> None:
        loss = fd.f_distill_loss(**inputs, logits=logits)
        (loss * upstream).backward()
        inputs["x"].grad = None

    step(small)
    used = high_water_mark(lambda: step(arguments))
    assert used is not None
    assert used <= 1.1 * size + (8 << 20), f"{used / size:.2f} tensors"
    used = high_water_mark(lambda: fd.distribution_matching_loss(**{k: v.detach() for k, v in arguments.items()}))
    assert used is not None
    assert used <= 8 << 20, f"without a gradient: {used >> 20} MiB"


def high_water_mark(call: Any = lambda: None) -> int | None:
    """Bytes by which the resident set grew, at most, during the call; None where Linux does not say."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024


@pytest.mark.slow
def test_more_elements_than_an_int32_counts(backend: Backend) -> None:
    """2^31 + 2^20 elements, expanded, without a gradient."""
    if not backend.compiled:
        pytest.skip("PyTorch materialises the difference")
    if backend.emulated:
        pytest.skip("takes minutes when emulated")
    inner = 1 << 20
    rows = (1 << 11) + 1
    x, teacher, fake = (backend.randn(1, 1, inner, dtype=torch.bfloat16, seed=s) for s in range(3))
    one = oracle.distribution_matching(*(to_numpy(v) for v in (x, teacher, fake)))
    loss, stats = fd.distribution_matching_loss(
        *(v.expand(1, rows, inner) for v in (x, teacher, fake)), return_stats=True
    )
    n = rows * inner
    assert float(loss) == pytest.approx(float(one.loss), rel=oracle.growth(n) * oracle.U32)
    assert float(stats.grad_mean_abs) == pytest.approx(one.stats["grad_mean_abs"], rel=oracle.growth(n) * oracle.U32)
    mask = torch.zeros(1, 1, 1, dtype=torch.bool, device=backend.device).expand(1, rows, inner)
    assert float(fd.distribution_matching_loss(*(v.expand(1, rows, inner) for v in (x, teacher, fake)), mask=mask)) == 0
