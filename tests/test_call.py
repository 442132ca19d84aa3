"""Options, records and layers: what is written once holds everywhere."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import Backend

import fdistill_ops as fd
from fdistill_ops import _call, _native, backends

FUNCTIONS = (
    *("f_weights", "distribution_matching_loss", "f_distill_loss", "score_difference"),
    *("f_score_difference", "score_identity_loss"),
)
NEEDED = {"f_weights": 1, "f_distill_loss": 4, "f_score_difference": 4}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_takes_what_the_fused_operation_takes(name: str) -> None:
    """In the same order, with the same defaults."""
    fused, plain = (inspect.signature(getattr(owner, name)) for owner in (fd, fd.reference))
    assert fused == plain
    options = [p for p in fused.parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert len(options) >= 7
    assert all(p.default is not p.empty and p.annotation is not p.empty for p in options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_may_be_given_its_default(name: str) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tensors = (
        [x[:, 0], *[x] * 3][: NEEDED[name]] if name == "f_weights" else [x, -x, 2 * x, x[:, 0]][: NEEDED.get(name, 3)]
    )
    function = getattr(fd, name)
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    alone, given = function(*tensors), function(*tensors, **defaults)
    for a, b in zip(alone, given, strict=True) if isinstance(alone, tuple) else [(alone, given)]:
        assert torch.equal(a, b)


@pytest.mark.parametrize("owner", [fd, fd.reference])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_unknown_option_is_named(owner: Any, name: str) -> None:
    x = torch.randn(3)
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'masks'$"):
        getattr(owner, name)(*[x] * NEEDED.get(name, 3), masks=None)


@pytest.mark.parametrize("module", ["_C", "_C_emulated"])
def test_the_compiled_modules_name_the_operands(module: str) -> None:
    native = _native.module() if module == "_C" else _native.emulator()
    if native is None:
        pytest.skip("not compiled")
    assert {*native.operands, "guidance_scale", "normalizer"} == {*_call.NAMES}
    assert len(native.operands) == len(_call.NAMES) - 2


def frames(call: Any) -> list[str]:
    """The Python functions of the package that run in it."""
    package, found = str(Path(fd.__file__).parent), []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            found.append(frame.f_code.co_name)

    call()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.no_poison  # which has functions of its own
def test_a_call_passes_few_functions(backend: Backend) -> None:
    """Each costs a tenth of a microsecond or more, at every step of every training."""
    if backend.name != "cpu":
        pytest.skip("counted on the back end that waits for nothing")
    x, teacher, fake = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(s)) for s in range(3))
    leaf, logits, t = x.requires_grad_(), torch.tensor([0.5, -1.0]), torch.tensor([0.2, 0.7])
    histogram = fd.RatioHistogram(0.0, 1.0)
    assert len(frames(lambda: fd.distribution_matching_loss(leaf, teacher, fake))) <= 25
    assert len(frames(lambda: fd.f_distill_loss(leaf, teacher, fake, logits))) <= 30
    assert len(frames(lambda: fd.f_distill_loss(leaf, teacher, fake, logits, t, histogram=histogram))) <= 45


def test_settings_are_checked_without_choosing_a_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA's is chosen, a module is made and compiling ahead is asked for before there is a tensor on a GPU."""
    monkeypatch.setattr(backends, "_of_process", "cuda")
    monkeypatch.setattr(backends, "_chosen", {})
    fd.FDistillLoss("js", reduction="sample")
    fd.warmup([], device="cpu")
    with pytest.raises(ValueError, match=r"^reduction must be one of"):
        fd.FDistillLoss(reduction="average")
    with pytest.raises(RuntimeError, match="cuda"):
        fd.distribution_matching_loss(*[torch.ones(2)] * 3)
