"""Backward: incoming gradients, kept graphs, hooks, low precision, and what must not receive a gradient."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend, as_tensor, check_gradient, expected_matching, to_numpy
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fdistill_ops as fd
from fdistill_ops import _oracle as oracle
from fdistill_ops.testing import assert_close, assert_gradient_close, unit_roundoff

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["mean", "sum", "sample"]


def batch(backend: Backend, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    return {
        "x": backend.leaf(*shape, dtype=dtype, seed=seed),
        "teacher": backend.randn(*shape, dtype=dtype, seed=seed + 1),
        "fake": backend.randn(*shape, dtype=dtype, seed=seed + 2),
    }


def check_scaled(gradient: Tensor | None, expected: oracle.Loss, factor: Any, name: str = "x") -> None:
    """The oracle's gradient times an incoming one: stored, scaled and rounded again (half an ulp each, except where the
    factor is a power of two), the factor itself within one float32 rounding."""
    assert gradient is not None
    factor = np.asarray(factor, dtype=np.float64)
    factor = factor.reshape(factor.shape + (1,) * (gradient.ndim - factor.ndim))
    exact = bool((np.frexp(factor)[0] == 0.5).all())
    want = expected.gradients[name] * factor
    noise = expected.gradient_noise[name] * np.abs(factor) + 2 * oracle.U32 * np.abs(want)
    halves = 1 if exact and gradient.dtype is not torch.float16 else 2
    # Rounded once before the factor came: half an ulp of the stored value, which may be just above a power of two while
    # the result is just below one.
    stored = unit_roundoff(gradient.dtype) * np.abs(want) * (halves - 1)
    assert_close(gradient, as_tensor(want), ulps=0.5, noise=as_tensor(noise + stored), what=f"gradient of {name}")


# ------------------------------------------------------------------------------------------------- incoming gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 2.0, 1024.0, 65536.0, 2.0**-10, 0.3, -1.0, -2.5, 0.0])
def test_incoming_gradient(backend: Backend, reduction: str, dtype: torch.dtype, factor: float) -> None:
    arguments = batch(backend, 4, 3, 17, dtype=dtype) | {"reduction": reduction}
    expected = expected_matching(arguments)
    fd.distribution_matching_loss(**arguments).sum().mul(factor).backward()
    check_scaled(arguments["x"].grad, expected, factor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_incoming_gradient_of_a_sample(backend: Backend, dtype: torch.dtype) -> None:
    arguments = batch(backend, 4, 3, 17, dtype=dtype) | {"reduction": "sample"}
    arguments["mask"] = backend.randn(4, 3, 17, seed=8) > 0
    expected = expected_matching(arguments)
    for factors in ([1.0, 0.0, -2.0, 0.3], [1.0] * 4, [1.0, 1.0, 1.0, 4.0]):
        loss = fd.distribution_matching_loss(**arguments)
        (gradient,) = torch.autograd.grad(loss, arguments["x"], backend.tensor(factors, loss.dtype))
        check_scaled(gradient, expected, np.asarray(factors))
    expanded = torch.ones((), device=backend.device).expand(4).to(loss.dtype)
    (gradient,) = torch.autograd.grad(fd.distribution_matching_loss(**arguments), arguments["x"], expanded)
    check_gradient(gradient, arguments["x"], expected)


def test_zero_times_a_non_finite_gradient(backend: Backend) -> None:
    """A sample that is NaN stays NaN under any factor; the others follow the factor."""
    arguments = batch(backend, 2, 5)
    arguments["fake"][0, 0] = math.nan
    loss = fd.distribution_matching_loss(**arguments, reduction="sample")
    (gradient,) = torch.autograd.grad(loss, arguments["x"], backend.tensor([1.0, 0.5]))
    assert gradient[0, 0].isnan()
    assert bool(gradient[0, 1:].isfinite().all())
    assert bool(gradient[1].isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("elements", [1 << 10, 1 << 18, 1 << 20])
@pytest.mark.parametrize("reduction", ["mean", "sample"])
def test_float16_gradient_survives_the_mean(backend: Backend, elements: int, reduction: str) -> None:
    """g / N underflows float16 (2^-20 of about 1); times a loss scale of 65536 it does not, and must not be lost."""
    arguments = batch(backend, 2, elements // 2, dtype=torch.float16) | {"reduction": reduction}
    expected = expected_matching(arguments)
    loss = fd.distribution_matching_loss(**arguments)
    (loss * 65536.0).sum().backward()
    check_scaled(arguments["x"].grad, expected, 65536.0)
    assert_gradient_close(
        arguments["x"].grad, as_tensor(expected.gradients["x"] * 65536.0), roundings=2, what="scaled gradient"
    )


@pytest.mark.parametrize("weight", [1e-4, 3e-6, 1e-8])
def test_float16_gradient_of_small_weights_survives(backend: Backend, weight: float) -> None:
    """g itself is small: the product with the loss scale is a normal float16, whatever g alone would be."""
    arguments = batch(backend, 2, 512, dtype=torch.float16) | {"weight": weight, "reduction": "sum"}
    expected = expected_matching(arguments)
    (fd.distribution_matching_loss(**arguments) * 2.0**20).backward()
    check_scaled(arguments["x"].grad, expected, 2.0**20)


def test_float16_gradient_of_large_weights_does_not_overflow(backend: Backend) -> None:
    """g is beyond float16, g / N is not."""
    arguments = batch(backend, 2, 5000, dtype=torch.float16) | {"weight": 1e6}
    expected = expected_matching(arguments)
    assert np.abs(expected.gradients["x"]).max() < 65504
    fd.distribution_matching_loss(**arguments).backward()
    check_scaled(arguments["x"].grad, expected, 1.0)


def test_grad_scaler(backend: Backend) -> None:
    """What torch.amp.GradScaler does: scale, backward, unscale in float32."""
    arguments = batch(backend, 4, 3, 32, 32, dtype=torch.float16)
    master = arguments["x"].detach().float().requires_grad_()
    expected = expected_matching(arguments)
    scaler = torch.amp.GradScaler(backend.device, init_scale=65536.0)
    optimizer = torch.optim.SGD([master], lr=1.0)
    arguments["x"] = master.half()
    scaler.scale(fd.distribution_matching_loss(**arguments)).backward()
    scaler.unscale_(optimizer)
    assert master.grad is not None
    want = expected.gradients["x"]
    noise = expected.gradient_noise["x"] + 2 * unit_roundoff(torch.float16) * np.abs(want) + 2.0**-25 / 65536
    assert_close(master.grad, as_tensor(want), noise=as_tensor(noise), what="unscaled gradient")


def test_bfloat16_is_within_one_rounding(backend: Backend) -> None:
    """Not 0.4% off as mse(x, x - g) in bfloat16 is: half an ulp of the float64 result, and no bias."""
    arguments = batch(backend, 3, 40000, dtype=torch.bfloat16)
    arguments["fake"] = (arguments["teacher"].float() + 0.01 * backend.randn(3, 40000, seed=9)).bfloat16()
    expected = expected_matching(arguments)
    fd.distribution_matching_loss(**arguments).backward()
    check_gradient(arguments["x"].grad, arguments["x"], expected)
    assert_gradient_close(arguments["x"].grad, as_tensor(expected.gradients["x"]))


# -------------------------------------------------------------------------------------------------- graphs and reuse


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_second_backward(backend: Backend, reduction: str, dtype: torch.dtype, factor: float) -> None:
    """With retain_graph, whatever the user does to x.grad in between."""
    arguments = batch(backend, 4, 33, dtype=dtype) | {"reduction": reduction}
    expected = expected_matching(arguments)
    x = arguments["x"]
    loss = fd.distribution_matching_loss(**arguments).sum() * factor
    for spoil in (Tensor.zero_, lambda grad: grad.fill_(math.nan), lambda grad: grad.mul_(7), lambda grad: grad):
        x.grad = None
        loss.backward(retain_graph=True)
        check_scaled(x.grad, expected, factor)
        spoil(x.grad)
    x.grad = None
    loss.backward()
    check_scaled(x.grad, expected, factor)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_second_backward_with_another_factor(backend: Backend) -> None:
    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    loss = fd.distribution_matching_loss(**arguments)
    for factor in (0.3, 1.0, 2.0, 1.0):
        (gradient,) = torch.autograd.grad(loss, arguments["x"], backend.tensor(factor), retain_graph=True)
        check_scaled(gradient, expected, factor)
    (gradient,) = torch.autograd.grad(loss, arguments["x"])
    check_scaled(gradient, expected, 1.0)


def test_results_of_two_backwards_share_no_memory(backend: Backend) -> None:
    arguments = batch(backend, 4, 33)
    loss = fd.distribution_matching_loss(**arguments)
    gradients = [torch.autograd.grad(loss, arguments["x"], retain_graph=keep)[0] for keep in (True, True, False)]
    assert len({gradient.data_ptr() for gradient in gradients}) == 3
    kept = gradients[1].clone()
    gradients[0].zero_()
    gradients[2].zero_()
    assert torch.equal(gradients[1], kept)


def test_gradients_accumulate(backend: Backend) -> None:
    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    for _ in range(3):
        fd.distribution_matching_loss(**arguments).backward()
    check_scaled(arguments["x"].grad, expected, 3.0)
    arguments["x"].grad = None
    loss = fd.distribution_matching_loss(**arguments)
    (loss + loss + loss).backward()
    check_scaled(arguments["x"].grad, expected, 3.0)


def test_two_losses_in_one_graph(backend: Backend) -> None:
    first, second = batch(backend, 4, 33), batch(backend, 4, 33, seed=5)
    second["x"] = first["x"]
    expected = [expected_matching(arguments) for arguments in (first, second)]
    total = 0.3 * fd.distribution_matching_loss(**first) + fd.distribution_matching_loss(**second)
    total.backward()
    want = 0.3 * expected[0].gradients["x"] + expected[1].gradients["x"]
    noise = expected[0].gradient_noise["x"] + expected[1].gradient_noise["x"] + 4 * oracle.U32 * np.abs(want)
    noise += oracle.U32 * (np.abs(expected[0].gradients["x"]) + np.abs(expected[1].gradients["x"]))
    assert_close(first["x"].grad, as_tensor(want), noise=as_tensor(noise), what="sum of gradients")


def test_non_leaf_and_views(backend: Backend) -> None:
    """x from a generator: the gradient goes through it."""
    arguments = batch(backend, 4, 3, 11)
    leaf = arguments["x"]
    arguments["x"] = (leaf * 2.0).transpose(0, 1).contiguous().transpose(0, 1)
    expected = expected_matching(arguments)
    fd.distribution_matching_loss(**arguments).backward()
    check_scaled(leaf.grad, expected, 2.0)


def test_loss_is_not_the_last_operation(backend: Backend) -> None:
    arguments = batch(backend, 4, 11)
    expected = expected_matching(arguments)
    loss = fd.distribution_matching_loss(**arguments)
    (loss.square() + loss).backward()
    check_scaled(arguments["x"].grad, expected, 1 + 2 * float(expected.loss))


def test_inputs_may_change_after_the_forward(backend: Backend) -> None:
    """Nothing but the gradient is saved: in-place changes of the inputs afterwards neither raise nor matter."""
    arguments = batch(backend, 4, 11)
    expected = expected_matching(arguments)
    leaf = arguments["x"]
    arguments["x"] = leaf * 1.0
    loss = fd.distribution_matching_loss(**arguments)
    with torch.no_grad():
        for name in ("x", "teacher", "fake"):
            arguments[name].zero_()
    loss.backward()
    check_scaled(leaf.grad, expected, 1.0)


DOUBLE = {
    "backward": lambda gradient, x: gradient.square().sum().backward(),
    "grad": lambda gradient, x: torch.autograd.grad(gradient.square().sum(), x),
    "penalty": lambda gradient, x: (x.sum() + gradient.square().sum()).backward(),
}


@pytest.mark.parametrize("idiom", DOUBLE)
@pytest.mark.parametrize("operation", ["matching", "scaled", "identity", "f_distill", "sample"])
def test_double_backward_raises(backend: Backend, idiom: str, operation: str) -> None:
    """However it is asked for, with a message that says why; a gradient penalty must not silently be a constant."""
    arguments = batch(backend, 4, 11)
    loss = {
        "matching": lambda: fd.distribution_matching_loss(**arguments),
        "scaled": lambda: fd.distribution_matching_loss(**arguments) * 0.3,
        "identity": lambda: fd.score_identity_loss(**arguments),
        "f_distill": lambda: fd.f_distill_loss(**arguments, logits=backend.randn(4)),
        "sample": lambda: fd.distribution_matching_loss(**arguments, reduction="sample").sum(),
    }[operation]()
    (gradient,) = torch.autograd.grad(loss, arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"fdistill_ops.*differentiable once"):
        DOUBLE[idiom](gradient, arguments["x"])


def test_create_graph_alone_is_harmless(backend: Backend) -> None:
    """Some trainers always pass it."""
    arguments = batch(backend, 4, 11)
    expected = expected_matching(arguments)
    loss = fd.distribution_matching_loss(**arguments)
    (gradient,) = torch.autograd.grad(loss, arguments["x"], create_graph=True)
    check_gradient(gradient, arguments["x"], expected)


# ------------------------------------------------------------------------------------------- where gradients go


def test_nothing_flows_elsewhere(backend: Backend) -> None:
    """Every other tensor requires a gradient and gets none."""
    arguments = batch(backend, 4, 3, 11)
    others = {
        "teacher": arguments["teacher"],
        "fake": arguments["fake"],
        "teacher_uncond": backend.randn(4, 3, 11, seed=3),
        "x_t": backend.randn(4, 3, 11, seed=4),
        "guidance_scale": backend.randn(4, seed=5),
        "alpha": backend.randn(4, seed=6).abs() + 0.2,
        "sigma": backend.randn(4, seed=7).abs() + 0.2,
        "normalizer": backend.randn(4, seed=8).abs() + 0.2,
    }
    weight, logits = backend.randn(4, seed=9).abs().requires_grad_(), backend.leaf(4, 2, seed=10)
    for value in others.values():
        value.requires_grad_()
    x = arguments["x"]
    losses = [
        fd.distribution_matching_loss(x, **others, weight=weight, prediction="eps"),
        fd.f_distill_loss(x, **others, logits=logits, prediction="eps"),
    ]
    for loss in losses:
        gradients = torch.autograd.grad(loss, [x, weight, logits, *others.values()], allow_unused=True)
        assert gradients[0] is not None
        assert all(gradient is None for gradient in gradients[1:])
    loss = fd.distribution_matching_loss(x.detach(), **others, weight=weight, prediction="eps")
    assert not loss.requires_grad
    loss = fd.score_identity_loss(x, others["teacher"], others["fake"], weight=weight, normalizer=others["normalizer"])
    gradients = torch.autograd.grad(
        loss, [x, others["teacher"], others["fake"], weight, others["normalizer"]], allow_unused=True
    )
    assert [gradient is None for gradient in gradients] == [False, False, False, True, True]
    g = fd.score_difference(x, **others, weight=weight, prediction="eps")
    assert not g.requires_grad


@pytest.mark.parametrize("which", range(1, 8))
def test_score_identity_gives_the_gradients_asked_for(backend: Backend, which: int) -> None:
    """Any subset of x, teacher and fake; the values do not depend on the subset."""
    values = [backend.randn(4, 3, 11, seed=s) for s in range(3)]
    all_leaves = [value.clone().requires_grad_() for value in values]
    want = torch.autograd.grad(fd.score_identity_loss(*all_leaves, alpha=1.2), all_leaves)
    leaves = [value.clone().requires_grad_(bool(which >> i & 1)) for i, value in enumerate(values)]
    fd.score_identity_loss(*leaves, alpha=1.2).backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == bool(which >> i & 1)
        if leaf.grad is not None:
            assert_close(leaf.grad, want[i], ulps=1, what=f"gradient {i}")


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 80, 80)])
def test_a_float16_gradient_is_not_scaled_by_others(backend: Backend, shape: tuple[int, ...]) -> None:
    """alpha makes those of teacher and fake large, which nobody asked for, or which are float32."""
    device = backend.device
    x = torch.randn(shape, device=device).half().requires_grad_()
    teacher, fake = (torch.randn(shape, device=device) for _ in range(2))
    want = -(teacher - fake) / ((teacher - x.float()).abs().mean(tuple(range(1, len(shape))), keepdim=True) + 1e-6)
    for leaves in ([x], [x, fake.requires_grad_()]):
        loss = fd.score_identity_loss(x, teacher, fake, alpha=2.0**60, reduction="sum")
        got = torch.autograd.grad(loss, leaves)[0]
        torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=1e-7)


def test_score_identity_of_one_tensor_twice(backend: Backend) -> None:
    """x and fake the same leaf: the sum of both derivatives."""
    leaf, teacher = backend.leaf(4, 11), backend.leaf(4, 11, seed=1)
    plain = oracle.score_identity(*(to_numpy(v) for v in (leaf, teacher, leaf)), alpha=1.0)
    fd.score_identity_loss(leaf, teacher, leaf).backward()
    want = plain.gradients["x"] + plain.gradients["fake"]
    size = np.abs(plain.gradients["x"]) + np.abs(plain.gradients["fake"])
    noise = plain.gradient_noise["x"] + plain.gradient_noise["fake"] + 2 * oracle.U32 * size
    assert_close(leaf.grad, as_tensor(want), noise=as_tensor(noise), what="gradient of both")


def test_needs_input_grad(backend: Backend) -> None:
    """backward(inputs=...) that leave x out neither fail nor touch it."""
    arguments = batch(backend, 4, 11)
    other = backend.leaf(4, seed=4)
    loss = fd.distribution_matching_loss(**arguments) + other.sum()
    loss.backward(inputs=[other])
    assert arguments["x"].grad is None
    assert other.grad is not None
    x, teacher, fake = (backend.leaf(4, 11, seed=s) for s in range(3))
    want = torch.autograd.grad(fd.score_identity_loss(x, teacher, fake), fake)[0]
    fd.score_identity_loss(x, teacher, fake).backward(inputs=[fake])
    assert x.grad is None
    assert teacher.grad is None
    assert torch.equal(fake.grad, want)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend: Backend, context: Any) -> None:
    arguments = batch(backend, 4, 11)
    want = fd.distribution_matching_loss(**arguments)
    with context():
        results = [
            fd.distribution_matching_loss(**arguments),
            fd.f_distill_loss(**arguments, logits=backend.randn(4)),
            fd.score_identity_loss(**arguments),
            fd.f_weights(backend.randn(4)),
            fd.score_difference(**arguments),
        ]
    assert not any(result.requires_grad for result in results)
    assert_close(results[0], want.detach(), ulps=1)
    inference = results[4]
    assert bool(inference.isfinite().all())


def test_inference_tensors_as_teachers(backend: Backend) -> None:
    """Predictions made under inference_mode, the loss outside of it."""
    arguments = batch(backend, 4, 11)
    expected = expected_matching(arguments)
    with torch.inference_mode():
        arguments["teacher"], arguments["fake"] = arguments["teacher"].clone(), arguments["fake"].clone()
    fd.distribution_matching_loss(**arguments).backward()
    check_gradient(arguments["x"].grad, arguments["x"], expected)


# ------------------------------------------------------------------------------------------------- numerical checks


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", [1.0, 1.2, -0.5])
def test_gradcheck_of_score_identity(backend: Backend, reduction: str, alpha: float) -> None:
    """n_b is detached, so that only without it (or with a given one) the loss is what its gradients differentiate."""
    inputs = [backend.leaf(2, 3, 2, dtype=torch.float64, seed=s) for s in range(3)]
    mask = backend.randn(2, 3, 2, seed=4) > -0.7
    weight = backend.tensor([0.5, 2.0], torch.float64)
    for normalizer in (None, backend.tensor([0.7, 1.9], torch.float64)):

        def loss(x: Tensor, teacher: Tensor, fake: Tensor, normalizer: Any = normalizer) -> Tensor:
            return fd.score_identity_loss(
                x, teacher, fake, alpha=alpha, weight=weight, mask=mask, normalizer=normalizer, reduction=reduction
            )

        assert torch.autograd.gradcheck(loss, inputs)


def test_gradcheck_of_to_x0_and_gan_losses(backend: Backend) -> None:
    pred, x_t = backend.leaf(2, 3, dtype=torch.float64), backend.leaf(2, 3, dtype=torch.float64, seed=1)
    for prediction in ("eps", "v", "flow", "score"):
        assert torch.autograd.gradcheck(
            lambda p, x, prediction=prediction: fd.to_x0(p, x, prediction=prediction, alpha=0.8, sigma=0.6), (pred, x_t)
        )
    assert torch.autograd.gradcheck(fd.gan_generator_loss, (pred,))
    assert torch.autograd.gradcheck(fd.gan_discriminator_loss, (pred, x_t))


def test_gradient_is_that_of_the_surrogate(backend: Backend) -> None:
    """Finite differences of 0.5 mse(x, target), target = x0 - g(x0) held fixed."""
    arguments = batch(backend, 3, 5, dtype=torch.float64)
    arguments["weight"] = backend.tensor([0.5, 1.0, 2.0], torch.float64)
    arguments["mask"] = backend.randn(3, 5, seed=4) > -0.5
    x = arguments["x"].detach()
    target = x - fd.score_difference(**arguments)
    count = int(arguments["mask"].sum())

    def surrogate(point: Tensor) -> float:
        return float(0.5 * ((point - target).square() * arguments["mask"]).sum() / count)

    loss = fd.distribution_matching_loss(**arguments)
    assert float(loss.detach()) == pytest.approx(surrogate(x), rel=1e-13)
    loss.backward()
    step = 1e-5
    for i in range(x.numel()):
        change = torch.zeros_like(x).view(-1)
        change[i] = step
        change = change.view_as(x)
        slope = (surrogate(x + change) - surrogate(x - change)) / (2 * step)
        assert float(arguments["x"].grad.view(-1)[i]) == pytest.approx(slope, abs=1e-9)


def test_eager_surrogate_in_float32(backend: Backend) -> None:
    """The block of eager PyTorch that this replaces."""
    arguments = batch(backend, 4, 3, 16, 16)
    x, teacher, fake = (arguments[name] for name in ("x", "teacher", "fake"))
    weight = backend.randn(4, seed=5).abs()
    with torch.no_grad():
        n = (x - teacher).abs().mean(dim=(1, 2, 3), keepdim=True)
        g = weight.view(-1, 1, 1, 1) / (n + 1e-6) * (fake - teacher)
    surrogate = 0.5 * torch.nn.functional.mse_loss(x, (x - g).detach())
    (want,) = torch.autograd.grad(surrogate, x)
    loss = fd.distribution_matching_loss(**arguments, weight=weight)
    (got,) = torch.autograd.grad(loss, x)
    assert float(loss.detach()) == pytest.approx(float(surrogate.detach()), rel=2e-6)
    # x - (x - g) rounds by u |x|
    noise = 4 * oracle.U32 * (x.detach().abs() + g.abs() * 4) / x.numel()
    assert_close(got, want, ulps=2, noise=noise, what="gradient")


# ------------------------------------------------------------------------------------------- PyTorch's other machinery


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: Backend, dtype: torch.dtype) -> None:
    """Autocast does not change the arithmetic: inputs keep their dtypes, the loss is float32."""
    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    with torch.autocast(backend.device, dtype=dtype):
        loss = fd.distribution_matching_loss(**arguments)
        weights = fd.f_weights(backend.randn(4))
        identity = fd.score_identity_loss(**arguments)
    assert loss.dtype is torch.float32
    assert identity.dtype is torch.float32
    assert weights.dtype is torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.loss), rel=1e-6)
    loss.backward()
    check_gradient(arguments["x"].grad, arguments["x"], expected)


def test_autocast_through_a_network(backend: Backend) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(11, 11).to(backend.device)
    teacher, fake, z = (backend.randn(4, 11, seed=s) for s in range(3))
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        x = net(z)
        assert x.dtype is torch.bfloat16
        loss = fd.distribution_matching_loss(x, teacher, fake)
    arguments = {"x": x.detach(), "teacher": teacher, "fake": fake}
    expected = expected_matching(arguments)
    loss.backward()
    want = torch.autograd.grad(net(z), net.weight, as_tensor(expected.gradients["x"]).float().to(backend.device))[0]
    assert net.weight.grad is not None
    torch.testing.assert_close(net.weight.grad, want, rtol=2.0**-6, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_saved_tensor_hooks(backend: Backend, factor: float) -> None:
    """What is saved goes through the hooks, and while the graph is kept what they return is not written to."""
    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.detach().clone())
        return packed[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = fd.distribution_matching_loss(**arguments)
    before = [tensor.clone() for tensor in packed]
    (loss * factor).backward(retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(packed, before, strict=True))
    check_scaled(arguments["x"].grad, expected, factor)
    arguments["x"].grad = None
    (loss * factor).backward()
    check_scaled(arguments["x"].grad, expected, factor)
    with torch.autograd.graph.save_on_cpu():
        loss = fd.distribution_matching_loss(**arguments)
    arguments["x"].grad = None
    (loss * factor).backward()
    check_scaled(arguments["x"].grad, expected, factor)


def test_what_is_saved(backend: Backend) -> None:
    """Nothing without a gradient; one tensor of x's size with one; the gradients asked for in score identity."""
    if not backend.compiled:
        pytest.skip("plain PyTorch")
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    def bytes_of(call: Any) -> int:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call()
        return sum(saved)

    for dtype in DTYPES:
        arguments = batch(backend, 4, 1000, dtype=dtype)
        size = arguments["x"].numel() * arguments["x"].element_size()
        x, teacher, fake = (arguments[name] for name in ("x", "teacher", "fake"))
        assert size <= bytes_of(lambda arguments=arguments: fd.distribution_matching_loss(**arguments)) <= size + 64
        assert bytes_of(lambda x=x, t=teacher, f=fake: fd.distribution_matching_loss(x.detach(), t, f)) == 0
        assert size <= bytes_of(lambda x=x, t=teacher, f=fake: fd.score_identity_loss(x, t, f)) <= size + 64
        teacher.requires_grad_()
        assert bytes_of(lambda x=x, t=teacher, f=fake: fd.score_identity_loss(x, t, f)) <= 2 * size + 64


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend: Backend, use_reentrant: bool) -> None:
    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    teacher, fake = arguments["teacher"], arguments["fake"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = checkpoint(
            lambda x: fd.distribution_matching_loss(x, teacher, fake), arguments["x"], use_reentrant=use_reentrant
        )
        (loss * 2).backward()
    check_scaled(arguments["x"].grad, expected, 2.0)


def test_tensor_hooks(backend: Backend) -> None:
    """A hook on x sees the gradient; replacing it works."""
    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    seen: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor:
        seen.append(gradient.clone())
        return gradient * 2

    arguments["x"].register_hook(hook)
    fd.distribution_matching_loss(**arguments).backward()
    check_scaled(seen[0], expected, 1.0)
    check_scaled(arguments["x"].grad, expected, 2.0)


def test_anomaly_mode(backend: Backend) -> None:
    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        warnings.simplefilter("ignore")
        fd.distribution_matching_loss(**arguments).backward()
    check_gradient(arguments["x"].grad, arguments["x"], expected)


def test_deterministic_algorithms(backend: Backend) -> None:
    """torch's flag is honoured: no operation of ours refuses."""
    arguments = batch(backend, 4, 33)
    torch.use_deterministic_algorithms(True)
    try:
        histogram = fd.RatioHistogram(0.0, 1.0).to(backend.device)
        t = backend.randn(4).sigmoid()
        fd.f_distill_loss(**arguments, logits=backend.randn(4), t=t, histogram=histogram).backward()
        fd.score_identity_loss(**arguments).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(arguments["x"].grad.isfinite().all())


def test_backward_in_another_thread(backend: Backend) -> None:
    import threading

    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    loss = fd.distribution_matching_loss(**arguments)
    thread = threading.Thread(target=lambda: (loss * 0.5).backward())
    thread.start()
    thread.join()
    check_scaled(arguments["x"].grad, expected, 0.5)


def test_switching_back_ends_between_forward_and_backward(backend: Backend) -> None:
    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    loss = fd.distribution_matching_loss(**arguments)
    with fd.use_backend("reference"):
        (loss * 0.3).backward()
    check_scaled(arguments["x"].grad, expected, 0.3)


def test_func_grad(backend: Backend) -> None:
    """torch.func.grad gives the same gradient, or PyTorch says that it cannot; never another one."""
    arguments = batch(backend, 4, 33)
    expected = expected_matching(arguments)
    teacher, fake = arguments["teacher"], arguments["fake"]
    try:
        got = torch.func.grad(lambda x: fd.distribution_matching_loss(x, teacher, fake))(arguments["x"].detach())
    except RuntimeError as error:
        assert "torch.func" in str(error) or "functorch" in str(error)
    else:
        check_scaled(got, expected, 1.0)


def test_forward_mode_is_refused(backend: Backend) -> None:
    """A tangent of zero would be a lie."""
    arguments = batch(backend, 3, 5)
    x, rest = arguments.pop("x").detach(), arguments
    for operation in (fd.distribution_matching_loss, fd.score_identity_loss):

        def run(v: Tensor, operation: Any = operation) -> Tensor:
            return operation(v, **rest)

        with pytest.raises(RuntimeError, match=r"forward|jvp|functorch"):
            torch.func.jvp(run, (x,), (torch.ones_like(x),))
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward|jvp"):
            run(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.functional.jvp(run, x, torch.ones_like(x))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_several_incoming_gradients_at_once(backend: Backend, reduction: str) -> None:
    arguments = batch(backend, 3, 5)
    loss = fd.distribution_matching_loss(**arguments, reduction=reduction)
    incoming = backend.randn(2, *loss.shape, seed=9)
    (got,) = torch.autograd.grad(loss, arguments["x"], incoming, is_grads_batched=True, retain_graph=True)
    for one, upstream in zip(got, incoming, strict=True):
        (want,) = torch.autograd.grad(loss, arguments["x"], upstream, retain_graph=True)
        assert_close(one, want, ulps=2, what="gradient")


def test_float16_gradient_is_not_scaled_by_what_the_mask_hides(backend: Backend) -> None:
    arguments = batch(backend, 2, 64, dtype=torch.float16)
    fake = backend.randn(2, 64, seed=2)
    fake[:, 32:] = 1e30
    mask = torch.zeros(2, 64, dtype=torch.bool, device=backend.device)
    mask[:, :32] = True
    arguments |= {"fake": fake, "mask": mask}
    fd.distribution_matching_loss(**arguments).backward()
    check_scaled(arguments["x"].grad, expected_matching(arguments), 1.0)


def test_tensors_without_memory(backend: Backend) -> None:
    """Automatic differentiation makes zero tensors that have no address; they are zeros, not absent."""
    arguments = batch(backend, 3, 5)
    nothing = torch._efficientzerotensor((3,), device=backend.device)
    assert float(fd.distribution_matching_loss(**arguments, weight=nothing)) == 0.0
