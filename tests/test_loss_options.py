"""What the losses take beside their operands: weights times weights, no reduction, clipping by norm, no normaliser,
names of predictions, and g with its weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend, as_tensor, check_gradient, check_matching, expected_matching, to_numpy
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops.testing import assert_close

SHAPE = (4, 3, 5, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def batch(backend: Backend, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "x": backend.leaf(*SHAPE, dtype=dtype),
        "teacher": backend.randn(*SHAPE, dtype=dtype, seed=1),
        "fake": backend.randn(*SHAPE, dtype=dtype, seed=2),
    }


def gradient_of(loss: Tensor, x: Tensor, upstream: Tensor | None = None) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss) if upstream is None else upstream)
    return gradient


# --------------------------------------------------------------------------------------------------- weights, together


@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (4, 1, 1, 1), (4, 1, 5, 2), "number"])
@pytest.mark.parametrize("divergence", ["js", "of_this_test"])
def test_a_weight_multiplies_the_f_weights(backend: Backend, shape: Any, divergence: str) -> None:
    """w(t) h(r): as the loss with both multiplied beforehand; the histogram as without."""
    if divergence == "of_this_test":
        fd.register_divergence(divergence, h=lambda r: r / (1 + r))
    arguments = batch(backend)
    logits, t = backend.randn(4, 2, seed=3), backend.randn(4, seed=4).sigmoid()
    weight = 2.5 if shape == "number" else backend.randn(*shape, seed=5).abs()
    first, second, third = (fd.RatioHistogram(0.0, 1.0, 3).to(backend.device) for _ in range(3))
    h = fd.f_weights(logits, t, divergence=divergence, histogram=first)
    rows = weight.double() if isinstance(weight, Tensor) else weight
    if isinstance(rows, Tensor) and rows.ndim:
        product = rows * h.double().reshape((4,) + (1,) * (rows.ndim - 1))
    else:
        product = rows * h.double()
    expected, want = fd.distribution_matching_loss(**arguments, weight=product, return_stats=True)
    for function, histogram in ((fd.f_distill_loss, second), (fd.FDistillLoss(histogram=third), third)):
        loss, stats = function(
            **arguments,
            logits=logits,
            t=t,
            divergence=divergence,
            histogram=histogram,
            weight=weight,
            return_stats=True,
        )
        assert torch.equal(loss, expected)
        assert torch.equal(gradient_of(loss, arguments["x"]), gradient_of(expected, arguments["x"], torch.ones(())))
        assert torch.equal(histogram.bins, first.bins)
        fields, wanted = stats.to_dict(), want.to_dict()
        assert 0 < fields["ratio_mean"] < 20
        for name in ("weight_min", "weight_mean", "weight_max", "grad_norm"):
            assert fields[name] == pytest.approx(wanted[name], rel=1e-6)
        expected, want = fd.distribution_matching_loss(**arguments, weight=product, return_stats=True)
    torch.testing.assert_close(
        fd.reference.f_distill_loss(
            **arguments,
            logits=logits,
            t=t,
            divergence=divergence,
            weight=weight,
            histogram=fd.RatioHistogram(0.0, 1.0, 3).to(backend.device),
        ),
        expected,
    )


def test_a_weight_that_is_wrong_leaves_the_histogram(backend: Backend) -> None:
    histogram = fd.RatioHistogram(0.0, 1.0).to(backend.device)
    t = backend.randn(4).sigmoid()
    for wrong in (float("nan"), backend.randn(3), "1"):
        with pytest.raises((TypeError, ValueError), match="weight"):
            fd.f_distill_loss(**batch(backend), logits=backend.randn(4), t=t, histogram=histogram, weight=wrong)
    assert histogram.bins.tolist() == [1.0] * 10


# ------------------------------------------------------------------------------------------------------- g and weights


@pytest.mark.parametrize("weight", [None, 0.5])
def test_g_and_the_weights_from_one_call(backend: Backend, weight: float | None) -> None:
    arguments = {name: value.detach() for name, value in batch(backend).items()}
    logits, t = backend.randn(4, 2, seed=3), backend.randn(4, seed=4).sigmoid()
    first, second = (fd.RatioHistogram(0.0, 1.0, 3).to(backend.device) for _ in range(2))
    g, weights = fd.f_score_difference(**arguments, logits=logits, t=t, histogram=first, weight=weight)
    expected = fd.f_weights(logits, t, histogram=second)
    assert torch.equal(weights, expected)
    assert torch.equal(first.bins, second.bins)
    total = expected if weight is None else expected.double() * weight
    assert torch.equal(g, fd.score_difference(**arguments, weight=total))
    out = torch.empty_like(g)
    found = fd.f_score_difference(**arguments, logits=logits, weight=weight, out=out)
    assert found.g is out
    torch.testing.assert_close(found.g, fd.reference.f_score_difference(**arguments, logits=logits, weight=weight).g)
    with pytest.raises(ValueError, match="out"):
        fd.f_score_difference(**arguments, logits=logits, t=t, histogram=first, out=out[:1])
    assert torch.equal(first.bins, second.bins)


# -------------------------------------------------------------------------------------------------------- no reduction


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_not_reduced(backend: Backend, dtype: torch.dtype, masked: bool) -> None:
    """0.5 g^2 of every element, and g times whatever comes in."""
    arguments = batch(backend, dtype)
    if masked:
        arguments["mask"] = backend.randn(5, 2, seed=7) > 0
    expected = expected_matching(arguments | ({"mask": arguments["mask"].expand(SHAPE)} if masked else {}))
    loss, stats = fd.distribution_matching_loss(**arguments, reduction="none", return_stats=True)
    assert loss.shape == SHAPE
    assert loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    g, noise = expected.g, expected.g_noise
    assert_close(loss, as_tensor(0.5 * g**2), ulps=1.0, noise=as_tensor(np.abs(g) * noise + noise**2), what="loss")
    upstream = backend.randn(*SHAPE, seed=9, dtype=loss.dtype)
    gradient = gradient_of(loss, arguments["x"], upstream)
    assert gradient.dtype is dtype
    u = to_numpy(upstream)
    unit = 2.0 ** (-52 if dtype is torch.float64 else -23)
    assert_close(gradient, as_tensor(u * g), noise=as_tensor(np.abs(u) * (noise + unit * np.abs(g))), what="gradient")
    count = int(arguments["mask"].expand(SHAPE).sum()) if masked else loss.numel()
    mean = fd.distribution_matching_loss(**arguments)
    assert float(stats.loss) == pytest.approx(float(mean), rel=1e-5)
    assert float(loss.sum() / count) == pytest.approx(float(mean), rel=1e-5)
    torch.testing.assert_close(fd.reference.distribution_matching_loss(**arguments, reduction="none"), loss)


def test_not_reduced_f_distill_and_score_identity(backend: Backend) -> None:
    arguments = {name: value.detach().requires_grad_() for name, value in batch(backend).items()}
    logits = backend.randn(4, seed=3)
    loss, stats = fd.f_distill_loss(**arguments, logits=logits, reduction="none", return_stats=True)
    torch.testing.assert_close(
        loss, fd.distribution_matching_loss(**arguments, weight=fd.f_weights(logits), reduction="none")
    )
    assert 0 < float(stats.ratio_mean) < 20
    terms = fd.score_identity_loss(**arguments, alpha=1.2, reduction="none")
    mean = fd.score_identity_loss(**arguments, alpha=1.2)
    torch.testing.assert_close(terms.mean(), mean)
    inputs = tuple(arguments.values())
    ours = torch.autograd.grad(terms.mean(), inputs)
    for gradient, expected in zip(ours, torch.autograd.grad(mean, inputs), strict=True):
        torch.testing.assert_close(gradient, expected)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (g,) = torch.autograd.grad(loss.sum(), arguments["x"], create_graph=True)
        g.sum().backward()


def test_not_reduced_and_compiled(backend: Backend) -> None:
    torch._dynamo.reset()
    arguments: dict[str, Any] = batch(backend) | {"reduction": "none"}
    compiled = torch.compile(fd.distribution_matching_loss, backend="aot_eager", fullgraph=True)
    loss, expected = compiled(**arguments), fd.distribution_matching_loss(**arguments)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, arguments["x"]), gradient_of(expected, arguments["x"]))
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------- clipping by norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_max_norm(backend: Backend, dtype: torch.dtype, masked: bool, weighted: bool) -> None:
    """Against the oracle with the factor that its own g asks for."""
    arguments = batch(backend, dtype)
    if masked:
        arguments["mask"] = (backend.randn(*SHAPE, seed=7) > 0) | (torch.arange(2) == 0)
    if weighted:
        arguments["weight"] = backend.randn(4, 3, seed=8).abs() + 0.1
    used = to_numpy(arguments["mask"]) if masked else np.ones(SHAPE, dtype=bool)
    norms = np.sqrt((np.where(used, expected_matching(arguments).g, 0.0) ** 2).reshape(4, -1).sum(1))
    limit = float(np.median(norms))
    factor = torch.from_numpy(np.minimum(1.0, limit / norms)).to(backend.device)
    product = factor if not weighted else factor[:, None] * arguments["weight"].double()
    clipped = {**arguments, "weight": product}
    # The norm itself is rounded, to float32 at the last.
    unit = 2.0 ** (-50 if dtype is torch.float64 else -21)
    expected = expected_matching(clipped, weight_noise=unit * np.abs(to_numpy(product)))
    loss = fd.distribution_matching_loss(**arguments, max_norm=limit)
    assert_close(loss, as_tensor(expected.loss), ulps=1.0, noise=as_tensor(expected.loss_noise), what="loss")
    check_gradient(gradient_of(loss, arguments["x"]), arguments["x"], expected)
    g = fd.score_difference(**arguments, max_norm=limit)
    got = g.double().reshape(4, -1).norm(dim=1)
    assert bool((got <= limit * (1 + 8 * torch.finfo(dtype).eps)).all())
    assert float(got.max()) == pytest.approx(limit, rel=8 * torch.finfo(dtype).eps)


def test_max_norm_of_f_distill(backend: Backend) -> None:
    arguments, logits = batch(backend), backend.randn(4, seed=3)
    weights = fd.f_weights(logits)
    expected = fd.distribution_matching_loss(**arguments, weight=weights, max_norm=0.5)
    assert torch.equal(fd.f_distill_loss(**arguments, logits=logits, max_norm=0.5), expected)
    g, found = fd.f_score_difference(**arguments, logits=logits, max_norm=0.5)
    assert torch.equal(found, weights)
    assert torch.equal(g, fd.score_difference(**arguments, weight=weights, max_norm=0.5))
    torch.testing.assert_close(fd.reference.f_distill_loss(**arguments, logits=logits, max_norm=0.5), expected)


def test_max_norm_of_what_has_none(backend: Backend) -> None:
    """Equal predictions, an empty mask, samples that are not finite."""
    arguments = batch(backend)
    equal = arguments | {"fake": arguments["teacher"]}
    assert float(fd.distribution_matching_loss(**equal, max_norm=0.5)) == 0.0
    nothing = torch.zeros((), dtype=torch.bool, device=backend.device)
    assert float(fd.distribution_matching_loss(**arguments, mask=nothing, max_norm=0.5)) == 0.0
    broken = arguments["fake"].clone()
    broken[1, 0, 0, 0] = torch.nan
    g = fd.score_difference(**arguments | {"fake": broken}, max_norm=0.5)
    whole = fd.score_difference(**arguments, max_norm=0.5)
    assert bool(g[1].isnan().all())
    assert torch.equal(g[[0, 2, 3]], whole[[0, 2, 3]])
    zeroed = fd.score_difference(**arguments | {"fake": broken}, max_norm=0.5, nonfinite="zero")
    assert bool(zeroed.isfinite().all())


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", True, [1.0], 10**400])
def test_max_norm_is_checked(backend: Backend, value: Any) -> None:
    arguments, logits = batch(backend), backend.randn(4)
    histogram = fd.RatioHistogram(0.0, 1.0).to(backend.device)
    weighted = {"logits": logits, "t": logits, "histogram": histogram}
    for function, more in (
        (fd.distribution_matching_loss, {}),
        (fd.score_difference, {}),
        (fd.f_distill_loss, weighted),
        (fd.f_score_difference, weighted),
        (fd.reference.f_distill_loss, weighted),
    ):
        with pytest.raises((TypeError, ValueError), match="max_norm"):
            function(**arguments, **more, max_norm=value)
    assert histogram.bins.tolist() == [1.0] * 10


# ---------------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_normaliser_divides_by_nothing(backend: Backend, dtype: torch.dtype) -> None:
    """The factor is exactly the weight; eps plays no part."""
    arguments = batch(backend, dtype)
    check_matching(arguments | {"normalizer": None})
    g = fd.score_difference(**arguments, normalizer=None, weight=2.0, eps=0.5)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(g, (2 * (arguments["fake"].to(wide) - arguments["teacher"].to(wide))).to(dtype))


@pytest.mark.parametrize(
    ("name", "ours"), [("sample", "x0"), ("epsilon", "eps"), ("v_prediction", "v"), ("flow_prediction", "flow")]
)
def test_the_names_of_diffusers(backend: Backend, name: str, ours: str) -> None:
    arguments = batch(backend)
    schedule: dict[str, Any] = {"x_t": backend.randn(*SHAPE, seed=5), "alpha": 0.8, "sigma": 0.6}
    converted = fd.to_x0(arguments["teacher"], prediction=name, **schedule)
    assert torch.equal(converted, fd.to_x0(arguments["teacher"], prediction=ours, **schedule))
    if ours == "x0":
        schedule = {}
    assert torch.equal(
        fd.distribution_matching_loss(**arguments, prediction=name, **schedule),
        fd.distribution_matching_loss(**arguments, prediction=ours, **schedule),
    )


def test_descriptions_are_not_printed_as_literals(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"normalizer must be 'mean_abs', None or a tensor \[B\]; got 'rms'"):
        fd.distribution_matching_loss(**batch(backend), normalizer="rms")


TYPED = """
import torch
import fdistill_ops as fd

