"""The drop-ins beside the arithmetic they replace: the same results, closer to float64, without waiting for the host.

Everything runs on the code bases as tests/codebases restates them, and on checkouts of the real ones where
FDISTILL_CODEBASES names a folder with them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integration_cases import CASES, SOURCES, Case, Operators, importable, in_float64, relative_error, run
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fdistill_ops as fd
from fdistill_ops.integrations import Deferred, dmd2, fastgen, sid
from fdistill_ops.testing import assert_close, ulp

BY_NAME = {case.name: case for case in CASES}
DTYPES = (torch.float32, torch.bfloat16)


FUSED = "cpu" in fd.available_backends()


@pytest.fixture(autouse=True)
def back_end() -> Iterator[None]:
    with fd.use_backend("cpu" if FUSED else "reference"):
        yield


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest, source: str) -> Iterator[Case]:
    with importable(request.param.project, source):
        skip_unless_importable(request.param)
        yield request.param


def skip_unless_importable(case: Case) -> None:
    try:
        case.build(case.tensors(torch.float32))
    except ImportError as error:
        pytest.skip(f"{case.project}: {error}")


def patched(case: Case, source: str) -> Any:
    """Restated code refers to other names than the original, which a strict patch would refuse."""
    return case.integration.patch(strict=source != "restated")


# --------------------------------------------------------------------------------------------------- losses, gradients


@pytest.mark.parametrize("closeness", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_closer_to_float64_than_the_original(case: Case, source: str, dtype: torch.dtype, closeness: float) -> None:
    tensors = case.tensors(dtype, closeness)
    exact, theirs = in_float64(case, tensors), run(case, tensors)
    with patched(case, source):
        ours = run(case, tensors)
    assert ours.loss.dtype is theirs.loss.dtype
    assert ours.loss.shape == theirs.loss.shape
    for name, our, their, want in zip("xabc", ours.gradients, theirs.gradients, exact.gradients, strict=False):
        assert our.dtype is their.dtype
        error, original = relative_error(our, want), relative_error(their, want)
        print(f"{case.name}, {dtype}, {closeness}: gradient of {name}: {error:.1e}, original {original:.1e}")
        if case.name == "sid" and dtype is torch.float32:  # theirs is float32 throughout, as ours
            original = max(original, 4 * 2**-24)
        assert error <= original
    loss, want = ours.loss.double(), exact.loss.double()
    own_rounding = 0.5 * ulp(want, ours.loss.dtype).double()
    assert (loss - want).abs() <= (theirs.loss.double() - want).abs() + own_rounding + 4 * 2**-24 * want.abs()


def test_same_random_numbers_and_network_inputs(case: Case, source: str) -> None:
    tensors = case.tensors(torch.float32)
    theirs = run(case, tensors)
    with patched(case, source):
        ours = run(case, tensors)
    assert torch.equal(ours.random, theirs.random)
    for our, their in zip(ours.seen, theirs.seen, strict=True):
        our, their = tree_leaves(our), tree_leaves(their)
        assert len(our) == len(their)
        for a, b in zip(our, their, strict=True):
            assert type(a) is type(b)
            assert torch.equal(a, b) and a.dtype is b.dtype if isinstance(a, Tensor) else a == b


def test_logs(case: Case, source: str) -> None:
    tensors = case.tensors(torch.float32)
    theirs = run(case, tensors)
    with patched(case, source):
        ours = run(case, tensors)
    assert ours.log.keys() == theirs.log.keys()
    for key, value in theirs.log.items():
        logged, value = ours.log[key], torch.as_tensor(value)
        assert isinstance(logged, Tensor)
        assert not logged.requires_grad
        assert logged.shape == value.shape
        if value.ndim:
            assert logged.dtype is value.dtype
        if value.is_floating_point() and value.any():
            assert relative_error(logged, value) < 2**-20, key
        else:
            assert torch.equal(logged, value.to(logged.dtype)), key


def test_forward_does_not_wait_for_the_host(case: Case, source: str) -> None:
    tensors = case.tensors(torch.float32)

    def waits() -> list[str]:
        model = case.build({name: tensor.clone() for name, tensor in tensors.items()})
        x = tensors["x"].clone().requires_grad_()
        with Operators() as operators:
            model.loss(x)
        return operators.waits

    assert bool(waits()) == (case.project in ("DMD2", "SiD") or "masked" in case.name)
    with patched(case, source):
        assert waits() == []


@pytest.mark.skipif(not FUSED, reason="the reference is plain PyTorch")
def test_operators_are_saved(case: Case, source: str) -> None:
    tensors = case.tensors(torch.float32)

    def measure() -> Operators:
        with Operators() as operators:
            run(case, tensors)
        return operators

    original = measure()
    with patched(case, source):
        ours = measure()
    assert ours.count < original.count
    assert ours.bytes < original.bytes


# --------------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("name", [case.name for case in CASES if case.project not in ("FastGen", "FastVideo", "SiD")])
@pytest.mark.parametrize("where", ["real", "fake", "equal"])
def test_nothing_but_finite_losses(name: str, where: str, source: str) -> None:
    """A NaN in a prediction, and samples that equal the teacher, whose normaliser is 0."""
    case = BY_NAME[name]
    with importable(case.project, source):
        skip_unless_importable(case)
        tensors = case.tensors(torch.float32)
        if where == "equal":
            for other in ("real", "uncond"):
                if other in tensors:
                    tensors[other][0] = tensors["x"][0]
            if "noisy" in tensors and case.project == "DMD2":  # x0 is then x
                tensors["noisy"][0] = 0
                for other in ("real", "uncond"):
                    tensors[other][0] = 0
                tensors["x"][0] = 0
        else:
            tensors[where][0, 0, 0, 0] = torch.nan
        theirs = run(case, tensors)
        with patched(case, source):
            ours = run(case, tensors)
    assert bool(ours.loss.isfinite())
    assert bool(ours.gradients[0].isfinite().all())
    assert bool((ours.gradients[0][1:] != 0).any())
    if where != "equal":
        good = theirs.gradients[0][1:]
        assert relative_error(ours.gradients[0][1:], good) < 2**-20


@pytest.mark.parametrize("where", ["x", "real", "fake"])
def test_sid_drops_samples(where: str, source: str) -> None:
    case = BY_NAME["sid"]
    tensors = case.tensors(torch.float32)
    tensors[where][2, 0, 1, 1] = torch.nan
    with importable("SiD", source):
        theirs = run(case, tensors)
        with patched(case, source):
            ours = run(case, tensors)
    assert_close(ours.loss, theirs.loss.double(), ulps=8)
    for our, their in zip(ours.gradients, theirs.gradients, strict=True):
        assert bool((our[2] == 0).all())
        assert relative_error(our, their) < 2**-20


def test_sid_elements(source: str) -> None:
    """Whatever else is done with the loss than summing it."""
    case = BY_NAME["sid"]
    tensors = case.tensors(torch.float32)
    tensors["fake"][1, 0, 0, 0] = torch.nan
    with importable("SiD", source):
        loss_class = importlib.import_module("training.sid_loss").SID_EDMLoss

        def elements() -> Tensor:
            torch.manual_seed(0)
            loss = loss_class().generator_loss(
                lambda *_, **__: tensors["real"], lambda *_, **__: tensors["fake"], tensors["x"]
            )
            return loss

        theirs = elements()
        with patched(case, source):
            ours = elements()
            assert ours.shape == theirs.shape == (3, *case.shape[1:])
            assert relative_error(ours * 1.0, theirs) < 2**-20
            assert relative_error(ours.mean((1, 2, 3)), theirs.mean((1, 2, 3))) < 2**-20
            assert float(abs(ours.sum() - theirs.sum())) <= 2**-18 * float(theirs.abs().sum())


def test_sid_distance_is_bounded_below() -> None:
    x = torch.zeros(2, 1, 4, 4)
    real = torch.full_like(x, 1e-7)
    fake = torch.ones_like(x)
    want = ((real - fake) * ((real - x) - 1.2 * (real - fake)) / 1e-5).double().sum()
    assert_close(sid.summed_loss(x, real, fake), want, ulps=8)


def test_empty_mask_is_zero(source: str) -> None:
    case = BY_NAME["causvid masked"]
    with importable(case.project, source):
        tensors = case.tensors(torch.float32)
        model = case.build(tensors)
        del model
        from fdistill_ops.integrations.causvid import matching_loss

        x = tensors["x"].requires_grad_()
        nothing = torch.zeros(x.shape[:2], dtype=torch.bool)  # [B, F]
        loss, norm = matching_loss(
            x, tensors["real"], tensors["uncond"], tensors["fake"], real_guidance_scale=3.5, gradient_mask=nothing
        )
        assert loss == 0
        assert norm > 0
        assert bool((torch.autograd.grad(loss, x)[0] == 0).all())


def test_without_normalization() -> None:
    from fdistill_ops.integrations.self_forcing import matching_loss

    x, cond, uncond, fake = torch.randn(4, 2, 3, 4, 5, 5, dtype=torch.float64)
    loss, norm = matching_loss(x, cond, uncond, fake, real_guidance_scale=2.0, normalization=False)
    g = fake - (cond + 2 * (cond - uncond))
    torch.testing.assert_close(loss, 0.5 * g.square().mean())
    torch.testing.assert_close(norm, g.abs().mean())


# ---------------------------------------------------------------------------------------------------------------- logs


def test_log_entries_are_computed_when_read(source: str) -> None:
    case = BY_NAME["dmd2 sd guided"]
    with importable(case.project, source), patched(case, source):
        log = run(case, case.tensors(torch.float32)).log
    merged: dict[str, Any] = {}
    merged.update(log)  # as DMD2 does
    merged = {**merged}
    deferred = {key: value for key, value in merged.items() if isinstance(value, Deferred)}
    assert set(deferred) == {"dmtrain_pred_real_image", "dmtrain_pred_fake_image", "dmtrain_grad"}
    for value in deferred.values():
        assert value.detach().shape == case.shape
        assert value.dtype is torch.float32
        assert not value.computed
    assert f"{merged['dmtrain_gradient_norm']:.1f}" == f"{deferred['dmtrain_grad'].norm():.1f}"
    assert deferred["dmtrain_grad"].computed
    assert not deferred["dmtrain_pred_real_image"].computed


def test_deferred() -> None:
    calls = []

    def compute() -> Tensor:
        calls.append(1)
        return torch.arange(6.0).reshape(2, 3)

    deferred = Deferred(compute, (2, 3), torch.float32, torch.device("cpu"))
    assert isinstance(deferred, Tensor)
    assert deferred.shape == (2, 3) and deferred.ndim == 2 and deferred.numel() == 6 and deferred.size(1) == 3
    assert deferred.device == torch.device("cpu") and not deferred.requires_grad and deferred.grad_fn is None
    assert calls == []
    assert float((1 - deferred).abs().mean()) == pytest.approx(11 / 6)
    assert deferred.tolist() == deferred.numpy().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert type(torch.cat([deferred, deferred])) is Tensor
    assert calls == [1]


def test_noise_matching_loss_by_hand() -> None:
    """The function for loops of one's own, and its statistics."""
    x, noisy, real, fake = torch.randn(4, 3, 2, 4, 4)
    alphas = torch.linspace(0.99, 0.01, 100)
    steps = torch.tensor([3, 50, 90])
    loss, stats = dmd2.noise_matching_loss(x, noisy, real, fake, alphas, steps)
    power = alphas[steps].double().reshape(3, 1, 1, 1)
    image, other = ((noisy - (1 - power).sqrt() * noise) / power.sqrt() for noise in (real.double(), fake.double()))
    g = (other - image) / (x - image).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(loss, 0.5 * g.square().mean())
    torch.testing.assert_close(stats.grad_norm, g.norm())


