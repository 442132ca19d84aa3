"""Samples and weights of a finished run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_cases import TINY, need_extra

from fdistill_ops.trainer.__main__ import main
from fdistill_ops.trainer.networks import Denoiser

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

need_extra()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert main([*TINY, "--student-steps", "2", "--out", str(out)]) == 0
    return out


def average(run: Path, stage: str) -> dict[str, torch.Tensor]:
    newest = sorted((run / "cache").glob(f"{stage}-*.pt"))[-1]
    return torch.load(newest, weights_only=True)["state"]["parts"]["average"]


@pytest.mark.parametrize("model", ["js", "teacher"])
def test_samples(model: str, run: Path, tmp_path: Path) -> None:
    """The same noise gives the same samples of a class, and another seed others; there is a picture."""
    arguments = ["sample", str(run), "--model", model, "--count", "5", "--out"]
    for name, more in {"a": [], "b": ["--classes", "0,1,2,3,4"], "c": ["--seed", "1"], "d": ["--classes", "7"]}.items():
        assert main([*arguments, str(tmp_path / f"{name}.npy"), *more]) == 0
    a, b, c, d = (np.load(tmp_path / f"{name}.npy") for name in "abcd")
    assert a.shape == (5, 8, 8) and np.isfinite(a).all() and np.array_equal(a, b)
    assert not np.array_equal(a, c) and not np.array_equal(a, d)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_exported_weights(run: Path, tmp_path: Path) -> None:
    """The lines of the documentation load them; they are the moving average, and the last parameters beside it."""
    assert main(["export", str(run), "--model", "js", "--out", str(tmp_path)]) == 0
    text = (Path(__file__).parent.parent / "docs" / "trainer.md").read_text(encoding="utf-8")
    loader = text.split("<!-- loader -->")[1].split("```")[1].removeprefix("python\n")
    assert len(loader.split("\n\n")) == 2 and len([line for line in loader.splitlines() if line]) == 5
    found: dict[str, object] = {}
    exec(loader.replace("runs/digits/export", str(tmp_path)), found)
    network = found["network"]
    assert isinstance(network, Denoiser)
    expected = average(run, "student-js")
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
    from safetensors.torch import load_file

    last = load_file(tmp_path / "js-last.safetensors")
    assert last.keys() == expected.keys() and not all(torch.equal(last[name], expected[name]) for name in last)
    content = json.loads((tmp_path / "js.json").read_text())
    assert len(content["levels"]) == 2 and content["settings"]["student_steps"] == 2


def test_sampling_is_that_of_the_exported_network(run: Path, tmp_path: Path) -> None:
    """One step of the first level, from the noise that the seed gives, is what the student does first."""
    assert main(["sample", str(run), "--model", "teacher", "--count", "1", "--out", str(tmp_path / "x.npy")]) == 0
    assert main(["export", str(run), "--model", "teacher", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("teacher*")} == {
        *("teacher.json", "teacher.safetensors", "teacher-last.safetensors")
    }
    assert json.loads((tmp_path / "teacher.json").read_text())["levels"] is None


@pytest.mark.parametrize("command", ["sample", "export"])
def test_what_cannot_be_used(command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line and status 1."""
    for name in ("unfinished", "broken", "pruned"):
        shutil.copytree(run, tmp_path / name)
    (tmp_path / "unfinished" / "models.json").unlink()
    (tmp_path / "broken" / "models.json").write_text("{")
    for path in (tmp_path / "pruned" / "cache").glob("student-*"):
        path.unlink()
    for folder, model, message in (
        ("none", "js", "none: no such folder"),
        ("unfinished", "js", "unfinished: no finished run's: it has no models.json"),
        ("broken", "js", "models.json: cannot be used: "),
        ("pruned", "js", "no checkpoint of js is left"),
        ("pruned", "sf", "'sf' is not in "),
    ):
        assert main([command, str(tmp_path / folder), "--model", model]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fdistill-train: error: ") and message in lines[0]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--classes", "3,10"], 1, "--classes: there is no class 10; they end at 9"),
        (["--classes", "x"], 2, "argument --classes: must be an integer from 0"),
        (["--count", "0"], 2, "argument --count: must be an integer from 1"),
        (["--out", "x.txt"], 2, "argument --out: must end in .npy, got 'x.txt'"),
    ],
)
def test_bad_arguments(
    more: list[str], status: int, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["sample", str(run), "--model", "js", *more])
    except SystemExit as end:
        found = int(str(end.code))
    assert found == status and message in capsys.readouterr().err.splitlines()[-1]
