"""Networks for images of 16 pixels or more: a U-Net and a convolutional classifier around what small data has too."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import distillation, environment, need_extra, same

from fdistill_ops.trainer import edm, networks
from fdistill_ops.trainer.__main__ import main
from fdistill_ops.trainer.checkpoints import Checkpoints
from fdistill_ops.trainer.data import Data
from fdistill_ops.trainer.distill import Distillation
from fdistill_ops.trainer.files import Log
from fdistill_ops.trainer.training import train

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

need_extra()
pytest.importorskip("diffusers", reason="the trainer's extra is not installed")

LARGE = ["--quick", "--teacher-steps", "3", "--distill-steps", "3", "--width", "8", "--batch-size", "4"]
LARGE += ["--divergences", "js", "--device", "cpu"]


@pytest.fixture(scope="module")
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def data(gen: torch.Generator) -> Data:
    images, labels = torch.rand(40, 16, 16, generator=gen) * 2 - 1, torch.arange(40) % 2
    return Data("grey", images[:30], labels[:30], images[30:], labels[30:], classes=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes that differ in brightness."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    labels = np.arange(60) % 2
    images = (
        np.random.default_rng(0).integers(0, 128, (60, 16, 16), dtype=np.uint8)
        + (127 * labels).astype(np.uint8)[:, None, None]
    )
    np.savez(path, images=images, labels=labels)
    return path


SHAPES: list[tuple[tuple[int, ...], bool]] = [((8, 8), False), ((2,), False), ((3, 15, 40), False), ((16, 16), True)]
SHAPES += [((3, 18, 17), True)]


@pytest.mark.parametrize(("shape", "large"), SHAPES, ids=str)
def test_network_of_a_shape(shape: tuple[int, ...], large: bool, gen: torch.Generator) -> None:
    """It starts as the ideal denoiser of Gaussian data; features of both kinds of network are there in their number."""
    denoiser = networks.Denoiser(shape, classes=2, width=8, depth=1, sigma_data=0.5)
    assert isinstance(denoiser.network, networks.UNet if large else networks.MLP)
    x, sigma, labels = torch.randn(3, *shape, generator=gen), torch.tensor([0.1, 1.0, 5.0]), torch.tensor([0, 1, 2])
    x0, features = denoiser.with_features(x, sigma, labels)
    torch.testing.assert_close(x0, edm.rows(0.25 / (0.25 + sigma**2), x) * x)
    assert features.shape == (3, denoiser.network.features)
    assert networks.Classifier(shape, classes=5)(x).shape == (3, 5)


def test_unet_sees_pixels_noise_level_and_class(gen: torch.Generator) -> None:
    torch.manual_seed(0)
    denoiser = networks.Denoiser((16, 16), classes=2, width=8, depth=1, sigma_data=0.5)
    torch.nn.init.normal_(denoiser.network.last.weight)
    x = torch.randn(1, 16, 16, generator=gen, requires_grad=True)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.long)
    outputs = denoiser.with_features(x, one, zero)
    for output in outputs:  # the prediction in one corner; the features
        (gradient,) = torch.autograd.grad(output.flatten()[0], x, retain_graph=True)
        assert bool((gradient != 0).all())
    for other in ((x, 1.1 * one, zero), (x, one, zero + 1)):
        assert not any(map(torch.allclose, outputs, denoiser.with_features(*other)))


def test_copies_keep_their_features_apart(gen: torch.Generator) -> None:
    torch.manual_seed(0)
    first = networks.Denoiser((16, 16), classes=2, width=8, depth=1, sigma_data=0.5)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.network.unet.conv_in.weight.mul_(2)
    x, sigma, labels = torch.randn(2, 16, 16, generator=gen), torch.ones(2), torch.zeros(2, dtype=torch.long)
    features = [network.with_features(x, sigma, labels)[1] for network in (first, second, first)]
    assert torch.equal(features[0], features[2]) and not torch.allclose(features[0], features[1])
    copy.deepcopy(first)  # no graph is left in it, which could not be copied


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"student_steps": 2, "guidance": 2.0}], ids=str)
def test_resumed_to_the_bit(settings: dict[str, Any], data: Data, tmp_path: Path) -> None:
    settings |= {"width": 8, "batch_size": 4}
    whole = distillation(data, **settings)
    train(whole, Checkpoints(tmp_path / "whole", "js", "key"), Log(None))
    first = distillation(data, **settings)
    update = first.update

    def stop(step: int) -> Any:
        if step == 6:
            raise KeyError
        return update(step)

    first.update = stop  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        train(first, Checkpoints(tmp_path, "js", "key"), Log(None))
    second: Distillation = distillation(data, **settings)
    train(second, Checkpoints(tmp_path, "js", "key"), Log(None))
    assert same(second.state(), whole.state()) and len(list(tmp_path.glob("*.pt"))) == 2


@pytest.mark.slow
def test_prediction_and_features_without_a_graph_break(gen: torch.Generator) -> None:
    torch._dynamo.reset()
    denoiser = networks.Denoiser((16, 16), classes=2, width=8, depth=1, sigma_data=0.5)
    given = torch.randn(2, 16, 16, generator=gen), torch.ones(2), torch.zeros(2, dtype=torch.long)
    compiled = torch.compile(denoiser.with_features, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given), denoiser.with_features(*given))


def test_small_data_needs_no_diffusers() -> None:
    """Nor is it imported."""
    code = "import sys; from fdistill_ops.trainer import __main__, networks; networks.Denoiser((8, 8), 2, 8, 1, 0.5); "
    code += "assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_missing_diffusers(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the command, before anything is trained."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main([*LARGE, "--data", str(file), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fdistill-train: error: images of 16 pixels or more need diffusers")
    assert "pip install 'fdistill_ops[trainer]'" in error and not list(tmp_path.rglob("*.pt"))


@pytest.mark.slow
def test_two_ranks_train_what_one_does(file: Path, tmp_path: Path) -> None:
    arguments = ["-m", "fdistill_ops.trainer", *LARGE, "--data", str(file), "--out"]
    alone = [sys.executable, *arguments, str(tmp_path / "one")]
    shared = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    for command in (alone, [*shared, str(tmp_path / "two")]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    states = [
        torch.load(next((tmp_path / name / "cache").glob("student-js-*.pt")), weights_only=True)["state"]
        for name in ("one", "two")
    ]
    for mine, theirs in zip(states[0]["records"], states[1]["records"], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5, nan_ok=True)