# ---------------------------------------------------------------------------------------------------- FastGen's weights


def fdistill_model(module: Any, f_div: str, bins: Tensor | None = None, ema_rate: float = 0.7, **settings: Any) -> Any:
    model = module.FdistillModel.__new__(module.FdistillModel)
    if isinstance(model, torch.nn.Module):
        torch.nn.Module.__init__(model)
    config = {"f_div": f_div, "ratio_lower": 0.1, "ratio_upper": 20.0, "ratio_normalization": True}
    model.config = SimpleNamespace(f_distill=SimpleNamespace(**(config | {"ratio_ema_rate": ema_rate} | settings)))
    model.net = torch.nn.Module()
    model.net.register_buffer("bins", torch.ones(10) if bins is None else bins)
    model.net.noise_scheduler = SimpleNamespace(min_t=0.002, max_t=80.0)
    model.bin_num = 10
    model.f_div_weighting_function = module.all_f_div_weighting_function[f_div]
    return model


def batch(step: int, dtype: torch.dtype = torch.float32, heads: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    logits = 3 * torch.randn(16, heads, generator=generator)
    return logits.to(dtype), 80 * torch.rand(16, generator=generator, dtype=torch.float64)


@pytest.fixture
def f_distill(source: str) -> Iterator[Any]:
    with importable("FastGen", source):
        try:
            yield importlib.import_module("fastgen.methods.distribution_matching.f_distill")
        except ImportError as error:
            pytest.skip(f"FastGen: {error}")


@pytest.fixture
def strict(source: str) -> bool:
    return source != "restated"


@pytest.mark.parametrize("normalization", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["kl", "js", "sf", "neyman", "sh", "jf", "own"])
def test_fastgen_weights(f_distill: Any, strict: bool, name: str, dtype: torch.dtype, normalization: bool) -> None:
    f_distill.all_f_div_weighting_function["own"] = lambda r: torch.sqrt(1 + r)
    theirs, ours = (fdistill_model(f_distill, name, ratio_normalization=normalization) for _ in range(2))
    for step in range(4):
        logits, t = batch(step, dtype)
        want = theirs._get_f_div_weighting_h(logits, t)
        with fastgen.patch(strict):
            got = ours._get_f_div_weighting_h(logits, t)
        assert got.dtype is want.dtype is dtype
        assert not got.requires_grad
        # The original adds 1e-6 to the count of each bin; its js, 1 - 1 / (1 + r), cancels.
        torch.testing.assert_close(got, want, rtol=4e-6 if dtype is torch.float32 else 2**-8, atol=1e-7)
        torch.testing.assert_close(ours.net.bins, theirs.net.bins, rtol=2e-6, atol=0)
    assert list(ours.net.state_dict()) == ["bins"]


def test_fastgen_reverse_kl(f_distill: Any, strict: bool) -> None:
    model = fdistill_model(f_distill, "rkl")
    logits, t = batch(0)
    with pytest.raises(TypeError):
        model._get_f_div_weighting_h(logits, t)
    with fastgen.patch(strict):
        assert torch.equal(model._get_f_div_weighting_h(logits, t), torch.ones(16))


def test_fastgen_nan_stays_in_its_sample(f_distill: Any, strict: bool) -> None:
    model = fdistill_model(f_distill, "js")
    logits, t = batch(0)
    logits[3, 1] = torch.nan
    with fastgen.patch(strict):
        h = model._get_f_div_weighting_h(logits, t)
    assert h.isnan().nonzero().flatten().tolist() == [3]
    assert bool(model.net.bins.isfinite().all())


def test_fastgen_checkpoints_go_both_ways(f_distill: Any, strict: bool) -> None:
    """A histogram that the original saved is continued, and the other way round; NaN that it stored is forgotten."""
    first, second = fdistill_model(f_distill, "js"), fdistill_model(f_distill, "js")
    first._get_f_div_weighting_h(*batch(0))
    second.net.load_state_dict(first.net.state_dict())
    buffer = second.net.bins
    with fastgen.patch(strict):
        got = second._get_f_div_weighting_h(*batch(1))
    assert second.net.bins is buffer
    assert_close(got, first._get_f_div_weighting_h(*batch(1)).double(), ulps=16)
    second.net.bins[4] = torch.nan
    with fastgen.patch(strict):
        assert bool(second._get_f_div_weighting_h(*batch(2)).isfinite().all())
    assert bool(second.net.bins.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fastgen_histogram_in_the_networks_dtype(f_distill: Any, strict: bool, dtype: torch.dtype) -> None:
    model = fdistill_model(f_distill, "js", bins=torch.ones(10, dtype=dtype))
    with fastgen.patch(strict):
        model._get_f_div_weighting_h(*batch(0))
    assert model.net.bins.dtype is dtype
    assert bool((model.net.bins != 1).any())


def test_fastgen_weights_do_not_wait(f_distill: Any, strict: bool) -> None:
    model = fdistill_model(f_distill, "js")
    with Operators() as original:
        model._get_f_div_weighting_h(*batch(0))
    assert original.waits.count("bincount") == 2
    with fastgen.patch(strict), Operators() as ours:
        model._get_f_div_weighting_h(*batch(0))
    assert ours.waits == []
    assert not FUSED or ours.count < original.count / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", ["none", "one", "batch", "column"])
@pytest.mark.parametrize("autocast", [False, True])
def test_fastgen_loss_dtypes_and_scales(
    f_distill: Any, strict: bool, dtype: torch.dtype, scale: str, autocast: bool
) -> None:
    x, teacher, fake = (torch.randn(5, 3, 8).to(dtype) for _ in range(3))
    scales = {"none": None, "one": torch.tensor(2.0), "batch": torch.rand(5), "column": torch.rand(5, 1, 1)}

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return f_distill.variational_score_distillation_loss(x, teacher, fake, scales[scale])

    want = loss()
    with fastgen.patch(strict):
        got = loss()
    assert got.dtype is want.dtype
    rounding = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(got, want, rtol=rounding, atol=0)


def test_a_histogram_in_a_tensor_of_ones_own() -> None:
    bins = torch.ones(10)
    borrowed, own = fd.RatioHistogram(0.0, 80.0, bins=bins, ema_rate=0.5), fd.RatioHistogram(0.0, 80.0, ema_rate=0.5)
    for step in range(2):
        logits, t = batch(step)
        assert torch.equal(fd.f_weights(logits, t, histogram=borrowed), fd.f_weights(logits, t, histogram=own))
    assert borrowed.bins is bins
    assert torch.equal(bins, own.bins)
    for wrong, error in ((torch.ones(2, 2), ValueError), (torch.ones(0), ValueError), (torch.ones(3).int(), TypeError)):
        with pytest.raises(error, match="bins"):
            fd.RatioHistogram(0.0, 1.0, bins=wrong)
    with pytest.raises(ValueError, match="bins requires grad"):
        fd.RatioHistogram(0.0, 1.0, bins=torch.ones(3, requires_grad=True))
