"""The trainer's checkpoints as files: which are kept, which are refused by name, which are deleted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import STEPS, Stop, distillation, killed_before, need_extra, same, trained

from fdistill_ops.trainer.checkpoints import Checkpoints
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import Data, load
from fdistill_ops.trainer.distill import Distillation
from fdistill_ops.trainer.files import Log
from fdistill_ops.trainer.interruption import Interrupted
from fdistill_ops.trainer.training import Training, train

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

need_extra()


@pytest.fixture(scope="module")
def data() -> Data:
    return load(Config())


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Distillation:
    return trained(data, tmp_path_factory.mktemp("whole"))


def test_previous_one_is_kept(data: Data, tmp_path: Path, whole: Distillation) -> None:
    checkpoints = Checkpoints(tmp_path, "js", "key")
    train(distillation(data), checkpoints, Log(None))
    assert files(tmp_path) == ["js-key-00000008.pt", "js-key-00000011.pt"]


def signalled_before(training: Training, step: int) -> None:
    update = training.update

    def signal_first(now: int) -> Any:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(now)

    training.update = signal_first  # type: ignore[method-assign]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class KilledBeforeDeleting(Checkpoints):
    """Stands for a kill between writing one checkpoint and deleting the one before."""

    def save(self, step: int, state: Any) -> None:
        def stop(step: int) -> None:
            raise Stop

        self.stands_at = stop  # type: ignore[method-assign]
        super().save(step, state)


@pytest.mark.parametrize("how", ["SIGTERM", "killed", "killed before deleting"])
def test_files_of_many_interruptions(how: str, data: Data, tmp_path: Path, whole: Distillation) -> None:
    """However often it was interrupted: two, and a third one only until somebody is there to delete it."""
    for step in range(1, STEPS):
        training = distillation(data, checkpoint_every=1)
        if how == "SIGTERM":
            signalled_before(training, step)
            with pytest.raises(Interrupted):
                train(training, Checkpoints(tmp_path, "js", "key"), Log(None))
        else:
            kind = KilledBeforeDeleting if how == "killed before deleting" else Checkpoints
            killed_before(training, step)
            with pytest.raises(Stop):
                train(training, kind(tmp_path, "js", "key"), Log(None))
        assert len(files(tmp_path)) <= (3 if how == "killed before deleting" else 2)
    training = distillation(data, checkpoint_every=1)
    train(training, Checkpoints(tmp_path, "js", "key"), Log(None))
    assert files(tmp_path) == ["js-key-00000010.pt", "js-key-00000011.pt"]
    assert same(training.state(), whole.state())


def test_finished_and_killed_before_deleting(data: Data, tmp_path: Path) -> None:
    """The next run deletes it, although it has nothing to save."""
    first = distillation(data)
    killed_before(first, 9)
    with pytest.raises(Stop):
        train(first, Checkpoints(tmp_path, "js", "key"), Log(None))
    with pytest.raises(Stop):
        train(distillation(data), KilledBeforeDeleting(tmp_path, "js", "key"), Log(None))
    assert files(tmp_path) == [f"js-key-{step:08d}.pt" for step in (4, 8, 11)]
    train(distillation(data), Checkpoints(tmp_path, "js", "key"), Log(None))
    assert files(tmp_path) == ["js-key-00000008.pt", "js-key-00000011.pt"]


@pytest.mark.parametrize(
    ("damaged", "resumed", "finished"),
    [
        ([10], [8, 9, 10], [9, 11]),
        ([9, 10], [7, 8, 9, 10], [8, 11]),
        ([9], [8, 10], [10, 11]),
        ([8], [9, 10], [10, 11]),
        ([8, 10], [7, 9, 10], [9, 11]),
    ],
    ids=str,
)
def test_files_behind_a_damaged_one(
    damaged: list[int], resumed: list[int], finished: list[int], data: Data, tmp_path: Path, whole: Distillation
) -> None:
    """Two whole ones are kept, of whatever run. One that cannot be used stays until the training is past it: it is
    perhaps only now that it cannot."""
    first = distillation(data, checkpoint_every=1)
    checkpoints = Checkpoints(tmp_path, "js", "key")
    checkpoints.stands_at = lambda step: None  # type: ignore[method-assign]
    killed_before(first, 10)
    with pytest.raises(Stop):
        train(first, checkpoints, Log(None))
    assert len(files(tmp_path)) == 10
    for step in damaged:
        checkpoints.path(step).write_text("something else")
    second = distillation(data)
    killed_before(second, max(set(resumed) - set(damaged)))
    with pytest.raises(Stop):
        train(second, Checkpoints(tmp_path, "js", "key"), Log(None))
    assert files(tmp_path) == [checkpoints.path(step).name for step in resumed]
    third = distillation(data, checkpoint_every=100)
    train(third, Checkpoints(tmp_path, "js", "key"), Log(None))
    assert files(tmp_path) == [checkpoints.path(step).name for step in finished]
    assert same(third.state(), whole.state())


def test_two_runs_with_the_same_checkpoints(data: Data, tmp_path: Path, whole: Distillation) -> None:
    """Each writes and deletes the other's files, step by step, and both get to the end."""
    ahead, behind = (distillation(data, checkpoint_every=1) for _ in range(2))
    own = [Checkpoints(tmp_path, "js", "key") for _ in range(2)]
    update = ahead.update

    def with_the_other(step: int) -> Any:
        if step == 5:
            train(behind, own[1], Log(None))  # from step 5, past the first one, to the end
        return update(step)

    ahead.update = with_the_other  # type: ignore[method-assign]
    train(ahead, own[0], Log(None))
    assert same(ahead.state(), whole.state()) and same(behind.state(), whole.state())
    assert files(tmp_path) == ["js-key-00000010.pt", "js-key-00000011.pt"]


