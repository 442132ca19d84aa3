"""Tensors that are more than memory: subclasses that wrap others, fakes, functional ones. Any operand may be one; the
result is right, or an error names the argument, and none is taken for absent."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fdistill_ops as fd

SHAPE = (3, 4, 5)
LOSS_NAMES = ("x", "teacher", "fake", "weight", "teacher_uncond", "guidance_scale", "mask", "x_t", "alpha", "sigma")


def loss_arguments(backend: Backend) -> dict[str, Any]:
    """With every tensor there can be."""
    values = {name: backend.randn(*SHAPE, seed=i) for i, name in enumerate(("x", "teacher", "fake", "teacher_uncond"))}
    rows = {name: backend.randn(3, seed=9 + i).abs() + 0.2 for i, name in enumerate(("weight", "alpha", "sigma"))}
    return {
        **values,
        **rows,
        "guidance_scale": backend.randn(3, seed=20).abs(),
        "mask": backend.randn(*SHAPE, seed=21) > 0,
        "x_t": backend.randn(*SHAPE, seed=22),
        "prediction": "eps",
        "normalizer": backend.randn(3, seed=23).abs() + 0.5,
    }


def distilled(arguments: dict[str, Any]) -> Any:
    return fd.f_distill_loss(**{name: value for name, value in arguments.items() if name != "weight"})


class Sub(Tensor):
    """A subclass that says nothing of its own."""


def wrapped(value: Tensor) -> Tensor:
    return TwoTensor(value.clone(), value.clone())


def unwrapped(value: Tensor) -> Tensor:
    return value.a if isinstance(value, TwoTensor) else value.as_subclass(Tensor)


@pytest.mark.parametrize("name", [*LOSS_NAMES, "normalizer"])
@pytest.mark.parametrize("kind", ["TwoTensor", "subclass"])
def test_every_operand_of_a_loss_decides(backend: Backend, name: str, kind: str) -> None:
    """As the same values in a plain tensor, to the bit: loss, gradient and score difference."""
    arguments = loss_arguments(backend)
    made = wrapped(arguments[name]) if kind == "TwoTensor" else arguments[name].clone().as_subclass(Sub)
    x = arguments["x"].clone().requires_grad_()
    expected = fd.distribution_matching_loss(**arguments | {"x": x})
    (gradient,) = torch.autograd.grad(expected, x)
    changed = arguments | {name: made}
    changed["x"] = changed["x"].requires_grad_()
    loss = fd.distribution_matching_loss(**changed)
    assert torch.equal(unwrapped(loss.detach()), expected.detach())
    (found,) = torch.autograd.grad(loss, changed["x"])
    assert torch.equal(unwrapped(found), gradient)
    changed["x"] = changed["x"].detach()
    g = fd.score_difference(**changed)
    assert torch.equal(unwrapped(g), fd.score_difference(**arguments))


@pytest.mark.parametrize("name", ["x", "teacher", "fake", "weight", "mask", "normalizer"])
def test_every_operand_of_score_identity_decides(backend: Backend, name: str) -> None:
    all_names = ("x", "teacher", "fake", "weight", "mask", "normalizer")
    arguments = {key: value for key, value in loss_arguments(backend).items() if key in all_names}
    expected = fd.score_identity_loss(**arguments)
    loss = fd.score_identity_loss(**arguments | {name: wrapped(arguments[name])})
    assert torch.equal(unwrapped(loss), expected)


@pytest.mark.parametrize("name", ["logits", "t", "bins", "teacher"])
def test_every_operand_of_the_weights_decides(backend: Backend, name: str) -> None:
    results = []
    for wrap in (False, True):
        histogram = fd.RatioHistogram(0.0, 1.0, 4, ema_rate=0.9).to(backend.device)
        arguments = loss_arguments(backend) | {"logits": backend.randn(3, 2, seed=30), "t": backend.randn(3, seed=31)}
        if wrap and name == "bins":
            histogram.bins = wrapped(histogram.bins)
        elif wrap:
            arguments[name] = wrapped(arguments[name])
        loss = distilled(arguments | {"histogram": histogram})
        results.append((unwrapped(loss), unwrapped(histogram.bins)))
        if name != "teacher":
            weights = fd.f_weights(arguments["logits"], arguments["t"], histogram=histogram)
            results[-1] += (unwrapped(weights), unwrapped(histogram.bins))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


@pytest.mark.parametrize("name", [name for name in LOSS_NAMES if name != "x"])
def test_a_fake_tensor_among_real_ones_is_refused_by_name(backend: Backend, name: str) -> None:
    arguments = loss_arguments(backend)
    with FakeTensorMode() as mode:
        arguments[name] = mode.from_tensor(arguments[name])
    with pytest.raises(TypeError, match=rf"^{name} is a FakeTensor, but x is none"):
        fd.distribution_matching_loss(**arguments)


def test_fake_tensors_alone_give_a_fake_loss(backend: Backend) -> None:
    arguments = loss_arguments(backend)
    mode = FakeTensorMode()
    with mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in arguments.items()}
        loss = fd.distribution_matching_loss(**fakes)
    assert isinstance(loss, FakeTensor)


@pytest.mark.parametrize("name", ["x", "teacher", "fake", "weight", "mask", "x_t", "normalizer"])
def test_a_masked_tensor_is_refused_by_name(backend: Backend, name: str) -> None:
    arguments = loss_arguments(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = arguments[name]
        arguments[name] = torch.masked.masked_tensor(value, torch.ones_like(value, dtype=torch.bool))
        with pytest.raises(TypeError, match=rf"^{name} is a MaskedTensor.*get_data"):
            fd.distribution_matching_loss(**arguments)


@pytest.mark.parametrize("name", [*LOSS_NAMES, "normalizer", "logits", "t"])
def test_a_functional_tensor_is_refused_by_name(backend: Backend, name: str) -> None:
    """Its type is Tensor, and it has no memory."""
    arguments = loss_arguments(backend) | {"logits": backend.randn(3, seed=30)}
    arguments |= {"t": backend.randn(3, seed=31), "histogram": fd.RatioHistogram(0.0, 1.0).to(backend.device)}
    if name == "weight":
        del arguments["logits"], arguments["t"], arguments["histogram"]
    arguments[name] = torch._to_functional_tensor(arguments[name])
    with pytest.raises(TypeError, match=rf"^{name} has no memory"):
        fd.distribution_matching_loss(**arguments) if name == "weight" else distilled(arguments)


def test_lazily_negated_bins(backend: Backend) -> None:
    histogram, negated = (fd.RatioHistogram(0.0, 1.0, 4, ema_rate=0.5).to(backend.device) for _ in range(2))
    negated.bins = torch._neg_view(-histogram.bins)
    logits, t = backend.randn(3), backend.randn(3, seed=1).sigmoid()
    expected = fd.f_weights(logits, t, histogram=histogram)
    assert torch.equal(fd.f_weights(logits, t, histogram=negated), expected)
    assert torch.equal(negated.bins.resolve_neg(), histogram.bins)


def test_parameters_without_values_are_refused_by_name(backend: Backend) -> None:
    for name in ("x", "teacher", "fake", "weight", "mask", "x_t", "alpha"):
        with pytest.raises(TypeError, match=f"^{name} is a UninitializedParameter"):
            fd.distribution_matching_loss(**loss_arguments(backend) | {name: torch.nn.UninitializedParameter()})
    with pytest.raises(TypeError, match=r"^logits is a UninitializedBuffer"):
        fd.f_weights(torch.nn.UninitializedBuffer())


@pytest.mark.parametrize("dtype", [torch.uint4, torch.bool, torch.complex64, torch.quint8])
def test_times_without_a_number_are_refused_by_name(backend: Backend, dtype: torch.dtype) -> None:
    t = torch.empty(3, dtype=torch.uint8)
    if dtype is torch.quint8:
        t = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, dtype)
    else:
        t = torch.empty(3, dtype=dtype)
    with pytest.raises(TypeError, match=r"^t (must be of a real dtype|has the layout)"):
        fd.f_weights(backend.randn(3), t, histogram=fd.RatioHistogram(0.0, 1.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int64])
def test_times_of_every_integer_dtype(backend: Backend, dtype: torch.dtype) -> None:
    results = []
    for times in (dtype, torch.float64):
        histogram = fd.RatioHistogram(0.0, 100.0, ema_rate=0.5).to(backend.device)
        t = torch.tensor([3, 50, 99]).to(times).to(backend.device)
        results.append((fd.f_weights(backend.randn(3), t, histogram=histogram), histogram.bins))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", ["subclass", "compiled"])
def test_a_double_backward_through_the_operators_is_refused(backend: Backend, kind: str) -> None:
    x = backend.randn(2, 3)
    if kind == "subclass":
        x = x.as_subclass(Sub)
    x.requires_grad_()
    matching, identity = fd.distribution_matching_loss, fd.score_identity_loss
    if kind == "compiled":
        torch._dynamo.reset()
        matching, identity = (torch.compile(function, backend="eager") for function in (matching, identity))
    others = backend.randn(2, 3, seed=1), backend.leaf(2, 3, seed=2)
    for loss in (matching(x, *others), identity(x, *others)):
        (gradient,) = torch.autograd.grad(loss, [x], create_graph=True)
        with pytest.raises(RuntimeError, match=r"fdistill_ops.*differentiable once"):
            gradient.sum().backward()


def test_zeros_without_memory(backend: Backend) -> None:
    """As automatic differentiation makes them: operands like any other, nothing to write to."""
    x, teacher = backend.randn(2, 3), backend.randn(2, 3, seed=1)
    nothing = torch._efficientzerotensor((2, 3)).to(backend.device)
    expected = fd.score_difference(x, teacher, torch.zeros_like(x))
    assert torch.equal(fd.score_difference(x, teacher, nothing, out=torch.empty_like(x)), expected)
    with pytest.raises(ValueError, match=r"^out has no memory"):
        fd.score_difference(x, teacher, teacher, out=nothing)


@pytest.mark.parametrize("offset", [0, 1])
def test_zeros_and_functional_tensors_with_an_offset(backend: Backend, offset: int) -> None:
    """Their address is not 0 then."""
    nothing = torch._efficientzerotensor((5,)).to(backend.device)[offset : offset + 4]
    x = torch.ones(4, device=backend.device)
    expected = fd.distribution_matching_loss(x, x + 1, torch.zeros_like(x))
    assert torch.equal(fd.distribution_matching_loss(x, x + 1, nothing), expected)
    assert torch.equal(fd.f_weights(nothing), fd.f_weights(torch.zeros_like(x)))
    leaf = x.clone().requires_grad_()
    fd.distribution_matching_loss(leaf, x + 1, x - 1, reduction="sample").backward(nothing)
    assert leaf.grad is not None
    assert not bool(leaf.grad.any())
    with pytest.raises(ValueError, match=r"^out has no memory"):
        fd.score_difference(x, x + 1, x, out=nothing)
    functional = torch._to_functional_tensor(torch.zeros(5, device=backend.device))[offset : offset + 4]
    for call in (
        lambda: fd.distribution_matching_loss(x, x + 1, functional),
        lambda: fd.f_weights(functional),
        lambda: fd.score_difference(x, x + 1, x, weight=functional, out=torch.empty_like(x)),
    ):
        with pytest.raises(TypeError, match=r"^(fake|logits|weight) has no memory"):
            call()


def test_out_is_marked_as_changed(backend: Backend) -> None:
    """A graph that has saved it cannot be differentiated with what is in it now."""
    x, teacher, fake = (backend.randn(2, 3, seed=seed) for seed in range(3))
    out = backend.randn(2, 3, seed=3)
    factor = backend.leaf(2, 3, seed=4)
    product = (out * factor).sum()
    fd.score_difference(x, teacher, fake, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_out_and_inference_mode(backend: Backend) -> None:
    x, teacher, fake = (backend.randn(2, 3, seed=seed) for seed in range(3))
    with torch.inference_mode():
        out = torch.full((2, 3), 7.0, device=backend.device)
    with pytest.raises(ValueError, match=r"^out is an inference tensor"):
        fd.score_difference(x, teacher, fake, out=out)
    assert bool((out == 7).all())
    with torch.inference_mode():
        fd.score_difference(x, teacher, fake, out=out)
        assert torch.equal(out, fd.score_difference(x, teacher, fake))


def test_out_without_elements_may_have_any_strides(backend: Backend) -> None:
    empty = torch.zeros(2, 0, 2, device=backend.device)
    out = torch.zeros(1, 0, 2, device=backend.device).expand(2, 0, 2)
    assert fd.score_difference(empty, empty, empty, out=out) is out


@pytest.mark.parametrize("vector", [None, [0.0] * 14, torch.zeros(3), torch.zeros(2, 14)])
def test_statistics_of_something_else(vector: Any) -> None:
    with pytest.raises(TypeError, match="vector"):
        fd.LossStats(vector)


@pytest.mark.parametrize(
    "changes", [{"nonfinite": "x"}, {"prediction": "x"}, {"reduction": "x"}, {"normalizer": "x"}, {"divergence": "x"}]
)
def test_warmup_of_nothing_checks_its_arguments(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        fd.warmup([], **changes)


def test_wrappers_in_inference_mode(backend: Backend) -> None:
    """Right, or refused by name: PyTorch may not detach there what was made outside."""
    arguments = loss_arguments(backend)
    expected = fd.distribution_matching_loss(**arguments)
    for name in ("x", "teacher", "weight", "mask"):
        with torch.inference_mode():
            try:
                loss = fd.distribution_matching_loss(**arguments | {name: wrapped(arguments[name])})
            except TypeError as error:
                assert str(error).startswith(name)
            else:
                assert torch.equal(unwrapped(loss), expected)


@pytest.mark.parametrize(
    "h", [lambda r: r.to_sparse(), lambda r: r.to(torch.complex64), lambda r: r.to("meta"), lambda r: r > 1]
)
def test_a_weight_function_of_other_tensors(h: Any) -> None:
    with pytest.raises(ValueError, match="h: divergence 'of_this_test'"):
        fd.register_divergence("of_this_test", h=h)
    assert "of_this_test" not in fd.DIVERGENCES


def test_out_beside_a_functional_tensor(backend: Backend) -> None:
    x, teacher, fake = (backend.randn(2, 3, seed=seed) for seed in range(3))
    functional = torch._to_functional_tensor(torch.ones(1, 1))
    with pytest.raises(TypeError, match=r"^alpha has no memory"):
        fd.score_difference(
            x, teacher, fake, prediction="eps", x_t=x.clone(), alpha=functional, sigma=0.3, out=torch.empty_like(x)
        )


def test_mixtures_of_subclasses(backend: Backend) -> None:
    """Right, or an error that names one of them."""
    x, teacher, fake = (backend.randn(2, 3, seed=seed) for seed in range(3))
    expected = fd.distribution_matching_loss(x, teacher, fake)
    for function in (fd.distribution_matching_loss, fd.reference.distribution_matching_loss):
        try:
            loss = function(x.as_subclass(Sub), wrapped(teacher), fake)
        except TypeError as error:
            assert "x (Sub)" in str(error)
        else:
            torch.testing.assert_close(unwrapped(loss), expected)
    with pytest.raises(TypeError, match=r"^logits \(FakeTensor\)"):
        fd.reference.f_weights(FakeTensorMode().from_tensor(torch.zeros(1)))


def test_out_that_is_empty_and_cannot_be_written(backend: Backend) -> None:
    empty = torch.zeros(0, device=backend.device)
    with torch.inference_mode():
        made_there = torch.zeros(0, device=backend.device)
    for out in (made_there, torch._efficientzerotensor((0,)).to(backend.device)):
        with pytest.raises(ValueError, match=r"^out "):
            fd.score_difference(empty, empty, empty, out=out)
    nothing = torch._efficientzerotensor((1,)).to(backend.device)[1:]
    assert float(fd.distribution_matching_loss(empty, empty, nothing)) == 0.0


def test_float16_differences_through_the_operators(backend: Backend) -> None:
    """An element beyond float16 takes no digits from the others."""
    x = torch.zeros(1, 2, dtype=torch.float16, device=backend.device)
    for large in (1e10, 1e36):
        fake = backend.tensor([[1.2345, large]])
        expected = fd.score_difference(x, torch.zeros_like(fake), fake, normalizer=None)
        g = fd.score_difference(x.as_subclass(Sub), torch.zeros_like(fake), fake, normalizer=None)
        assert g.dtype is torch.float16
        assert torch.equal(unwrapped(g), expected)


def test_the_argument_is_named_that_the_caller_gave(backend: Backend) -> None:
    """Not what was made of it."""
    x, teacher, fake = (backend.randn(2, 3, seed=seed) for seed in range(3))
    logits = wrapped(backend.randn(2, seed=3))
    try:
        fd.f_score_difference(x.as_subclass(Sub), teacher, fake, logits)
    except TypeError as error:
        assert "logits (TwoTensor)" in str(error)
    with torch.inference_mode():
        for name, value in (
            ("weight", torch.ones(2, 1)),
            ("logits", torch.ones(2, 1, 3, 3)),
            ("mask", torch.ones(2) > 0),
        ):
            arguments: dict[str, Any] = {"logits": backend.randn(2)} | {name: wrapped(value.to(backend.device))}
            try:
                fd.f_distill_loss(x, teacher, fake, **arguments)
            except TypeError as error:
                assert name in str(error)
    for value in (torch.Tensor, int):
        with pytest.raises(TypeError, match=r"^eps must be a number"):
            fd.distribution_matching_loss(x, teacher, fake, eps=value)  # type: ignore[arg-type]


def test_functional_tensors_beside_subclasses(backend: Backend) -> None:
    """Named as well where the call goes through the operators, or is composed of several; nothing is written."""
    x, teacher, fake = (backend.randn(2, 3, seed=seed) for seed in range(3))
    functional, out = torch._to_functional_tensor(fake), backend.randn(2, 3, seed=3)
    before, histogram = out.clone(), fd.RatioHistogram(0.0, 1.0, 4, ema_rate=0.0).to(backend.device)
    bins = histogram.bins.clone()
    for more in ({}, {"max_norm": 1e-3}, {"reduction": "none"}):
        with pytest.raises(TypeError, match=r"^fake has no memory"):
            fd.distribution_matching_loss(x, teacher.as_subclass(Sub), functional, **more)
    with pytest.raises(TypeError, match=r"^fake has no memory"):
        logits, t = backend.randn(2), backend.randn(2).sigmoid()
        fd.f_distill_loss(x, teacher.as_subclass(Sub), functional, logits, t, histogram=histogram)
    with pytest.raises(TypeError, match=r"^fake has no memory"):
        fd.score_difference(x, teacher.as_subclass(Sub), functional, out=out)
    assert torch.equal(out, before) and torch.equal(histogram.bins, bins)


def test_out_of_another_type_than_the_operands(backend: Backend) -> None:
    """Refused before anything is written."""
    x, teacher, fake = (backend.randn(2, 3, seed=seed) for seed in range(3))
    inner = backend.randn(2, 3, seed=3)
    before = inner.clone()
    with pytest.raises(TypeError, match=r"^out is a TwoTensor"):
        fd.score_difference(x.as_subclass(Sub), teacher, fake, out=wrapped(inner))
    assert torch.equal(inner, before)
    zero = torch._efficientzerotensor((2, 3)).to(backend.device).as_subclass(Sub)
    with pytest.raises(ValueError, match=r"^out has no memory"):
        fd.score_difference(x, teacher, fake, out=zero)


def test_zeros_without_memory_are_numbers(backend: Backend) -> None:
    """0 times infinity is NaN for them too."""
    x, teacher, fake = (backend.randn(1, seed=seed) for seed in range(3))
    zero = torch._efficientzerotensor((1,)).to(backend.device)
    arguments = {"prediction": "eps", "x_t": x.clone(), "sigma": 0.4}
    g = fd.score_difference(x, teacher, fake, weight=zero, alpha=zero, **arguments)
    assert bool(g.isnan()) == bool(
        fd.score_difference(x, teacher, fake, weight=zero.clone(), alpha=0.0, **arguments).isnan()
    )
    assert g.isnan()


def test_what_is_made_of_several_calls_names_its_operands() -> None:
    x, logits, functional = torch.randn(1), torch.randn(1), torch._to_functional_tensor(torch.ones(1))
    with torch.inference_mode(), pytest.raises(TypeError, match=r"^weight"):
        fd.reference.f_distill_loss(x, x + 1, x + 2, logits, weight=functional)
    with pytest.raises(TypeError, match=r"^x_t \(TwoTensor\)"):
        fd.to_x0(torch._efficientzerotensor((1,)), wrapped(x), prediction="v", alpha=0.5, sigma=0.7)
    with pytest.raises(TypeError, match=r"^out is a TwoTensor"):
        fd.f_score_difference(x, x + 1, x + 2, logits.as_subclass(Sub), out=wrapped(x + 3))
    with pytest.raises(TypeError, match=r"^fake_logits \(86 dimensions\)"):
        fd.gan_discriminator_loss(torch.ones(1, device="meta"), torch.ones([1] * 86, device="meta"))
    made = [FakeTensorMode().from_tensor(x) for _ in range(2)]
    with pytest.raises(TypeError, match=r"^real_logits \(FakeTensor\), fake_logits"):
        fd.gan_discriminator_loss(*made)
    empty = torch.zeros(0, 1, 1)
    with pytest.raises(ValueError, match=r"^guidance_scale must have shape \[0\], got \(0, 2, 1\)"):
        fd.distribution_matching_loss(empty, empty, empty, teacher_uncond=empty, guidance_scale=torch.zeros(0, 2, 1))
    with pytest.raises(ValueError, match=r"^device 'cuda:99' is not there"):
        fd.warmup([(2, 3)], device="cuda:99")
