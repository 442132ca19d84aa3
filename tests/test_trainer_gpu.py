"""The distillation on a GPU: the student's update as a CUDA graph, and as kernels launched one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from trainer_cases import distillation

import fdistill_ops as fd
from fdistill_ops.trainer.data import Data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.no_poison,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU"),
]
STEPS = 12
SETTINGS = [{}, {"precision": "bfloat16"}, {"student_steps": 2, "guidance": 2.0}]


@pytest.fixture(autouse=True, params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in fd.available_backends():
        pytest.skip(fd.build_info()["unavailable"][request.param])
    with fd.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def data() -> Data:
    gen = torch.Generator("cuda").manual_seed(0)
    images = torch.rand(200, 8, 8, generator=gen, device="cuda") * 2 - 1
    labels = torch.randint(10, (200,), generator=gen, device="cuda")
    return Data("random", images[:150], labels[:150], images[150:], labels[150:], classes=10)


def updates(training: Any) -> int:
    optimizer = training.student_optimizer
    return int(optimizer.adam.state[optimizer.parameters[0]]["step"])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_captured_update(settings: dict[str, Any], data: Data) -> None:
    """As many updates, with the same losses but for the order of a sum; the rate of each step reaches the graph."""
    trainings = [distillation(data, cuda_graph=flag, device="cuda", **settings) for flag in (True, False)]
    for step in range(STEPS):
        captured, plain = (training.update(step)() for training in trainings)
        names = ["fake_loss", "discriminator_loss", "gan_loss"]  # the score difference is all rounding at first
        assert [captured[name] for name in names] == pytest.approx([plain[name] for name in names], rel=2e-2, abs=1e-4)

    assert [updates(training) for training in trainings] == [STEPS, STEPS]
    for mine, theirs in zip(*(training.student.parameters() for training in trainings), strict=True):
        assert float((mine - theirs).norm()) <= 0.1 * float(theirs.norm()) + 1e-3


def test_captured_update_goes_on_from_a_checkpoint(data: Data) -> None:
    """The state comes from a file, on the CPU."""
    first, second = (distillation(data, cuda_graph=True, device="cuda") for _ in range(2))
    for step in range(8):
        first.update(step)
    state = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, copy.deepcopy(first.state()))
    second.load(state)
    for step in range(8, STEPS):
        records = [training.update(step)() for training in (first, second)]
        assert records[0] == pytest.approx(records[1], rel=1e-3, abs=1e-6, nan_ok=True)
    assert updates(second) == STEPS


@pytest.mark.parametrize("settings", [*SETTINGS, {"precision": "float16"}, {"compile": True}], ids=str)
def test_update(settings: dict[str, Any], data: Data) -> None:
    training = distillation(data, device="cuda", **settings)
    for step in range(3):
        record = training.update(step)()
    assert all(record[name] == record[name] for name in ("loss", "fake_loss", "gan_loss"))