def test_files_replaced_while_they_are_looked_for(data: Data, tmp_path: Path) -> None:
    """By another run, which goes on and deletes those that were there."""
    for step in (1, 2):
        Checkpoints(tmp_path, "js", "key").save(step, {"step": step})
    read, other = Checkpoints._read, Checkpoints(tmp_path, "js", "key")

    class Slow(Checkpoints):
        def _read(self, step: int) -> Any:
            if step == 2:
                other.save(3, {"step": 3})
                other.save(4, {"step": 4})
            return read(self, step)

    assert next(Slow(tmp_path, "js", "key").newest_first()) == (4, {"step": 4})


def test_step_beyond_the_last(
    data: Data, tmp_path: Path, whole: Distillation, capsys: pytest.CaptureFixture[str]
) -> None:
    Checkpoints(tmp_path, "js", "key").save(STEPS + 1, distillation(data).state())
    training = distillation(data)
    train(training, Checkpoints(tmp_path, "js", "key"), Log(None))
    assert "js-key-00000012.pt is not used: its step is beyond the last, 11" in capsys.readouterr().err
    assert same(training.state(), whole.state())


@pytest.mark.parametrize("kind", ["pipe", "folder", "compressed", "larger"])
def test_what_is_no_checkpoint_at_all(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that would be waited for, and zip files that unpack to more than they are."""
    Checkpoints(tmp_path, "js", "key").save(1, {"step": 1})
    path = tmp_path / "js-key-00000002.pt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(10**6))
    else:  # many names of one part
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data/0", bytes(1000))
            archive.filelist += 100 * archive.filelist
    assert next(Checkpoints(tmp_path, "js", "key").newest_first()) == (1, {"step": 1})
    reasons = {"pipe": "it is no file", "compressed": "its parts are compressed"}
    reasons["larger"] = "its parts are larger than it is itself"
    assert kind == "folder" or f"{path} is not used: {reasons[kind]}" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign", "renamed", "shape", "text", "parts"])
def test_damaged_checkpoint(
    damage: str, data: Data, tmp_path: Path, whole: Distillation, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, and the one before it is used; the result is that of an uninterrupted run."""
    train(distillation(data), Checkpoints(tmp_path, "js", "key"), Log(None))
    path = tmp_path / "js-key-00000011.pt"
    content = path.read_bytes()
    state = torch.load(path, weights_only=True)
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])
    elif damage == "text":
        path.write_text("something else")
    elif damage == "foreign":
        torch.save(state | {"key": "other"}, path)
    elif damage == "renamed":
        torch.save(state | {"step": 10}, path)
    elif damage == "parts":
        del state["state"]["parts"]["head"]
        torch.save(state, path)
    elif damage == "shape":
        state["state"]["parts"]["critics_optimizer"]["adam"]["param_groups"] = []
        torch.save(state, path)
    capsys.readouterr()
    training = distillation(data)
    train(training, Checkpoints(tmp_path, "js", "key"), Log(None))
    error = capsys.readouterr().err
    assert f"{path} is not used: " in error and "goes on after step 8" in error
    assert same(training.state(), whole.state())
    assert path.read_bytes() != b"" and same(torch.load(path, weights_only=True)["state"], whole.state())


def test_nothing_usable(data: Data, tmp_path: Path, whole: Distillation) -> None:
    for step in (4, 8):
        (tmp_path / f"js-key-{step:08d}.pt").write_text("something else")
    training = distillation(data)
    train(training, Checkpoints(tmp_path, "js", "key"), Log(None))
    assert same(training.state(), whole.state())


def test_checkpoints_of_others_are_left(data: Data, tmp_path: Path) -> None:
    others = ["js-other-00000011.pt", "sf-key-00000011.pt", "notes.txt"]
    for name in others:
        (tmp_path / name).write_text(name)
    train(distillation(data), Checkpoints(tmp_path, "js", "key"), Log(None))
    assert all((tmp_path / name).read_text() == name for name in others)


def test_half_written_files_of_dead_processes(data: Data, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = (tmp_path / f".{pid}.js-key-00000004.pt" for pid in (process.pid, os.getpid()))
    for path in (dead, alive):
        path.write_text("half")
    list(Checkpoints(tmp_path, "js", "key").newest_first())
    assert alive.exists() and not dead.exists()
