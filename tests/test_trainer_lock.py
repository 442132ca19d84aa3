"""One run at a time in a folder; folders that share a cache."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import TINY, environment, need_extra, wait_for

from fdistill_ops.trainer.__main__ import main
from fdistill_ops.trainer.lock import NAME, LockError, held

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

LONG = ["--distill-steps", "100000", "--checkpoint-every", "20"]
COMPARE = ["compare", *TINY, "--data", "ring", "--seeds", "2"]


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fdistill_ops.trainer", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())


def test_holder_is_named(tmp_path: Path) -> None:
    with held(tmp_path):
        holder = json.loads((tmp_path / NAME).read_text())
        with pytest.raises(LockError) as error, held(tmp_path):
            pass
        assert json.loads((tmp_path / NAME).read_text()) == holder, "the refused one left its traces"
    assert str(error.value) == (
        f"{tmp_path}: another run writes to this folder: process {os.getpid()} on {socket.gethostname()}, "
        f"started {holder['started']}"
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", holder["started"])
    for _ in range(2):
        with held(tmp_path):
            pass
    assert (tmp_path / NAME).read_text() == ""


def test_released_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), held(tmp_path):
        raise ZeroDivisionError
    with held(tmp_path):
        pass


def test_folders_of_other_names(tmp_path: Path) -> None:
    """It is the folder that counts, not how it is called."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with held(tmp_path / "folder"):
        with pytest.raises(LockError), held(tmp_path / "link"):
            pass
        with held(tmp_path):
            pass


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"process": 1}' + b"\xff" * 5000])
def test_holder_that_is_not_told(content: bytes, tmp_path: Path) -> None:
    with held(tmp_path):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(LockError) as error, held(tmp_path):
            pass
    assert str(error.value) == f"{tmp_path}: another run writes to this folder"


def test_holder_that_is_told_late(tmp_path: Path) -> None:
    with held(tmp_path):
        content = (tmp_path / NAME).read_text()
        (tmp_path / NAME).write_text("")
        timer = threading.Timer(0.2, (tmp_path / NAME).write_text, [content])
        timer.start()
        with pytest.raises(LockError, match=f"process {os.getpid()} on"), held(tmp_path):
            pass
        timer.join()


def test_message_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "two\nlines"
    folder.mkdir()
    with held(folder):
        content = json.loads((folder / NAME).read_text())
        (folder / NAME).write_text(json.dumps(content | {"host": "a\nb\x1b[31m"}))
        with pytest.raises(LockError) as error, held(folder):
            pass
    assert "two lines: another run" in str(error.value) and " on ab[31m, started" in str(error.value)


@pytest.mark.parametrize("kind", ["link", "other name", "pipe", "folder"])
def test_what_is_no_lock_is_left(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_extra()
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    out.mkdir()
    if kind == "link":
        (out / NAME).symlink_to(victim)
    elif kind == "other name":
        (out / NAME).hardlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(out / NAME)
    else:
        (out / NAME).mkdir()
    assert main([*TINY, "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fdistill-train: error: ") and str(out / NAME) in line
    assert victim.read_text() == "precious" and not list(out.rglob("*.*"))


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with held(tmp_path):
        pass
    assert f"lock: {tmp_path / NAME} cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().err


def test_what_killed_runs_left_half_written(tmp_path: Path) -> None:
    left = tmp_path / ".123.0123456789abcdef.report.md"
    left.write_text("half")
    with held(tmp_path):
        assert not left.exists()


# -------------------------------------------------------------------------------------------------------- whole runs


def changes(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], out: Path, process: int, *arguments: str) -> None:
    capsys.readouterr()
    assert main([*arguments, "--out", str(out)]) == 1
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    told = f"fdistill-train: error: {out}: another run writes to this folder: process {process} on "
    assert line.startswith(told) and output.out == ""


@pytest.mark.slow
def test_two_runs_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second one is refused, with the same settings, with others and by another command, until the first one has
    ended: also where it was killed."""
    need_extra()
    out = tmp_path / "out"
    first = start(*TINY, *LONG, "--out", str(out))
    try:
        wait_for(out / "cache", "student-js-*-00000[1-9]*.pt", first)
        first.send_signal(signal.SIGSTOP)  # it would only take the time of the others
        before = changes(out)
        refused(capsys, out, first.pid, *TINY, *LONG)
        refused(capsys, out, first.pid, *TINY, "--width", "8")
        refused(capsys, out, first.pid, *COMPARE)
        assert changes(out) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert main([*TINY, "--seed", "1", "--out", str(out)]) == 0  # one after the other, with other settings
    assert f"report: {out / 'report.md'}" in capsys.readouterr().err
    assert len({path.name.split("-")[1] for path in (out / "cache").glob("teacher-*")}) == 2


@pytest.mark.slow
def test_two_comparisons_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_extra()
    out = tmp_path / "out"
    first = start(*COMPARE, *LONG, "--jobs", "2", "--out", str(out))
    try:
        wait_for(out / "cache", "student-js-*-00000[1-9]*.pt", first)
        refused(capsys, out, first.pid, *COMPARE, "--jobs", "2")
        refused(capsys, out, first.pid, *TINY)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with held(out):
        pass
    first.communicate()  # until its processes have ended too


@pytest.mark.slow
def test_two_folders_with_one_cache(tmp_path: Path) -> None:
    """They write the same checkpoints at the same time, and both get the same."""
    need_extra()
    cache = ["--cache", str(tmp_path / "cache"), "--checkpoint-every", "1"]
    runs = [start(*TINY, *cache, "--out", str(tmp_path / name)) for name in ("a", "b")]
    for process in runs:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error
    assert (tmp_path / "a" / "log.jsonl").read_text() == (tmp_path / "b" / "log.jsonl").read_text() != ""
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(files) == 3 * 2 and not [name for name in files if name.startswith(".")]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
def test_ranks_are_refused_together(tmp_path: Path) -> None:
    need_extra()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fdistill_ops.trainer", *TINY, "--out", str(tmp_path)]
    with held(tmp_path):
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode != 0
    why = f"{tmp_path}: another run writes to this folder: process {os.getpid()} on "
    for rank in "01":
        assert done.stderr.count(f"fdistill-train: rank {rank}: error: {why}") == 1, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [NAME]
