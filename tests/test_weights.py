"""f_weights and RatioHistogram against the oracle."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend, as_tensor, to_numpy
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops import _oracle as oracle
from fdistill_ops.testing import assert_close

SHORT = ("rkl", "kl", "js", "sf", "sh", "jf", "neyman", "pearson")
CLIPS: list[dict[str, Any]] = [
    {},
    {"logit_clip": 2.0},
    {"logit_clip": None, "ratio_clip": (0.5, 3.0)},
    {"ratio_clip": None},
    {"logit_clip": None, "ratio_clip": None},
    {"ratio_clip": (0.0, 2.0)},
    {"logit_clip": 1.0, "ratio_clip": (0.01, 100.0)},
    {"logit_clip": 10.0, "ratio_clip": (4.0, 4.0)},
    {"logit_clip": 0.5, "ratio_clip": (3.0, 20.0)},
    {"logit_clip": math.inf, "ratio_clip": (0.1, math.inf)},
]


def check(
    logits: Tensor, t: Tensor | None = None, histogram: fd.RatioHistogram | None = None, **options: Any
) -> tuple[Tensor, oracle.Weights]:
    """Calls f_weights and compares weights and histogram with the oracle's."""
    settings = {}
    if histogram is not None:
        settings = {name: getattr(histogram, name) for name in ("min_t", "max_t", "ema_rate", "training")}
        settings["bins"] = to_numpy(histogram.bins.clone())
    u = oracle.U64 if logits.dtype is torch.float64 else oracle.U32
    expected = oracle.f_weights(to_numpy(logits), to_numpy(t), u=u, **settings, **_plain(options))
    weights = fd.f_weights(logits, t, histogram=histogram, **options)
    assert weights.dtype is (torch.float64 if logits.dtype is torch.float64 else torch.float32)
    assert weights.shape == logits.shape[:1]
    assert weights.device == logits.device
    assert not weights.requires_grad
    assert_close(weights, as_tensor(expected.weights), noise=as_tensor(expected.noise), what="weights")
    if histogram is not None and histogram.training:
        assert_close(histogram.bins, as_tensor(expected.bins), noise=as_tensor(expected.bins_noise), what="bins")
        assert bool(histogram.bins.isfinite().all())
    return weights, expected


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    divergence = str(options.get("divergence", "js"))
    if divergence.startswith("alpha:"):
        return options | {"divergence": "alpha", "a": float(divergence[6:])}
    return options


