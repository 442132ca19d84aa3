"""Strides, offsets and dtypes: the answer does not depend on how the same values lie in memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import Backend, check_gradient, check_identity, check_loss, check_matching, expected_matching

import fdistill_ops as fd
from fdistill_ops.testing import LAYOUTS, assert_close, lay_out

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("x", "teacher", "fake", "teacher_uncond", "x_t")


def full(backend: Backend, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A call that reads every tensor there is."""
    return {name: backend.randn(*shape, dtype=dtype, seed=i) for i, name in enumerate(NAMES)} | {
        "mask": backend.randn(*shape, seed=8) > -0.5,
        "guidance_scale": backend.randn(shape[0], seed=9),
        "weight": backend.randn(*shape[:2], seed=10).abs(),
        "alpha": backend.randn(*shape[:2], dtype=torch.float64, seed=11).abs() + 0.2,
        "sigma": backend.randn(shape[0], dtype=torch.float64, seed=12).abs(),
        "prediction": "v",
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6,), (3, 130), (3, 5, 9), (2, 3, 8, 10), (2, 4, 3, 5, 6)], ids=str)
def test_all_tensors_in_a_layout(backend: Backend, layout: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    arguments = full(backend, *shape, dtype=dtype)
    for name in (*NAMES, "mask"):
        arguments[name] = lay_out(arguments[name], layout)
    arguments["x"].requires_grad_()
    check_matching(arguments)
    if layout != "contiguous":
        plain = {k: v.detach().contiguous() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        loss = fd.distribution_matching_loss(**plain)
        assert_close(fd.distribution_matching_loss(**arguments), loss, ulps=8, what="loss")


@pytest.mark.parametrize("name", [*NAMES, "mask", "guidance_scale", "weight", "alpha", "sigma"])
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_one_tensor_in_a_layout(backend: Backend, name: str, layout: str) -> None:
    arguments = full(backend, 2, 3, 8, 10)
    arguments[name] = lay_out(arguments[name], layout)
    arguments["x"].requires_grad_()
    check_matching(arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_simple_call_in_a_layout(backend: Backend, layout: str) -> None:
    """No guidance, mask or prediction: the fast path, if there is one."""
    for shape, dtype in itertools.product([(5, 67), (2, 3, 16, 16), (2, 2, 3, 5, 16)], DTYPES):
        x, teacher, fake = (lay_out(backend.randn(*shape, dtype=dtype, seed=s), layout) for s in range(3))
        check_matching({"x": x.requires_grad_(), "teacher": teacher, "fake": fake})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_score_identity_in_a_layout(backend: Backend, layout: str) -> None:
    plain = [backend.randn(2, 3, 8, 10, seed=s) for s in range(3)]
    laid = [lay_out(value, layout) for value in plain]
    plain = [value.contiguous() for value in laid]
    for inputs in (plain, laid):
        check_identity(dict(zip(("x", "teacher", "fake"), (v.requires_grad_() for v in inputs), strict=True)), 1.2)


@pytest.mark.parametrize("offset", range(1, 17))
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_views(backend: Backend, offset: int, dtype: torch.dtype) -> None:
    """Every offset from an aligned address, and lengths around a vector."""
    storage = [backend.randn(4 * 70 + offset, dtype=dtype, seed=s) for s in range(3)]
    for length in (1, 15, 31, 70):
        x, teacher, fake = (s[offset : offset + 4 * length].view(4, length) for s in storage)
        check_matching({"x": x.detach().requires_grad_(), "teacher": teacher, "fake": fake})
    x, teacher, fake = (s[k : k + 200].view(2, 100) for k, s in zip((0, offset, 1), storage, strict=True))
    check_matching({"x": x.detach().requires_grad_(), "teacher": teacher, "fake": fake})


@pytest.mark.parametrize("x_dtype", DTYPES)
def test_mixed_dtypes(backend: Backend, x_dtype: torch.dtype) -> None:
    """bfloat16 teachers meet float32 fakes."""
    for teacher_dtype, fake_dtype in itertools.product(DTYPES, DTYPES):
        arguments = full(backend, 3, 4, 11)
        arguments["x"] = arguments["x"].to(x_dtype).requires_grad_()
        arguments["teacher"] = arguments["teacher"].to(teacher_dtype)
        arguments["fake"] = arguments["fake"].to(fake_dtype)
        check_matching(arguments)
        simple = {name: arguments[name] for name in ("x", "teacher", "fake")}
        check_matching(simple)
    for name, dtype in itertools.product(("teacher_uncond", "x_t"), DTYPES):
        arguments = full(backend, 3, 4, 11) | {name: backend.randn(3, 4, 11, dtype=dtype, seed=20)}
        arguments["x"] = arguments["x"].to(x_dtype).requires_grad_()
        check_matching(arguments)
    for dtype in DTYPES:
        rows = {"weight": (3,), "guidance_scale": (3,), "alpha": (3, 4), "sigma": (3, 4), "normalizer": (3,)}
        arguments = full(backend, 3, 4, 11) | {
            name: backend.randn(*shape, seed=30).abs().to(dtype) + 0.5 for name, shape in rows.items()
        }
        arguments["x"] = arguments["x"].to(x_dtype).requires_grad_()
        check_matching(arguments)


def test_chunked_prediction(backend: Backend) -> None:
    """Conditional and unconditional predictions of one stacked forward pass: views with an offset."""
    for shape in ((6, 7), (6, 3, 5, 5)):
        stacked = backend.randn(*shape, dtype=torch.bfloat16)
        cond, uncond = stacked.chunk(2)
        x, fake = (backend.randn(3, *shape[1:], seed=s) for s in (1, 2))
        check_matching(
            {"x": x.requires_grad_(), "teacher": cond, "fake": fake, "teacher_uncond": uncond, "guidance_scale": 7.5}
        )


def test_video_layouts(backend: Backend) -> None:
    """[B, F, C, H, W] against [B, C, F, H, W] in memory, with weights per frame and a mask of the later frames."""
    inputs = [backend.randn(2, 3, 5, 4, 6, seed=s).transpose(1, 2) for s in range(3)]
    mask = (torch.arange(5, device=backend.device) >= 2).view(1, 5, 1, 1, 1).expand(2, 5, 3, 4, 6)
    weight = backend.randn(5, 2, seed=4).abs().t()
    arguments = {
        "x": inputs[0].requires_grad_(),
        "teacher": inputs[1],
        "fake": inputs[2],
        "mask": mask,
        "weight": weight,
    }
    _, gradient = check_matching(arguments)
    assert bool((gradient[:, :2] == 0).all())


@pytest.mark.parametrize("kind", ["diagonal", "overlapping", "broadcast"])
def test_strange_strides(backend: Backend, kind: str) -> None:
    base = backend.randn(40, 40)
    view = {
        "diagonal": lambda: base.as_strided((4, 6), (41, 82)),
        "overlapping": lambda: base.as_strided((4, 6), (1, 2)),
        "broadcast": lambda: base[:1, :1].expand(4, 6),
    }[kind]()
    x, teacher, fake = backend.randn(4, 6, seed=1), backend.randn(4, 6, seed=2), view
    check_matching({"x": x.requires_grad_(), "teacher": teacher, "fake": fake})
    check_matching({"x": view.detach().requires_grad_(), "teacher": teacher, "fake": x.detach()})


def test_conjugate_and_negated_views(backend: Backend) -> None:
    """imag() of a conjugated tensor is a view with the negative bit set: its memory holds the opposite sign."""
    values = torch.complex(backend.randn(3, 8), backend.randn(3, 8, seed=1)).conj().imag
    assert values.is_neg()
    fake = backend.randn(3, 8, seed=2)
    x = backend.leaf(3, 8, seed=3)
    check_matching({"x": x, "teacher": values, "fake": fake})
    check_matching({"x": x, "teacher": fake, "fake": values})
    check_matching({"x": values.detach().requires_grad_(), "teacher": x.detach(), "fake": fake})
    weights = fd.f_weights(values[0])
    assert torch.equal(weights, fd.f_weights(values[0].clone()))


def test_gradient_in_the_layout_autograd_expects(backend: Backend) -> None:
    """x.grad of a channels_last leaf is right element for element, and accumulates."""
    x = backend.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    teacher, fake = backend.randn(2, 3, 4, 5, seed=1), backend.randn(2, 3, 4, 5, seed=2)
    arguments = {"x": x, "teacher": teacher, "fake": fake}
    expected = expected_matching(arguments)
    loss = fd.distribution_matching_loss(**arguments)
    check_loss(loss, expected, arguments)
    loss.backward()
    check_gradient(x.grad, x, expected)
    fd.distribution_matching_loss(**arguments).backward()
    assert x.grad is not None
    check_gradient(x.grad / 2, x, expected)


@pytest.mark.parametrize("layout", ["permuted", "stepped", "offset", "sliced"])
def test_out_in_a_layout(backend: Backend, layout: str) -> None:
    for shape, dtype in itertools.product([(3, 70), (2, 3, 5, 6)], DTYPES):
        x, teacher, fake = (backend.randn(*shape, dtype=dtype, seed=s) for s in range(3))
        out = lay_out(torch.zeros_like(x), layout)
        neighbours = out._base.clone() if out._base is not None else None
        want = fd.score_difference(x, teacher, fake)
        fd.score_difference(x, teacher, fake, out=out)
        assert_close(out, want, ulps=4, what="out")
        if neighbours is not None and out._base is not None:
            out.zero_()
            assert torch.equal(out._base, neighbours), "wrote outside of out"
