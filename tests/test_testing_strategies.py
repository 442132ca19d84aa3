"""fd.testing.loss_arguments: what it draws when it is told to draw less, and the example of the module's docstring."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_readme import environment

import fdistill_ops as fd
from fdistill_ops import testing

pytest.importorskip("hypothesis")
from hypothesis import given, settings

# As a user has them: no health check suppressed.
BARE = {"max_examples": 100, "deadline": None, "derandomize": True, "database": None, "suppress_health_check": ()}
REQUIRED = {"x", "teacher", "fake"}


@pytest.mark.parametrize("name", ["weight", "mask", "normalizer", "eps", "nonfinite", "reduction"])
def test_only_one_argument(name: str) -> None:
    seen = set()

    @settings(**BARE)  # type: ignore[arg-type]
    @given(arguments=testing.loss_arguments(only={name}))
    def draws(arguments: dict[str, Any]) -> None:
        assert REQUIRED <= set(arguments) <= REQUIRED | {name}
        seen.add(name in arguments)
        fd.reference.distribution_matching_loss(**arguments)

    draws()
    assert True in seen


@pytest.mark.parametrize(
    ("name", "together"),
    [
        ("teacher_uncond", {"teacher_uncond", "guidance_scale"}),
        ("sigma", {"prediction", "x_t", "alpha", "sigma"}),
        ("prediction", {"prediction", "x_t", "alpha", "sigma"}),
    ],
)
def test_arguments_that_come_together(name: str, together: set[str]) -> None:
    seen: set[str] = set()

    @settings(**BARE)  # type: ignore[arg-type]
    @given(arguments=testing.loss_arguments(only=[name]))
    def draws(arguments: dict[str, Any]) -> None:
        assert set(arguments) - REQUIRED <= together
        seen.update(arguments)
        fd.reference.distribution_matching_loss(**arguments)

    draws()
    assert seen == REQUIRED | together


def test_nothing_but_what_is_needed() -> None:
    @settings(**BARE)  # type: ignore[arg-type]
    @given(
        arguments=testing.loss_arguments(only=(), layout="contiguous", mixed=False),
        weighted=testing.loss_arguments(only={"divergence"}, f_distill=True),
    )
    def draws(arguments: dict[str, Any], weighted: dict[str, Any]) -> None:
        assert set(arguments) == REQUIRED
        assert all(value.is_contiguous() for value in arguments.values())
        assert len({value.dtype for value in arguments.values()}) == 1
        assert set(weighted) == REQUIRED | {"logits", "divergence"}
        fd.reference.f_distill_loss(**weighted)

    draws()


@pytest.mark.parametrize("f_distill", [False, True])
@pytest.mark.parametrize("nonfinite", [False, True])
def test_no_health_check_fails(f_distill: bool, nonfinite: bool) -> None:
    @settings(**BARE)  # type: ignore[arg-type]
    @given(arguments=testing.loss_arguments(f_distill=f_distill, nonfinite=nonfinite))
    def draws(arguments: dict[str, Any]) -> None:
        assert set(arguments) >= REQUIRED

    draws()


@pytest.mark.parametrize("only", [{"logits"}, {"temperature"}, "mask", {"divergence"}])
def test_other_names_are_refused(only: Any) -> None:
    with pytest.raises(ValueError, match="only must hold names among"):
        testing.loss_arguments(only=only)


KERNELS = """
import hypothesis, torch
import fdistill_ops as fd


def right(x, teacher, fake, weight=None, mask=None):
    return fd.distribution_matching_loss(x, teacher, fake, weight=weight, mask=mask)


class Wrong(torch.autograd.Function):  # a hundredth too long
    @staticmethod
    def forward(ctx, x, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return 1.01 * upstream.to(ctx.saved_tensors[0].dtype) * ctx.saved_tensors[0], None, None


def wrong(x, teacher, fake, weight=None, mask=None):
    loss = fd.reference.distribution_matching_loss(x, teacher, fake, weight=weight, mask=mask)
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    return Wrong.apply(x, loss.detach(), gradient)

"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["right", "wrong"])
def test_the_example_of_the_docstring(kernel: str, tmp_path: Path) -> None:
    """It runs as it stands, under hypothesis' own settings; and it finds a gradient that is wrong."""
    assert testing.__doc__ is not None
    _, _, example = testing.__doc__.partition("::\n\n")
    lines = [line[4:] for line in example.split("\n") if line.startswith("    ")]
    script = tmp_path / "test_example.py"
    script.write_text(f"{KERNELS}\nmy_loss = {kernel}\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    if kernel == "right":
        assert done.returncode == 0, done.stdout
    else:
        assert done.returncode == 1, done.stdout
        assert "gradient" in done.stdout


def test_gradients_that_are_not_finite() -> None:
    """They must be so in both."""
    good = torch.tensor([1.0, float("inf"), float("nan"), -2.0])
    testing.assert_gradient_close(good.clone(), good)
    for wrong in ([1.0, 1.0, float("nan"), -2.0], [1.0, float("-inf"), float("nan"), -2.0], [float("nan")] * 4):
        with pytest.raises(AssertionError, match="differ in being finite"):
            testing.assert_gradient_close(torch.tensor(wrong), good)
    with pytest.raises(AssertionError, match="relative L2"):
        testing.assert_gradient_close(good * 1.01, good)