@pytest.mark.parametrize("divergence", [*SHORT, "alpha:0.3", "alpha:-0.7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_divergence(backend: Backend, divergence: str, dtype: torch.dtype) -> None:
    for shape in ((19,), (19, 3), (1,), (1, 1)):
        logits = backend.randn(*shape, dtype=dtype, seed=1) * 3
        check(logits, divergence=divergence)
        check(logits, divergence=divergence, normalize=None)


@pytest.mark.parametrize("clips", CLIPS, ids=str)
@pytest.mark.parametrize("normalize", ["mean", None])
def test_clips(backend: Backend, clips: dict[str, Any], normalize: str | None) -> None:
    logits = backend.tensor([-50.0, -10.0, -2.4, -2.2, -1.0, -1e-3, 0.0, 0.4, 1.0, 2.9, 3.1, 9.9, 10.1, 40.0])
    for divergence in SHORT:
        check(logits, divergence=divergence, normalize=normalize, **clips)


def test_disabled_clips_reach_far(backend: Backend) -> None:
    """Nothing overflows where h does not: js and sf at +-1000, kl at 88."""
    off: dict[str, Any] = {"logit_clip": None, "ratio_clip": None, "normalize": None}
    logits = backend.tensor([-1000.0, -200.0, -88.0, 0.0, 88.0, 200.0, 1000.0])
    for divergence in ("js", "sf", "rkl"):
        weights, _ = check(logits, divergence=divergence, **off)
        assert bool(weights.isfinite().all())
    check(backend.tensor([-88.0, 88.0]), divergence="kl", **off)
    check(backend.tensor([-100.0, 100.0], torch.float64), divergence="pearson", **off)


def test_reverse_kl_is_ones_of_the_batch(backend: Backend) -> None:
    """FastGen's is 0-dimensional."""
    weights = fd.f_weights(backend.randn(5, 2), divergence="rkl", normalize=None)
    assert weights.tolist() == [1.0] * 5
    assert fd.f_weights(backend.randn(5), divergence="rkl").shape == (5,)


def test_heads_are_averaged_in_float32(backend: Backend) -> None:
    """In bfloat16 the mean of these would be 256 or 258, not 257."""
    logits = backend.tensor([[256.0, 258.0], [1.0, 2.0]], torch.bfloat16) / 100
    check(logits, divergence="kl", normalize=None)
    many = backend.randn(4, 301, dtype=torch.float16, seed=5) * 5
    check(many, divergence="kl")


def test_float64_logits_keep_their_precision(backend: Backend) -> None:
    logits = backend.tensor([0.1, 0.1 + 1e-12, -0.3], torch.float64)
    weights, _ = check(logits, divergence="kl", normalize=None)
    assert float(weights[1] - weights[0]) == pytest.approx(1e-12 * math.exp(0.1), rel=1e-3)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_eps_is_added_to_the_mean_and_to_the_bin(backend: Backend, eps: float) -> None:
    logits = backend.randn(12, seed=2)
    check(logits, eps=eps)
    t = backend.tensor(np.linspace(0.05, 0.95, 12), torch.float64)
    check(logits, t, fd.RatioHistogram(0.0, 1.0, bins=3).to(backend.device), eps=eps, divergence="kl")


def test_mean_weight_is_one(backend: Backend) -> None:
    for divergence in SHORT:
        weights = fd.f_weights(backend.randn(1000, seed=3), divergence=divergence, eps=0.0)
        assert float(weights.double().mean()) == pytest.approx(1.0, abs=2e-6)


def test_empty_batch(backend: Backend) -> None:
    histogram = fd.RatioHistogram(0.0, 1.0, bins=4).to(backend.device)
    for shape in ((0,), (0, 3)):
        logits = backend.randn(*shape)
        assert fd.f_weights(logits).shape == (0,)
        weights = fd.f_weights(logits, backend.randn(0), histogram=histogram)
        assert weights.shape == (0,)
        assert weights.dtype is torch.float32
        assert histogram.bins.tolist() == [1.0] * 4
        x, teacher, fake = (backend.randn(0, 5, seed=s) for s in range(3))
        assert float(fd.f_distill_loss(x, teacher, fake, logits, backend.randn(0), histogram=histogram)) == 0.0
        assert histogram.bins.tolist() == [1.0] * 4


@pytest.mark.slow
def test_large_batch(backend: Backend) -> None:
    for batch in (1025, 70001):
        logits = backend.randn(batch, seed=4) * 3
        t = backend.tensor(torch.rand(batch, generator=torch.Generator().manual_seed(0)), torch.float64)
        check(logits, t, fd.RatioHistogram(0.0, 1.0, bins=7, ema_rate=0.5).to(backend.device))


@pytest.mark.parametrize("shape", [(6,), (6, 4)])
def test_layouts_of_logits_and_t(backend: Backend, shape: tuple[int, ...]) -> None:
    plain = backend.randn(*shape, seed=6)
    t = backend.tensor([0.1, 0.2, 0.35, 0.5, 0.7, 0.95], torch.float64)
    want = fd.f_weights(plain, t, histogram=fd.RatioHistogram(0, 1).to(backend.device))
    wide = backend.randn(12, 9, seed=7)
    views = [wide[::2, 1] if len(shape) == 1 else wide[::2, 1:9:2], wide.flip(0)[:6, 2]]
    for view in views[: 3 - len(shape)]:
        view.copy_(plain)
        for time in (t, t.flip(0).contiguous().flip(0), backend.tensor(np.zeros(12), torch.float64)[::2].copy_(t)):
            got = fd.f_weights(view, time, histogram=fd.RatioHistogram(0, 1).to(backend.device))
            assert torch.equal(got, want)
        column = t.reshape(6, 1, 1, 1)
        assert torch.equal(fd.f_weights(view, column, histogram=fd.RatioHistogram(0, 1).to(backend.device)), want)
    if len(shape) == 2:
        transposed = plain.t().contiguous().t()
        got = fd.f_weights(transposed, t, histogram=fd.RatioHistogram(0, 1).to(backend.device))
        assert_close(got, want, ulps=2, what="transposed logits")
    expanded = plain[:1].expand(shape)
    check(expanded, t, fd.RatioHistogram(0, 1).to(backend.device))


# ------------------------------------------------------------------------------------------------------- non-finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
@pytest.mark.parametrize("heads", [None, 3])
def test_a_bad_logit_touches_its_sample_alone(backend: Backend, bad: float, nonfinite: str, heads: int | None) -> None:
    logits = backend.randn(*((7,) if heads is None else (7, heads)), seed=8)
    t = backend.tensor([0.05, 0.15, 0.12, 0.55, 0.56, 0.91, 0.18], torch.float64)
    spoiled = logits.clone()
    spoiled.reshape(7, -1)[2, -1] = bad
    keep = [0, 1, 3, 4, 5, 6]
    with_bad = fd.RatioHistogram(0.0, 1.0, ema_rate=0.3).to(backend.device)
    without = copy.deepcopy(with_bad)
    got, _ = check(spoiled, t, with_bad, nonfinite=nonfinite)
    want = fd.f_weights(logits[keep], t[keep], histogram=without, nonfinite=nonfinite)
    assert torch.equal(with_bad.bins, without.bins)
    assert_close(got[keep], want, ulps=2, what="other samples' weights")
    assert (got[2] == 0) if nonfinite == "zero" else got[2].isnan()


def test_opposite_infinite_heads(backend: Backend) -> None:
    logits = backend.tensor([[math.inf, -math.inf], [1.0, 2.0]])
    weights, _ = check(logits, divergence="kl")
    assert weights[0].isnan()


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_all_logits_bad(backend: Backend, nonfinite: str) -> None:
    histogram = fd.RatioHistogram(0.0, 1.0, bins=3, ema_rate=0.9).to(backend.device)
    histogram.bins.copy_(torch.tensor([0.5, 2.0, 3.0]))
    logits = backend.tensor([math.nan] * 4)
    weights, _ = check(logits, backend.tensor([0.1, 0.4, 0.5, 0.9]), histogram, nonfinite=nonfinite)
    assert histogram.bins.tolist() == [0.5, 2.0, 3.0]
    assert bool((weights == 0).all() if nonfinite == "zero" else weights.isnan().all())


def test_nan_time_is_a_bad_sample(backend: Backend) -> None:
    logits = backend.randn(5, seed=9)
    t = backend.tensor([0.1, math.nan, 0.1, 0.9, 0.3], torch.float64)
    for nonfinite in ("propagate", "zero"):
        histogram = fd.RatioHistogram(0.0, 1.0).to(backend.device)
        weights, _ = check(logits, t, histogram, nonfinite=nonfinite)
        assert bool(weights[[0, 2, 3, 4]].isfinite().all())


@pytest.mark.parametrize("divergence", SHORT)
def test_overflowing_ratios_leave_the_histogram_finite(backend: Backend, divergence: str) -> None:
    """Finite logits whose ratio overflows every format, clips off."""
    histogram = fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.5).to(backend.device)
    t = backend.tensor([0.1, 0.4, 0.6, 0.9], torch.float64)
    for value in (1e4, -1e4, 95.0, 400.0, -400.0):
        logits = backend.tensor([0.3, value, -0.4, 0.1])
        weights = fd.f_weights(
            logits, t, histogram=histogram, divergence=divergence, logit_clip=None, ratio_clip=None, normalize=None
        )
        assert bool(histogram.bins.isfinite().all()), (value, histogram.bins)
        assert bool((histogram.bins >= 0).all())
        assert bool(weights[[0, 2, 3]].isfinite().all()), (value, weights)


def test_an_overflowing_weight_does_not_zero_the_others(backend: Backend) -> None:
    """exp(1000) is no finite weight: the mean is that of the others."""
    logits = backend.tensor([1000.0, 0.5, -0.5])
    weights = fd.f_weights(logits, divergence="kl", logit_clip=None, ratio_clip=None)
    rest = np.exp([0.5, -0.5])
    assert weights[1:].tolist() == pytest.approx((rest / (rest.mean() + 1e-6)).tolist(), rel=1e-6)


# -------------------------------------------------------------------------------------------------------- histogram


@pytest.mark.parametrize("ema_rate", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("bins", [1, 4, 10, 1000])
def test_histogram_over_several_batches(backend: Backend, ema_rate: float, bins: int) -> None:
    histogram = fd.RatioHistogram(0.002, 80.0, bins=bins, ema_rate=ema_rate).to(backend.device)
    for step in range(4):
        logits = backend.randn(23, 2, seed=step) * 2
        t = backend.tensor(80 * torch.rand(23, generator=torch.Generator().manual_seed(step)), torch.float64)
        check(logits, t, histogram, divergence=SHORT[step])


def test_a_sample_alone_in_its_bin_loses_its_weight(backend: Backend) -> None:
    """The documented consequence of ema_rate = 0."""
    histogram = fd.RatioHistogram(0.0, 1.0, bins=2, ema_rate=0.0).to(backend.device)
    logits = backend.tensor([2.0, -2.0])
    weights = fd.f_weights(
        logits, backend.tensor([0.1, 0.9]), histogram=histogram, divergence="kl", normalize=None, eps=0.0
    )
    assert weights.tolist() == pytest.approx([1.0, 1.0], rel=1e-6)
    assert histogram.bins.tolist() == pytest.approx([math.exp(2), math.exp(-2)], rel=1e-6)
    histogram = fd.RatioHistogram(0.0, 1.0, bins=4).to(backend.device)
    weights = fd.f_weights(
        backend.tensor([2.0, -2.0, 1.0, 0.0]),
        backend.tensor([0.1, 0.4, 0.6, 0.9]),
        histogram=histogram,
        divergence="kl",
    )
    assert float(weights.max() / weights.min()) > 10  # not so by default


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]
)
def test_times_of_any_dtype(backend: Backend, dtype: torch.dtype) -> None:
    histogram = fd.RatioHistogram(0, 1000, bins=8).to(backend.device)
    t = backend.tensor([0, 124, 125, 126, 999, 1000, 1001, 5000, -3], torch.float64).to(dtype)
    check(backend.randn(9, seed=1), t, histogram, divergence="kl")


