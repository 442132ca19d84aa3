"""Interrupted trainings go on to the bit, and what they leave is whole at any moment."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import (
    EVERY,
    STEPS,
    TINY,
    Stop,
    distillation,
    environment,
    killed_before,
    need_extra,
    same,
    trained,
    wait_for,
)

from fdistill_ops.trainer.__main__ import main
from fdistill_ops.trainer.checkpoints import Checkpoints
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import Data, load
from fdistill_ops.trainer.distill import Distillation
from fdistill_ops.trainer.files import Log
from fdistill_ops.trainer.training import train

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

need_extra()


@pytest.fixture(scope="module")
def data() -> Data:
    return load(Config())


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Distillation:
    return trained(data, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        *((step, {}) for step in (0, 3, EVERY, 5, 2 * EVERY, STEPS - 1)),
        *((5, {"student_steps": 2, "guidance": 2.0}), (5, {"precision": "bfloat16"}), (5, {"precision": "float16"})),
    ],
    ids=str,
)
def test_resumed_to_the_bit(step: int, settings: dict[str, Any], data: Data, tmp_path: Path) -> None:
    uninterrupted = distillation(data, **settings)
    train(uninterrupted, Checkpoints(tmp_path / "whole", "js", "key"), Log(None))
    checkpoints = Checkpoints(tmp_path, "js", "key")
    first = distillation(data, **settings)
    killed_before(first, step)
    with pytest.raises(Stop):
        train(first, checkpoints, Log(None))
    saved = sorted(int(path.stem[-8:]) for path in tmp_path.glob("*.pt"))
    assert saved == [known for known in (EVERY, 2 * EVERY) if known <= step]
    second = distillation(data, **settings)
    train(second, Checkpoints(tmp_path, "js", "key"), Log(None))
    assert same(second.state(), uninterrupted.state())
    assert len(second.records) == 4


def test_state_holds_everything(whole: Distillation, data: Data) -> None:
    """Whatever tensor a training changes comes back: the state of another seed, loaded, is the same in all of it."""
    other = distillation(data, seed=1)
    before = copy.deepcopy(other.state())
    other.load(whole.state())
    assert same(other.state(), whole.state()) and not same(before["parts"]["head"], whole.state()["parts"]["head"])
    assert {"student", "fake", "head", "average", "loss"} <= set(whole.state()["parts"])
    assert "histogram.bins" in whole.state()["parts"]["loss"]
    assert not torch.equal(whole.loss.histogram.bins, torch.ones(10))
    assert all(whole.state()["parts"][f"{name}_optimizer"]["adam"]["state"] for name in ("student", "critics"))
    assert torch.equal(other.gen.get_state(), whole.gen.get_state())


def test_finished_training_is_not_repeated(data: Data, tmp_path: Path, whole: Distillation) -> None:
    train(distillation(data), Checkpoints(tmp_path, "js", "key"), Log(None))
    again = distillation(data)
    again.update = pytest.fail  # type: ignore[method-assign,assignment]
    train(again, Checkpoints(tmp_path, "js", "key"), Log(None))
    assert same(again.state(), whole.state())


def test_no_checkpoint_of_what_is_not_finite(data: Data, tmp_path: Path) -> None:
    training = distillation(data, log_every=100)
    update = training.update

    def spoil(step: int) -> Any:
        if step == 2:
            with torch.no_grad():
                next(training.student.parameters()).fill_(torch.nan)
        return update(step)

    training.update = spoil  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="js: the loss is nan at step 4"):
        train(training, Checkpoints(tmp_path, "js", "key"), Log(None))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- whole runs


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fdistill_ops.trainer", *TINY, "--out", str(out), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())


LONG = ["--distill-steps", "4000", "--checkpoint-every", "20"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_signals(number: signal.Signals, tmp_path: Path) -> None:
    """What is there afterwards is whole; SIGTERM and Ctrl-C lose nothing, kill -9 at most the interval."""
    process = start(tmp_path, *LONG)
    wait_for(tmp_path / "cache", "student-js-*-00000[1-9]*.pt", process)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    steps = sorted(int(path.stem[-8:]) for path in (tmp_path / "cache").glob("student-js-*.pt"))
    for path in (tmp_path / "cache").glob("*.pt"):
        torch.load(path, weights_only=True)
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    logged = max(record["step"] for record in map(json.loads, log) if record["stage"] == "js")
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert logged - steps[-1] <= 20
    else:
        assert process.returncode == 128 + number, error
        assert f"{number.name}: every file is whole; the same command goes on from here" in error
        assert "Traceback" not in error
        assert 0 <= steps[-1] - logged < 5  # it logs every fifth step
    resumed = start(tmp_path, *LONG)
    wait_for(tmp_path / "cache", f"student-js-*-{steps[-1] // 20 * 20 + 20:08d}.pt", resumed)
    resumed.terminate()
    assert f"js: goes on after step {steps[-1]}" in resumed.communicate(timeout=60)[1]


@pytest.mark.slow
def test_run_after_an_interruption(tmp_path: Path) -> None:
    """Log and report are those of an uninterrupted run, but for times."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*TINY, "--out", str(whole)]) == 0
    assert main([*TINY, "--out", str(cut)]) == 0
    newest = sorted((cut / "cache").glob("student-js-*.pt"))[-1]
    newest.unlink()
    (cut / "log.jsonl").write_text("")
    assert main([*TINY, "--out", str(cut)]) == 0
    assert (cut / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    rows = [json.loads((folder / "report.json").read_text())["rows"] for folder in (whole, cut)]
    for row in (*rows[0], *rows[1]):
        del row["samples_per_second"]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_processes_of_a_killed_comparison(tmp_path: Path) -> None:
    """They save and end too, rather than train on with nobody to report to."""
    command = [sys.executable, "-m", "fdistill_ops.trainer", "compare", *TINY, "--data", "ring", "--seeds", "2"]
    command += ["--jobs", "2", "--out", str(tmp_path), "--distill-steps", "20000", "--checkpoint-every", "20"]
    comparison = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())
    wait_for(tmp_path / "cache", "student-js-*-00000[1-9]*.pt", comparison)
    comparison.kill()
    error = comparison.communicate(timeout=30)[1]  # which the processes hold open until they end
    assert "Traceback" not in error and "done" not in error
    for path in (tmp_path / "cache").glob("*.pt"):
        torch.load(path, weights_only=True)
