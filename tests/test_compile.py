"""torch.library, torch.compile, torch.export and fake tensors."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import Backend, since
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fdistill_ops as fd
from fdistill_ops import _ops
from fdistill_ops._call import NAMES, Operands
from fdistill_ops.params import RULES, LossParams, WeightParams
from fdistill_ops.testing import assert_close, lay_out

pytestmark = pytest.mark.no_poison


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.fixture
def operators(backend: Backend) -> Any:
    if not backend.compiled:
        pytest.skip("the reference is plain PyTorch and has no operators")
    return torch.ops.fdistill


def batch(backend: Backend, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "x": backend.leaf(*shape, dtype=dtype),
        "teacher": backend.randn(*shape, dtype=dtype, seed=1),
        "fake": backend.randn(*shape, dtype=dtype, seed=2),
    }


# ------------------------------------------------------------------------------------------------------------ opcheck

# opcheck's comparison of eager with traced results takes no NaN for equal; statistics of absent logits are NaN.
ALL = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")

# name: dtype of x, requires_grad, layout, changes to LossParams, which optional tensors
LOSS_CASES: dict[str, tuple[torch.dtype, bool, str, dict[str, Any], tuple[str, ...]]] = {
    "plain": (torch.float32, True, "contiguous", {}, ()),
    "no gradient": (torch.float32, False, "contiguous", {}, ()),
    "stats": (torch.float32, True, "contiguous", {"need_stats": True}, ("weight", "mask")),
    "sample": (torch.float32, True, "permuted", {"reduction": 2}, ("weight",)),
    "sum": (torch.bfloat16, True, "contiguous", {"reduction": 1}, ("mask",)),
    "float16": (torch.float16, True, "contiguous", {}, ()),
    "float16 sample": (torch.float16, True, "contiguous", {"reduction": 2, "need_stats": True}, ()),
    "float16 sum": (torch.float16, True, "contiguous", {"reduction": 1}, ()),
    "float64": (torch.float64, True, "sliced", {"zero_nonfinite": True}, ("mask",)),
    "guidance": (torch.bfloat16, True, "contiguous", {}, ("teacher_uncond", "guidance_scale")),
    "prediction": (torch.float32, True, "channels_last", {"prediction": 2}, ("x_t", "alpha", "sigma")),
    "given normaliser": (torch.float32, True, "contiguous", {"normalizer": 2}, ("normalizer",)),
    "no normaliser": (torch.float32, True, "contiguous", {"normalizer": 0}, ("weight",)),
}


def optional(backend: Backend, shape: tuple[int, ...], names: Sequence[str] = NAMES[3:]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {
        "weight": backend.randn(shape[0], seed=3).abs(),
        "teacher_uncond": backend.randn(*shape, seed=4),
        "guidance_scale": backend.randn(shape[0], seed=5),
        "mask": backend.randn(*shape, seed=6) > 0,
        "x_t": backend.randn(*shape, seed=7),
        "alpha": backend.randn(*shape[:2], seed=8).abs() + 0.1,
        "sigma": backend.randn(shape[0], seed=9).abs(),
        "normalizer": backend.randn(shape[0], seed=10).abs() + 0.1,
    }
    return {name: made[name] for name in names}


def arguments_of(
    inputs: Iterable[Tensor],
    tensors: Mapping[str, Tensor] | None = None,
    params: LossParams | None = None,
    needs: Sequence[bool] = (True, False, False),
    sources: Sequence[Tensor | None] = (None, None, None),
) -> tuple[Any, ...]:
    """Of the operator ``loss``; ``sources``: logits, t, bins."""
    operands = Operands(*inputs, **(tensors or {}))
    return (*operands, *sources, *WeightParams(), *(params or LossParams()), *needs)


@pytest.mark.parametrize("case", LOSS_CASES)
def test_opcheck_distribution_matching(backend: Backend, operators: Any, case: str) -> None:
    dtype, needed, layout, changes, names = LOSS_CASES[case]
    x, teacher, fake = (lay_out(backend.randn(3, 4, 5, 6, dtype=dtype, seed=s), layout) for s in range(3))
    x.requires_grad_(needed)
    tensors, params = optional(backend, (3, 4, 5, 6), names), LossParams(**changes)
    checks = ALL[:3] if changes.get("need_stats") else ALL
    arguments = arguments_of((x, teacher, fake), tensors, params, (needed, False, False))
    torch.library.opcheck(operators.loss.default, arguments, test_utils=checks)


@pytest.mark.parametrize("case", ["plain", "stats", "sample", "float16", "guidance", "no gradient"])
@pytest.mark.parametrize("histogram", [False, True])
def test_opcheck_f_distill(backend: Backend, operators: Any, case: str, histogram: bool) -> None:
    dtype, needed, layout, changes, names = LOSS_CASES[case]
    x, teacher, fake = (lay_out(backend.randn(3, 4, 5, 6, dtype=dtype, seed=s), layout) for s in range(3))
    x.requires_grad_(needed)
    t, bins = (backend.randn(3, seed=11).sigmoid(), torch.ones(4, device=backend.device)) if histogram else (None, None)
    tensors = optional(backend, (3, 4, 5, 6), tuple(name for name in names if name != "weight"))
    sources, params = (backend.randn(3, 2, seed=12), t, bins), LossParams(**changes)
    torch.library.opcheck(
        operators.loss.default, arguments_of((x, teacher, fake), tensors, params, (needed, False, False), sources)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("histogram", [False, True])
def test_opcheck_f_weights(backend: Backend, operators: Any, dtype: torch.dtype, histogram: bool) -> None:
    for shape in ((5,), (5, 3)):
        logits = backend.randn(*shape, dtype=dtype)
        t, bins = (
            (backend.randn(shape[0]).sigmoid(), torch.ones(4, device=backend.device)) if histogram else (None, None)
        )
        torch.library.opcheck(operators.f_weights.default, (logits, t, bins, *WeightParams(kind=1)))


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, True), (False, False, False)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_score_identity(
    backend: Backend, operators: Any, needs: tuple[bool, bool, bool], dtype: torch.dtype
) -> None:
    inputs = [backend.randn(3, 4, 5, dtype=dtype, seed=s).requires_grad_(need) for s, need in enumerate(needs)]
    tensors = optional(backend, (3, 4, 5), ("weight", "mask"))
    for reduction in (0, 2):
        for need_stats in (False, True):
            rule = RULES["score_identity"]
            params = LossParams(identity_alpha=1.2, reduction=reduction, need_stats=need_stats, rule=rule)
            arguments = arguments_of(inputs, tensors, params, needs)
            torch.library.opcheck(operators.loss.default, arguments, test_utils=ALL[:3] if need_stats else ALL)


def test_the_operators_refuse_tensors_of_other_devices(backend: Backend, operators: Any) -> None:
    """Before any kernel, by the name of the argument: whoever calls them has not been through the public functions."""
    shape = (3, 4, 5, 6)
    inputs = [backend.randn(*shape, seed=s) for s in range(3)]
    logits, params = backend.randn(3), LossParams(prediction=1, normalizer=2)
    tensors = dict(zip(NAMES, inputs, strict=False)) | optional(backend, shape)
    sources = {"logits": logits, "t": logits.sigmoid(), "histogram": torch.ones(4, device=backend.device)}

    def refused(name: str, operator: Any, *values: Any) -> None:
        with pytest.raises(ValueError, match=rf"{name} is on meta, but (x|logits) is on {backend.device}"):
            operator(*values)

    for name in [*NAMES[1:], *sources]:
        changed = {key: value.to("meta") if key == name else value for key, value in (tensors | sources).items()}
        values = [changed[key] for key in (*NAMES, *sources)]
        refused(name, _ops._loss, *values, *WeightParams(), *params, True, False, False)
        if name in ("t", "histogram"):
            refused(name, _ops._f_weights, *values[len(NAMES) :], *WeightParams())


def test_an_operator_has_the_derivatives_of_its_rule(backend: Backend, operators: Any) -> None:
    """And no others, whatever is asked for."""
    inputs = [backend.randn(3, 4, seed=s).requires_grad_() for s in range(3)]
    loss, *gradients, _, _, _ = operators.loss(*arguments_of(inputs, needs=(True, True, True)))
    assert [tuple(gradient.shape) for gradient in gradients] == [(3, 4), (0,), (0,)]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert found[0] is not None and found[1] is None and found[2] is None
    identity = LossParams(rule=RULES["score_identity"])
    loss, *_ = operators.loss(*arguments_of(inputs, params=identity, needs=(True, True, True)))
    assert all(gradient is not None for gradient in torch.autograd.grad(loss, inputs, allow_unused=True))


def test_the_operators_are_functional(backend: Backend, operators: Any) -> None:
    """No schema mutates or aliases an argument."""
    for name in ("loss", "f_weights"):
        schema = getattr(operators, name).default._schema
        assert not schema.is_mutable
        assert not any(value.alias_info for value in (*schema.arguments, *schema.returns))


# ------------------------------------------------------------------------------------------------------ torch.compile


def compare(function: Any, arguments: dict[str, Any], **options: Any) -> None:
    """Values and gradients of the compiled function against eager ones; gradients scaled by 0.3."""
    results = []
    for run in (function, torch.compile(function, fullgraph=True, **options)):
        leaves = {
            name: value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        loss = run(**leaves)
        loss = loss[0] if isinstance(loss, tuple) else loss
        wanted = [value for value in leaves.values() if isinstance(value, Tensor) and value.requires_grad]
        results.append([loss.detach(), *torch.autograd.grad(loss.sum() * 0.3, wanted)])
    for got, want in zip(results[1], results[0], strict=True):
        assert_close(got, want, ulps=8, terms=64, noise=1e-12, what="compiled")


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reduction", ["mean", "sample"])
def test_compile_distribution_matching(backend: Backend, engine: str, reduction: str) -> None:
    arguments = batch(backend, 4, 3, 8, 8) | {"weight": backend.randn(4, seed=3).abs()}
    arguments["mask"] = backend.randn(4, 3, 8, 8, seed=4) > 0

    def step(**arguments: Any) -> Tensor:
        x = arguments.pop("x")
        return fd.distribution_matching_loss(x * 2.0, **arguments, reduction=reduction)

    compare(step, arguments, backend=engine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_compile_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    compare(fd.distribution_matching_loss, batch(backend, 4, 6, dtype=dtype), backend="aot_eager")


def test_compile_everything_at_once(backend: Backend) -> None:
    arguments = batch(backend, 4, 3, 6)
    arguments |= {"teacher_uncond": backend.randn(4, 3, 6, seed=4), "x_t": backend.randn(4, 3, 6, seed=5)}
    arguments |= {"alpha": backend.randn(4, seed=6).abs() + 0.1, "sigma": backend.randn(4, 3, seed=7).abs()}

    def step(**arguments: Any) -> Any:
        return fd.distribution_matching_loss(
            **arguments, guidance_scale=3.0, prediction="flow", return_stats=True, nonfinite="zero"
        )

    compare(step, arguments, backend="aot_eager")


def test_compile_score_identity(backend: Backend) -> None:
    arguments = batch(backend, 4, 3, 6)
    for name in ("teacher", "fake"):
        arguments[name].requires_grad_()
    compare(fd.score_identity_loss, arguments, backend="aot_eager")


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_updates_the_histogram(backend: Backend, engine: str) -> None:
    """The buffer changes under torch.compile as it does without, step after step, and not in eval mode."""
    arguments = batch(backend, 6, 3, 4)
    module = fd.FDistillLoss("kl", histogram=fd.RatioHistogram(0.0, 1.0, bins=3, ema_rate=0.5)).to(backend.device)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend=engine)
    for step in range(3):
        logits, t = backend.randn(6, 2, seed=step), backend.randn(6, seed=step + 9).sigmoid()
        want = twin(**arguments, logits=logits, t=t)
        got = compiled(**arguments, logits=logits, t=t)
        assert_close(got.detach(), want.detach(), ulps=8, what="loss")
        assert_close(module.histogram.bins, twin.histogram.bins, ulps=4, what="bins")
        (want_gradient,) = torch.autograd.grad(want, arguments["x"])
        (got_gradient,) = torch.autograd.grad(got, arguments["x"])
        assert_close(got_gradient, want_gradient, ulps=8, what="gradient")
    module.eval()
    kept = module.histogram.bins.clone()
    compiled(**arguments, logits=logits, t=t)
    assert torch.equal(kept, module.histogram.bins)


def test_compiled_steps_leave_no_graph_behind(backend: Backend) -> None:
    """Neither the histogram nor the statistics belong to the graph of a step: the next one can be differentiated."""
    arguments = batch(backend, 6, 3, 4)
    loss_function = fd.FDistillLoss("js", histogram=fd.RatioHistogram(0.0, 1.0, ema_rate=0.5)).to(backend.device)
    compiled = torch.compile(loss_function, fullgraph=True, backend="aot_eager")
    for step in range(3):
        logits, t = backend.randn(6, seed=step), backend.randn(6, seed=step + 9).sigmoid()
        arguments["x"].grad = None
        loss, stats = compiled(**arguments, logits=logits, t=t, return_stats=True)
        loss.backward()
        assert bool(arguments["x"].grad.isfinite().all())
        assert not stats.vector.requires_grad and not loss_function.histogram.bins.requires_grad
    copy.deepcopy(loss_function)
    for operation in (fd.distribution_matching_loss, fd.score_identity_loss):
        _, stats = torch.compile(operation, fullgraph=True, backend="aot_eager")(**arguments, return_stats=True)
        assert not stats.vector.requires_grad


def test_compile_f_weights(backend: Backend) -> None:
    for divergence in ("rkl", "js", "alpha:0.3"):
        for shape in ((5,), (5, 3)):
            logits = backend.randn(*shape)
            run = torch.compile(
                lambda logits, divergence=divergence: fd.f_weights(logits, divergence=divergence),
                fullgraph=True,
                backend="aot_eager",
            )
            assert_close(run(logits), fd.f_weights(logits, divergence=divergence), ulps=4)


def test_compile_score_difference(backend: Backend) -> None:
    arguments = {name: value.detach() for name, value in batch(backend, 4, 3, 6).items()}
    want = fd.score_difference(**arguments)
    run = torch.compile(fd.score_difference, fullgraph=True, backend="aot_eager")
    assert_close(run(**arguments), want, ulps=4)
    out = torch.zeros_like(want)
    torch.compile(lambda out: fd.score_difference(**arguments, out=out), fullgraph=True, backend="aot_eager")(out)
    assert_close(out, want, ulps=4)


def test_compile_gan_losses_and_to_x0(backend: Backend) -> None:
    logits, x = backend.leaf(5, 2), backend.leaf(5, 2, seed=1)
    compare(fd.gan_generator_loss, {"logits": logits}, backend="aot_eager")
    compare(lambda a, b: fd.gan_discriminator_loss(a, b), {"a": logits, "b": x}, backend="aot_eager")
    compare(
        lambda a, b: fd.to_x0(a, b, prediction="v", alpha=0.8, sigma=0.6).sum(),
        {"a": logits, "b": x},
        backend="aot_eager",
    )


@pytest.mark.parametrize("reduction", ["mean", "sample"])
def test_compile_with_dynamic_shapes(backend: Backend, reduction: str) -> None:
    """One compilation serves every batch size and side."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda x, teacher, fake, logits: fd.f_distill_loss(x, teacher, fake, logits, reduction=reduction),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    frames: set[int] = set()  # dynamo may start over with a float it finds constant, on the first call
    for shape in ((4, 3, 8, 9), (7, 3, 8, 9), (5, 3, 9, 11), (2, 3, 16, 5)):  # equal sides would be one symbol
        arguments = batch(backend, *shape) | {"logits": backend.randn(shape[0], seed=4)}
        got = run(**arguments)
        (gradient,) = torch.autograd.grad(got.sum(), arguments["x"])
        want = fd.f_distill_loss(**arguments, reduction=reduction)
        (want_gradient,) = torch.autograd.grad(want.sum(), arguments["x"])
        assert_close(got.detach(), want.detach(), ulps=8, terms=64)
        assert_close(gradient, want_gradient, ulps=8)
        frames.add(counter.frame_count)
    assert len(frames) == 1, "compiled again for another shape"