def test_times_outside_are_clamped(backend: Backend) -> None:
    histogram = fd.RatioHistogram(0.0, 1.0, bins=4).to(backend.device)
    t = backend.tensor([-1e30, -0.1, 0.0, 1.0, 1.1, 1e300, math.inf, -math.inf], torch.float64)
    _, expected = check(backend.randn(8, seed=1), t, histogram, divergence="kl")
    assert histogram.bins[1:3].tolist() == [1.0, 1.0]
    assert expected.bins is not None
    assert (expected.bins[[0, 3]] != 1.0).all()


def test_bins_are_found_in_float64(backend: Backend) -> None:
    """Times beside an edge that float32 cannot tell from it; and large integers."""
    histogram = fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.0).to(backend.device)
    t = backend.tensor([0.5 - 1e-12, 0.5, 0.25 - 1e-13, 0.25, 0.75 - 1e-14], torch.float64)
    check(backend.tensor([1.0, -1.0, 0.5, -0.5, 0.2]), t, histogram, divergence="kl")
    assert histogram.bins.tolist() == pytest.approx(
        [math.exp(0.5), (math.exp(-0.5) + math.e) / 2, (math.exp(-1) + math.exp(0.2)) / 2, 1.0], rel=1e-6
    )
    histogram = fd.RatioHistogram(2**24, 2**24 + 8, bins=8).to(backend.device)
    t = torch.arange(2**24, 2**24 + 8, device=backend.device)
    check(backend.randn(8, seed=2), t, histogram, divergence="kl")
    assert len(set(histogram.bins.tolist())) == 8