x = torch.zeros(2, 3)
flag: bool = bool(x.numel())
reveal_type(fd.distribution_matching_loss(x, x, x, weight=0.5))
reveal_type(fd.distribution_matching_loss(x, x, x, return_stats=True, mask=x > 0))
reveal_type(fd.distribution_matching_loss(x, x, x, return_stats=flag))
reveal_type(fd.f_distill_loss(x, x, x, x[:, 0], divergence="js"))
reveal_type(fd.f_distill_loss(x, x, x, x[:, 0], return_stats=True))
reveal_type(fd.score_identity_loss(x, x, x, alpha=1.2))
reveal_type(fd.score_identity_loss(x, x, x, return_stats=True))
reveal_type(fd.FDistillLoss("js")(x, x, x, x[:, 0]))
reveal_type(fd.FDistillLoss("js")(x, x, x, x[:, 0], return_stats=True))
reveal_type(fd.f_score_difference(x, x, x, x[:, 0]).weights)
fd.distribution_matching_loss(x, x, x, temperature=0.5)
fd.f_distill_loss(x, x, x, x[:, 0], eps="small")
"""


@pytest.mark.slow
def test_type_checkers_see_the_results(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "typed.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--cache-dir", str(tmp_path / "cache"), "typed.py"]
    sources = os.environ | {"MYPYPATH": str(Path(fd.__file__).parent.parent)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=sources)
    lines = done.stdout.splitlines()
    revealed = [line.split("Revealed type is ")[1].strip('"') for line in lines if "Revealed" in line]
    tensor, pair = "torch._tensor.Tensor", "tuple[torch._tensor.Tensor, fdistill_ops.stats.LossStats]"
    expected = [tensor, pair, f"{tensor} | {pair}", tensor, pair, tensor, pair, tensor, pair, tensor]
    assert revealed == expected, done.stdout
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    assert any('"temperature"' in line for line in errors), done.stdout
    assert any(line.startswith("typed.py:18") and '"f_distill_loss"' in line for line in errors), done.stdout


@pytest.mark.parametrize("scale", [1e25, 1e-28])
def test_max_norm_where_squares_leave_the_range(backend: Backend, scale: float) -> None:
    zero = torch.zeros(2, 3, device=backend.device)
    fake = backend.tensor([[scale, 0.0, 0.0], [scale, -scale, 0.0]])
    g = fd.score_difference(zero, zero, fake, normalizer=None, max_norm=scale / 100)
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.5**0.5, -(0.5**0.5), 0.0]]) * (scale / 100)
    torch.testing.assert_close(g.cpu(), expected, rtol=1e-6, atol=0)