def test_compile_a_training_step(backend: Backend) -> None:
    """Generator, loss and backward in one compiled function, as compiled autograd sees it."""
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 6).to(backend.device)
    z, teacher, fake = (backend.randn(4, 6, seed=s) for s in range(3))

    def step(z: Tensor) -> Tensor:
        return fd.distribution_matching_loss(net(z), teacher, fake)

    step(z).backward()
    want = net.weight.grad.clone()
    net.zero_grad()
    torch.compile(step, fullgraph=True, backend="aot_eager")(z).backward()
    torch.testing.assert_close(net.weight.grad, want, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------ export, fake tensors


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = fd.FDistillLoss("js", histogram=fd.RatioHistogram(0.0, 1.0, bins=3, ema_rate=0.5))

    def forward(self, x: Tensor, teacher: Tensor, fake: Tensor, logits: Tensor, t: Tensor) -> Tensor:
        return self.loss(x, teacher, fake, logits, t)


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(backend: Backend, dynamic: bool) -> None:
    arguments = {name: value.detach() for name, value in batch(backend, 4, 3, 6).items()}
    arguments |= {"logits": backend.randn(4, seed=3), "t": backend.randn(4, seed=4).sigmoid()}
    module = Module().to(backend.device)
    shapes = {name: {0: torch.export.Dim("batch", min=2, max=64)} for name in arguments} if dynamic else None
    program = torch.export.export(module, (), kwargs=arguments, dynamic_shapes=shapes)
    exported = program.module()
    twin = Module().to(backend.device)
    for size in (4, 9) if dynamic else (4,):
        inputs = {
            name: backend.randn(size, *value.shape[1:], seed=20 + i)
            for i, (name, value) in enumerate(arguments.items())
        }
        assert_close(exported(**inputs), twin(**inputs), ulps=8, terms=64)
    buffers = dict(exported.named_buffers())
    assert_close(buffers["loss.histogram.bins"], twin.loss.histogram.bins, ulps=4)
    if backend.compiled:
        assert any("fdistill" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_fake_tensors(backend: Backend, reduction: str, dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides without values agree with those with values; nothing is computed."""
    arguments = batch(backend, 3, 4, 5, 6, dtype=dtype)
    arguments["x"] = arguments["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    arguments["weight"] = backend.randn(3, 4).abs()
    real, real_stats = fd.distribution_matching_loss(**arguments, reduction=reduction, return_stats=True)
    (real_gradient,) = torch.autograd.grad(real.sum(), arguments["x"])
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(value) for name, value in arguments.items()}
        loss, stats = fd.distribution_matching_loss(**fakes, reduction=reduction, return_stats=True)
        (gradient,) = torch.autograd.grad(loss.sum(), fakes["x"])
        weights = fd.f_weights(mode.from_tensor(backend.randn(5, 2)))
        g = fd.score_difference(**fakes)
    for fake, value in ((loss, real), (gradient, real_gradient), (stats.vector, real_stats.vector)):
        assert (fake.shape, fake.dtype, fake.device) == (value.shape, value.dtype, value.device)
    assert weights.shape == (5,)
    assert g.shape == arguments["x"].shape


def test_fake_gradient_has_the_strides_of_the_real_one(backend: Backend, operators: Any) -> None:
    """What inductor plans with must be what the kernel returns."""
    for layout in ("contiguous", "permuted", "channels_last", "sliced", "stepped", "offset", "expanded"):
        inputs = [lay_out(backend.randn(3, 4, 5, 6, seed=s), layout) for s in range(3)]
        real = operators.loss(*arguments_of(inputs))
        with FakeTensorMode() as mode:
            fake = operators.loss(*arguments_of(mode.from_tensor(value) for value in inputs))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), layout


@since((2, 11), "under fullgraph=True it says where an error was raised, and not which")
def test_errors_under_compile(backend: Backend) -> None:
    """A wrong argument is still named."""
    arguments = batch(backend, 4, 6) | {"reduction": "average"}
    with pytest.raises(Exception, match="reduction"):
        torch.compile(fd.distribution_matching_loss, fullgraph=True, backend="aot_eager")(**arguments)


def test_values_under_compile_are_not_baked_in(backend: Backend) -> None:
    """Numbers that change between calls (a guidance scale, eps) are followed."""
    arguments = batch(backend, 4, 6) | {"teacher_uncond": backend.randn(4, 6, seed=5)}
    run = torch.compile(fd.distribution_matching_loss, fullgraph=True, backend="aot_eager")
    for scale, eps in ((1.5, 1e-6), (7.0, 0.1), (3.25, 0.0)):
        got = run(**arguments, guidance_scale=scale, eps=eps)
        assert_close(
            got.detach(), fd.distribution_matching_loss(**arguments, guidance_scale=scale, eps=eps).detach(), ulps=8
        )
    assert math.isfinite(float(got.detach()))