@pytest.mark.parametrize("ema_rate", [0.0, 0.9, 1.0])
def test_eval_uses_and_does_not_update(backend: Backend, ema_rate: float) -> None:
    """In eval mode the ratios are divided by the history as it stands, whatever ema_rate says."""
    histogram = fd.RatioHistogram(0.0, 1.0, bins=2, ema_rate=ema_rate).to(backend.device).eval()
    stored = torch.tensor([0.25, 4.0], device=backend.device)
    histogram.bins.copy_(stored)
    logits, t = backend.tensor([0.5, -0.3, 1.0]), backend.tensor([0.2, 0.3, 0.8])
    check(logits, t, histogram, divergence="kl", normalize=None)
    assert torch.equal(histogram.bins, stored)
    ratio = torch.exp(logits) / (stored[[0, 0, 1]] + 1e-6)
    weights = fd.f_weights(logits, t, histogram=histogram, divergence="kl", normalize=None)
    torch.testing.assert_close(weights, ratio, rtol=1e-6, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_non_finite_history_counts_as_never_filled(backend: Backend, training: bool) -> None:
    """A checkpoint of a run that went NaN."""
    histogram = fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.9).to(backend.device).train(training)
    histogram.load_state_dict({"bins": torch.tensor([math.nan, math.inf, 2.0, -math.inf])})
    logits, t = backend.tensor([0.5, -0.3, 1.0]), backend.tensor([0.1, 0.3, 0.6])
    check(logits, t, histogram, divergence="kl", normalize=None)
    if training:
        assert bool(histogram.bins.isfinite().all())
        assert float(histogram.bins[3]) == 1.0


