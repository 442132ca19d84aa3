"""Whatever the shapes, dtypes, layouts, masks and logits: the operations are the oracle's. And fd.testing itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend, as_tensor, check_gradient, check_loss, check_matching, expected_matching, to_numpy, unit
from test_weights import check as check_weights

import fdistill_ops as fd
from fdistill_ops import _oracle as oracle
from fdistill_ops import testing

pytest.importorskip("hypothesis")
from hypothesis import assume, given, settings
from hypothesis import strategies as st

DIVERGENCES = ("rkl", "kl", "js", "sf", "sh", "jf", "neyman", "pearson")


@settings(max_examples=150)
@given(data=st.data())
def test_matching(backend: Backend, data: st.DataObject) -> None:
    check_matching(data.draw(testing.loss_arguments(device=backend.device)))


@settings(max_examples=100)
@given(data=st.data())
def test_matching_of_non_finite_values(backend: Backend, data: st.DataObject) -> None:
    """NaN and infinities: finite exactly where the oracle is, and right there."""
    arguments = data.draw(testing.loss_arguments(nonfinite=True, device=backend.device))
    expected = expected_matching(arguments)
    x = arguments["x"]
    loss = fd.distribution_matching_loss(**arguments)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    for got, want, noise, what in (
        (gradient, expected.gradients["x"], expected.gradient_noise["x"], "gradient"),
        (loss, expected.loss, expected.loss_noise, "loss"),
    ):
        got = got.detach().cpu()
        # A value that overflows the dtype, or is within its noise of 0/0, may go either way.
        sure = np.isfinite(noise) & ~(np.abs(want) + noise > torch.finfo(got.dtype).max)
        bad = ~np.isfinite(want)
        assert not bool(got[torch.from_numpy(np.asarray(bad))].isfinite().any()), what
        keep = torch.from_numpy(np.asarray(sure & ~bad))
        testing.assert_close(got[keep], as_tensor(want)[keep], ulps=1.0, noise=as_tensor(noise)[keep], what=what)


@settings(max_examples=100)
@given(data=st.data())
def test_f_distill(backend: Backend, data: st.DataObject) -> None:
    arguments = data.draw(testing.loss_arguments(f_distill=True, device=backend.device))
    weight_options = {name: arguments[name] for name in ("divergence", "logit_clip", "ratio_clip", "normalize")}
    logits, x = arguments["logits"], arguments["x"]
    eps, nonfinite = arguments["eps"], arguments["nonfinite"]
    histogram, t = None, None
    settings_of_histogram: dict[str, Any] = {}
    if data.draw(st.booleans()):
        t = data.draw(testing.times(len(logits), 0.0, 1.0, device=backend.device))
        histogram = fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=data.draw(st.sampled_from((0.0, 0.5, 0.99))))
        histogram.to(backend.device)
        settings_of_histogram = {"bins": np.ones(4), "ema_rate": histogram.ema_rate}
    name = weight_options["divergence"]
    options = weight_options | ({"divergence": "alpha", "a": 0.3} if name == "alpha:0.3" else {})
    u = oracle.U64 if logits.dtype is torch.float64 else oracle.U32
    weights = oracle.f_weights(
        to_numpy(logits), to_numpy(t), eps=eps, nonfinite=nonfinite, u=u, **options, **settings_of_histogram
    )
    skip = {"logits", *weight_options}
    plain = {key: value for key, value in arguments.items() if key not in skip}
    expected = expected_matching(plain | {"weight": weights.weights}, weight_noise=weights.noise)
    loss, stats = fd.f_distill_loss(**arguments, t=t, histogram=histogram, return_stats=True)
    if np.isfinite(expected.loss).all():
        check_loss(loss, expected, plain)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    if np.isfinite(weights.weights).all():
        check_gradient(gradient, x, expected)
    if histogram is not None:
        assert bool(histogram.bins.isfinite().all())
        testing.assert_close(histogram.bins, as_tensor(weights.bins), noise=as_tensor(weights.bins_noise), what="bins")
    fields = stats.to_dict()
    assert fields["ratio_mean"] == pytest.approx(weights.ratio_mean, rel=1e-4, nan_ok=True)
    assert fields["clipped_low"] == pytest.approx(weights.clipped_low, rel=1e-6, nan_ok=True)


@settings(max_examples=150)
@given(data=st.data())
def test_weights(backend: Backend, data: st.DataObject) -> None:
    """Any logits, any times, any clips: never a non-finite histogram, NaN exactly where the oracle has it."""
    batch = data.draw(st.integers(0, 40))
    logits = data.draw(testing.logits(batch, device=backend.device))
    options: dict[str, Any] = {
        "divergence": data.draw(st.sampled_from(DIVERGENCES)),
        "logit_clip": data.draw(st.sampled_from((10.0, 1.0, 30.0))),
        "ratio_clip": data.draw(st.sampled_from(((0.1, 20.0), (0.0, 2.0), (1.0, 1.0), None))),
        "normalize": data.draw(st.sampled_from(("mean", None))),
        "eps": data.draw(st.sampled_from((1e-6, 0.0, 1.0))),
        "nonfinite": data.draw(st.sampled_from(("propagate", "zero"))),
    }
    histogram = fd.RatioHistogram(-1.0, 3.0, bins=data.draw(st.integers(1, 9)), ema_rate=data.draw(st.floats(0, 1)))
    histogram.to(backend.device)
    for _ in range(2):
        t = data.draw(testing.times(batch, -1.0, 3.0, device=backend.device))
        before = to_numpy(histogram.bins.clone())
        u = oracle.U64 if logits.dtype is torch.float64 else oracle.U32
        expected = oracle.f_weights(
            to_numpy(logits),
            to_numpy(t),
            bins=before,
            min_t=-1.0,
            max_t=3.0,
            ema_rate=histogram.ema_rate,
            u=u,
            **options,
        )
        weights = fd.f_weights(logits, t, histogram=histogram, **options)
        testing.assert_close(weights, as_tensor(expected.weights), noise=as_tensor(expected.noise), what="weights")
        testing.assert_close(
            histogram.bins, as_tensor(expected.bins), noise=as_tensor(expected.bins_noise), what="bins"
        )
        assert bool(histogram.bins.isfinite().all())


@given(data=st.data())
def test_weights_of_one_sample_do_not_depend_on_bad_ones(backend: Backend, data: st.DataObject) -> None:
    batch = data.draw(st.integers(2, 12))
    logits = data.draw(testing.logits(batch, dtype=torch.float32, nonfinite=False, device=backend.device))
    spoiled = logits.clone()
    bad = data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch))
    spoiled[torch.tensor(bad)] = data.draw(st.sampled_from((math.nan, math.inf, -math.inf)))
    keep = ~torch.tensor(bad)
    divergence = data.draw(st.sampled_from(DIVERGENCES))
    t = data.draw(testing.times(batch, 0.0, 1.0, nonfinite=False, device=backend.device))
    first, second = (fd.RatioHistogram(0.0, 1.0, bins=3, ema_rate=0.5).to(backend.device) for _ in range(2))
    got = fd.f_weights(spoiled, t, histogram=first, divergence=divergence)
    want = fd.f_weights(logits[keep], t[keep], histogram=second, divergence=divergence)
    testing.assert_close(got[keep], want, ulps=4, terms=batch)
    testing.assert_close(first.bins, second.bins, ulps=2)
    assert bool(got[~keep].isnan().all())


@settings(max_examples=100)
@given(data=st.data())
def test_score_identity(backend: Backend, data: st.DataObject) -> None:
    shape = data.draw(testing.shapes(max_dims=4))
    inputs = [data.draw(testing.tensors(shape, device=backend.device)).requires_grad_() for _ in range(3)]
    options: dict[str, Any] = {
        "mask": data.draw(testing.masks(shape, device=backend.device)),
        "alpha": data.draw(st.floats(-2, 2, width=32)),
        "normalizer": data.draw(st.sampled_from(("mean_abs", None))),
        "reduction": data.draw(st.sampled_from(("mean", "sum", "sample"))),
        "weight": data.draw(st.none() | st.floats(0, 3, width=32)),
    }
    plain = {name: to_numpy(value) for name, value in options.items()}
    expected = oracle.score_identity(*(to_numpy(v) for v in inputs), **plain, u=unit(*inputs))
    loss = fd.score_identity_loss(*inputs, **options)
    check_loss(loss, expected, dict(zip(("x", "teacher", "fake"), inputs, strict=True)))
    gradients = torch.autograd.grad(loss.sum(), inputs)
    for name, leaf, gradient in zip(("x", "teacher", "fake"), inputs, gradients, strict=True):
        check_gradient(gradient, leaf, expected, name)


@given(data=st.data(), factor=st.sampled_from((2.0, 0.5, 4.0)))
def test_scaling_the_predictions(backend: Backend, data: st.DataObject, factor: float) -> None:
    """x, teacher and fake times a power of two: g does not change (eps 0, mean_abs), the loss neither."""
    arguments = data.draw(testing.loss_arguments(dtype=torch.float32, requires_grad=False, device=backend.device))
    assume(arguments["prediction"] == "x0")
    arguments |= {"eps": 0.0, "normalizer": "mean_abs"}
    scaled = copy.copy(arguments)
    for name in ("x", "teacher", "fake", "teacher_uncond"):
        if name in scaled:
            if scaled[name].dtype in (torch.float16, torch.bfloat16):
                assume(bool((scaled[name] * factor / factor == scaled[name]).all()))
            scaled[name] = scaled[name] * factor
    got, want = fd.distribution_matching_loss(**scaled), fd.distribution_matching_loss(**arguments)
    testing.assert_close(got, want, ulps=8, terms=arguments["x"].numel())


@given(data=st.data())
def test_reductions_agree(backend: Backend, data: st.DataObject) -> None:
    """mean = sum / masked count; sample [B] adds up to the sum."""
    arguments = data.draw(testing.loss_arguments(requires_grad=False, device=backend.device))
    mask = arguments["mask"]
    counts = (
        torch.full((len(arguments["x"]),), arguments["x"][0].numel() if len(arguments["x"]) else 0)
        if mask is None
        else mask.reshape(len(mask), -1).sum(1)
        if mask.numel()
        else torch.zeros(len(mask))
    ).to(backend.device)
    losses = {
        name: fd.distribution_matching_loss(**(arguments | {"reduction": name})).double()
        for name in ("mean", "sum", "sample")
    }
    assume(bool(losses["sum"].isfinite()))
    total = float(losses["sum"])
    tolerance = oracle.growth(arguments["x"].numel()) * oracle.U32 * 4
    assert float(losses["mean"]) * max(int(counts.sum()), 1) == pytest.approx(total, rel=tolerance, abs=1e-30)
    assert float((losses["sample"] * counts).sum()) == pytest.approx(total, rel=tolerance, abs=1e-30)


@given(
    bins=st.sampled_from([1, 16, 17, 32, 33, 255, 256, 257, 512, 513, 1000, 1024, 1025, 3000]) | st.integers(1, 1100),
    batch=st.sampled_from([1, 31, 32, 33, 300]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    ema_rate=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 9),
)
def test_histograms_of_any_size(
    backend: Backend, bins: int, batch: int, dtype: torch.dtype, ema_rate: float, seed: int
) -> None:
    """Samples in the first, the last and any other bin; one without a weight, and one without a time."""
    stored = backend.randn(bins, seed=seed).exp()
    histogram = fd.RatioHistogram(0.0, 1.0, stored.clone(), ema_rate=ema_rate)
    t = backend.randn(batch, dtype=torch.float64, seed=seed + 10) * 0.5 + 0.5
    logits = backend.randn(batch, 2, dtype=dtype, seed=seed + 20) * 3
    if batch > 30:
        logits[7, 1], t[12] = math.inf, math.nan
    check_weights(logits, t, histogram, divergence=DIVERGENCES[1 + seed % 7])
    again = fd.RatioHistogram(0.0, 1.0, stored.clone(), ema_rate=ema_rate)
    weights = fd.f_weights(logits, t, histogram=again)
    assert torch.equal(again.bins, histogram.bins)
    again.bins.copy_(stored)
    assert torch.equal(fd.f_weights(logits, t, histogram=again).nan_to_num(), weights.nan_to_num())


# --------------------------------------------------------------------------------------------------- fd.testing itself


def test_assert_close_fails_when_it_should() -> None:
    want = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = want.to(dtype)
        testing.assert_close(got, want)
        nudged = got.clone()
        nudged[1] = torch.nextafter(got[1], torch.tensor(9.0, dtype=dtype))
        testing.assert_close(nudged, want, ulps=1.0)
        with pytest.raises(AssertionError, match=r"at \(1,\)"):
            testing.assert_close(nudged, want, ulps=0.5)
    for wrong in ([1.0, 2.0, 3.0], [1.0, math.nan, -3.0], [1.0, math.inf, -3.0]):
        with pytest.raises(AssertionError):
            testing.assert_close(torch.tensor(wrong), want, ulps=4)
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close(want[:2], want)
    nan = torch.tensor([math.nan, math.inf])
    testing.assert_close(nan, nan.double())
    with pytest.raises(AssertionError):
        testing.assert_close(torch.zeros(2), nan)
    with pytest.raises(AssertionError):
        testing.assert_close(-nan, nan)
    testing.assert_close(torch.tensor(1 + 1e-5), torch.tensor(1.0), terms=1 << 20)
    with pytest.raises(AssertionError):
        testing.assert_close(torch.tensor(1 + 1e-3), torch.tensor(1.0), terms=1 << 20)


@given(
    st.floats(width=32, allow_nan=False), st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))
)
def test_ulp(value: float, dtype: torch.dtype) -> None:
    """The distance to the next number away from zero."""
    here = torch.tensor(value, dtype=torch.float64).to(dtype)
    assume(bool(here.isfinite()))
    spacing = float(testing.ulp(here, dtype))
    following = torch.nextafter(here.abs(), torch.tensor(math.inf, dtype=dtype))
    assume(bool(following.isfinite()))
    assert spacing == float(following.double() - here.abs().double())


def test_gradient_errors() -> None:
    want = torch.randn(10000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = testing.gradient_errors(want * 1.01, want)
    assert errors.bias == pytest.approx(0.01)
    assert errors.relative_l2 == pytest.approx(0.01)
    assert errors.cosine == pytest.approx(1.0)
    testing.assert_gradient_close(want.bfloat16(), want)
    testing.assert_gradient_close(want.float(), want)
    for wrong in (want.bfloat16() * 1.003, -want.bfloat16(), want.bfloat16().roll(1), torch.zeros(10000)):
        with pytest.raises(AssertionError, match="gradient"):
            testing.assert_gradient_close(wrong, want)
    truncated = (want.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()
    with pytest.raises(AssertionError):
        testing.assert_gradient_close(truncated, want)
    testing.assert_gradient_close(torch.zeros(5), torch.zeros(5))
    with pytest.raises(AssertionError):
        testing.assert_gradient_close(torch.ones(5), torch.zeros(5))


@pytest.mark.no_poison
def test_poison() -> None:
    x = torch.zeros(3, 2)
    with testing.poison():
        fresh = [torch.empty(3), torch.empty_like(x), x.new_empty(4), torch.empty_strided((2, 2), (2, 1))]
        assert all(bool(value.isnan().all()) for value in fresh)
        assert torch.empty(2, dtype=torch.int64).tolist() == [torch.iinfo(torch.int64).max] * 2
        assert torch.empty(2, device="meta").shape == (2,)
    assert torch.zeros(2).tolist() == [0.0, 0.0]


def test_poison_covers_this_library(backend: Backend) -> None:
    """The fixture is at work where the back ends allocate."""
    assert bool(torch.empty(3).isnan().all())
    assert bool(torch.zeros(2).new_empty(3).isnan().all())


@given(data=st.data())
def test_layouts_keep_the_values(data: st.DataObject) -> None:
    shape = data.draw(testing.shapes())
    plain = data.draw(testing.tensors(shape, layout="contiguous"))
    layout = data.draw(testing.layouts())
    laid = testing.lay_out(plain, layout)
    assert laid.shape == plain.shape
    assert laid.dtype is plain.dtype
    if layout != "expanded":
        assert torch.equal(laid, plain)
    if layout == "stepped" and laid.numel() > 1 and laid.shape[-1] > 1:
        assert laid.stride(-1) == 2
    if layout == "offset" and laid.numel():
        assert laid.storage_offset() == 1
    with pytest.raises(ValueError, match="layout"):
        testing.lay_out(plain, "diagonal")


@pytest.mark.slow
def test_strategies_reach_what_they_promise() -> None:
    """Empty shapes, every dtype, NaN logits, empty and full masks come up."""
    seen: set[str] = set()

    @settings(max_examples=300, database=None, derandomize=True, deadline=None)
    @given(arguments=testing.loss_arguments(f_distill=True, nonfinite=True))
    def look(arguments: dict[str, Any]) -> None:
        x, mask, logits = arguments["x"], arguments["mask"], arguments["logits"]
        seen.add(str(x.dtype))
        seen.add(arguments["prediction"])
        seen.add(arguments["reduction"])
        if not x.numel():
            seen.add("empty")
        if mask is not None and mask.numel():
            seen.add("mask none" if not bool(mask.any()) else "mask all" if bool(mask.all()) else "mask some")
            if not mask.is_contiguous():
                seen.add("mask strided")
        if bool(logits.isnan().any()):
            seen.add("nan logit")
        if not x.is_contiguous():
            seen.add("strided")
        if "guidance_scale" in arguments:
            seen.add("guidance")
        if x.dtype is not arguments["teacher"].dtype:
            seen.add("mixed")

    look()
    wanted = {
        "empty",
        "mask none",
        "mask some",
        "mask all",
        "mask strided",
        "nan logit",
        "strided",
        "guidance",
        "mixed",
    }
    wanted |= {"eps", "v", "flow", "score", "x0", "mean", "sum", "sample"} | {str(dtype) for dtype in testing.DTYPES}
    assert wanted <= seen, wanted - seen


@given(data=st.data())
def test_the_example_of_the_documentation(backend: Backend, data: st.DataObject) -> None:
    """Somebody's own kernel against the reference."""
    arguments = data.draw(testing.loss_arguments(dtype=torch.float64, device=backend.device))
    expected = fd.reference.distribution_matching_loss(**arguments)
    assume(bool(expected.isfinite().all()))
    actual = fd.distribution_matching_loss(**arguments)
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    testing.assert_close(actual, expected, ulps=64, terms=max(arguments["x"].numel(), 1), noise=1e-12 * size)