def test_history_is_updated_in_place_and_saved(backend: Backend) -> None:
    histogram = fd.RatioHistogram(0.0, 1.0, bins=3, ema_rate=0.5).to(backend.device)
    buffer = histogram.bins
    fd.f_weights(backend.randn(5), backend.tensor([0.1, 0.2, 0.5, 0.9, 0.6]), histogram=histogram)
    assert histogram.bins is buffer
    assert list(histogram.state_dict()) == ["bins"]
    assert not histogram.bins.requires_grad
    file = io.BytesIO()
    torch.save(histogram.state_dict(), file)
    file.seek(0)
    other = fd.RatioHistogram(0.0, 1.0, bins=3, ema_rate=0.5)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.bins, histogram.bins.cpu())
    assert "bins=3" in repr(histogram)


def test_histogram_in_another_dtype(backend: Backend) -> None:
    """module.to(bfloat16) or .double() casts the buffer: results stay right to its precision."""
    logits, t = backend.randn(9, seed=3), backend.tensor(np.linspace(0.05, 0.95, 9), torch.float64)
    want_histogram = fd.RatioHistogram(0.0, 1.0, bins=3, ema_rate=0.5).to(backend.device)
    want = fd.f_weights(logits, t, histogram=want_histogram)
    for dtype, rtol in ((torch.float64, 1e-6), (torch.bfloat16, 2.0**-7)):
        histogram = fd.RatioHistogram(0.0, 1.0, bins=3, ema_rate=0.5).to(backend.device, dtype)
        weights = fd.f_weights(logits, t, histogram=histogram)
        assert histogram.bins.dtype is dtype
        torch.testing.assert_close(weights, want, rtol=rtol, atol=0)
        torch.testing.assert_close(histogram.bins.float(), want_histogram.bins, rtol=rtol, atol=0)


def test_inputs_are_left_alone(backend: Backend) -> None:
    logits, t = backend.randn(6, 2).requires_grad_(), backend.randn(6)
    before = logits.detach().clone(), t.clone()
    weights = fd.f_weights(logits, t, histogram=fd.RatioHistogram(0.0, 1.0).to(backend.device))
    assert not weights.requires_grad
    assert torch.equal(logits, before[0])
    assert torch.equal(t, before[1])


# ------------------------------------------------------------------------------------------------ inside the loss


@pytest.mark.parametrize("divergence", ["js", "kl", "rkl", "alpha:0.3"])
@pytest.mark.parametrize("histogram_in_use", [False, True])
def test_f_distill_loss_is_the_loss_with_these_weights(
    backend: Backend, divergence: str, histogram_in_use: bool
) -> None:
    logits = backend.randn(6, 2, seed=1) * 3
    t = backend.tensor([0.1, 0.2, 0.15, 0.6, 0.65, 0.9], torch.float64) if histogram_in_use else None
    first = fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.7).to(backend.device) if histogram_in_use else None
    second = copy.deepcopy(first)
    weights, expected = check(logits, t, first, divergence=divergence)
    x = backend.leaf(6, 3, 5, seed=2)
    teacher, fake = backend.randn(6, 3, 5, seed=3), backend.randn(6, 3, 5, seed=4)
    want, want_stats = fd.distribution_matching_loss(x, teacher, fake, weight=weights, return_stats=True)
    (want_gradient,) = torch.autograd.grad(want, x)
    got, stats = fd.f_distill_loss(
        x, teacher, fake, logits, t, divergence=divergence, histogram=second, return_stats=True
    )
    (gradient,) = torch.autograd.grad(got, x)
    assert_close(got, want, ulps=4, what="loss")
    assert_close(gradient, want_gradient, ulps=4, what="gradient")
    if first is not None and second is not None:
        assert torch.equal(first.bins, second.bins)
    fields, same = stats.to_dict(), want_stats.to_dict()
    for name in same:
        if name not in ("ratio_mean", "clipped_low", "clipped_high"):
            assert fields[name] == pytest.approx(same[name], rel=2e-6), name
    assert fields["ratio_mean"] == pytest.approx(expected.ratio_mean, rel=2e-6)
    assert fields["clipped_low"] == pytest.approx(expected.clipped_low, rel=2e-6)
    assert fields["clipped_high"] == pytest.approx(expected.clipped_high, rel=2e-6)


def test_clipped_fractions(backend: Backend) -> None:
    logits = backend.tensor([-9.0, -3.0, 0.0, 1.0, 3.5, math.nan, 50.0, 20.0, -2.3, 2.99])
    x = backend.randn(10, 2)
    _, stats = fd.f_distill_loss(x, x + 1, x + 2, logits, nonfinite="zero", return_stats=True)
    fields = stats.to_dict()
    assert fields["clipped_low"] == pytest.approx(2 / 9)
    assert fields["clipped_high"] == pytest.approx(3 / 9)
    ratios = [0.1, 0.1, 1.0, math.e, 20.0, 20.0, 20.0, math.exp(-2.3), math.exp(2.99)]
    assert fields["ratio_mean"] == pytest.approx(sum(ratios) / 9, rel=1e-6)


def test_statistics_without_logits_are_nan(backend: Backend) -> None:
    x = backend.randn(3, 2)
    _, stats = fd.distribution_matching_loss(x, x + 1, x + 2, return_stats=True)
    fields = stats.to_dict()
    assert all(math.isnan(fields[name]) for name in ("ratio_mean", "clipped_low", "clipped_high"))


def test_module(backend: Backend) -> None:
    """FDistillLoss is f_distill_loss with its settings; arguments override them."""
    histogram = fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.5)
    module = fd.FDistillLoss("kl", histogram=histogram, logit_clip=3.0, eps=1e-3, reduction="sum").to(backend.device)
    assert list(module.state_dict()) == ["histogram.bins"]
    assert "forward_kl" in repr(module)
    x, teacher, fake = backend.leaf(4, 6), backend.randn(4, 6, seed=1), backend.randn(4, 6, seed=2)
    logits, t = backend.randn(4, seed=3) * 4, backend.tensor([0.1, 0.2, 0.6, 0.9])
    mine = copy.deepcopy(histogram)
    want = fd.f_distill_loss(
        x, teacher, fake, logits, t, divergence="kl", histogram=mine, logit_clip=3.0, eps=1e-3, reduction="sum"
    )
    got = module(x, teacher, fake, logits, t)
    assert torch.equal(got, want)
    assert torch.equal(mine.bins, histogram.bins)
    module.eval()
    kept = histogram.bins.clone()
    loss = module(x, teacher, fake, logits, t, reduction="sample")
    assert loss.shape == (4,)
    assert torch.equal(kept, histogram.bins)


@pytest.mark.parametrize("stored", [-1.0, -math.inf, math.inf, math.nan])
def test_a_stored_bin_that_cannot_be_counts_as_never_filled(backend: Backend, stored: float) -> None:
    found = []
    for value in (stored, 1.0):
        histogram = fd.RatioHistogram(0.0, 1.0, backend.tensor([value] * 3), ema_rate=0.5)
        weights = fd.f_weights(backend.randn(4), backend.tensor([0.1, 0.2, 0.9, 0.9]), histogram=histogram)
        found.append(torch.cat([weights, histogram.bins]))
    assert torch.equal(*found)


def test_weights_are_rounded_the_same_in_both_functions(backend: Backend) -> None:
    """To the type of the logits' arithmetic, also beside float64 samples."""
    inputs = [backend.randn(3, 5, dtype=torch.float64, seed=seed) for seed in range(3)]
    logits = backend.randn(3, 2)
    weights = fd.f_weights(logits)
    assert weights.dtype is torch.float32
    one, other = fd.f_distill_loss(*inputs, logits), fd.distribution_matching_loss(*inputs, weight=weights)
    torch.testing.assert_close(one, other, rtol=1e-14, atol=0.0)
