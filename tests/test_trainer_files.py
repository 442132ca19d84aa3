"""How the trainer writes: whole files, through no link that lies in wait, and nothing left of killed processes."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from trainer_cases import TINY, need_extra

from fdistill_ops.trainer import files
from fdistill_ops.trainer.__main__ import main
from fdistill_ops.trainer.files import Log, sweep, whole_file, write_text

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

TOKEN = "0123456789abcdef"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["file"]
    write_text(path, "new, ü")
    assert path.read_text(encoding="utf-8") == "new, ü" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077], ids=oct)
def test_permissions_are_those_of_open(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        (tmp_path / "opened").open("w").close()
        write_text(tmp_path / "written", "text")
        Log(tmp_path).__exit__()
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode) for path in tmp_path.iterdir() if path.is_file()}
    assert modes["written"] == modes["log.jsonl"] == modes["opened"]


def test_nothing_is_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a name that could be foreseen, and one at the name that is written to, were it foreseen all the same."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".{os.getpid()}.file").symlink_to(victim)
    write_text(tmp_path / "file", "text")
    monkeypatch.setattr(secrets, "token_hex", lambda count: TOKEN)
    (tmp_path / f".{os.getpid()}.{TOKEN}.file").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "other")
    assert victim.read_text() == "precious" and (tmp_path / "file").read_text() == "text"


def test_a_link_at_the_name_is_replaced(tmp_path: Path) -> None:
    """Whether somebody made it on purpose or not: what it leads to is left as it is."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("file", "log.jsonl"):
        (tmp_path / name).symlink_to(victim)
    write_text(tmp_path / "file", "text")
    with Log(tmp_path) as log:
        log.write("js", {"step": 1, "loss": 2.0})
    assert victim.read_text() == "precious"
    assert not (tmp_path / "file").is_symlink() and not (tmp_path / "log.jsonl").is_symlink()
    assert (tmp_path / "log.jsonl").read_text() == '{"stage": "js", "step": 1, "loss": 2.0}\n'


def test_log_of_a_run_that_has_not_ended_yet(tmp_path: Path) -> None:
    """What it still writes goes into its own file, not into that of the run that follows."""
    with Log(tmp_path) as first, Log(tmp_path) as second:
        first.write("js", {"step": 1, "loss": 1.0})
        second.write("js", {"step": 2, "loss": 2.0})
        first.write("js", {"step": 3, "loss": 3.0})
    assert (tmp_path / "log.jsonl").read_text() == '{"stage": "js", "step": 2, "loss": 2.0}\n'


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    for name in ("file", "log.jsonl"):
        (tmp_path / name).mkdir()
    for write in (lambda: write_text(tmp_path / "file", "text"), lambda: Log(tmp_path)):
        with pytest.raises(IsADirectoryError):
            write()
    assert names(tmp_path) == ["file", "log.jsonl"]


@pytest.mark.slow
def test_links_at_every_name_of_a_run(tmp_path: Path) -> None:
    need_extra()
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    assert main([*TINY, "--out", str(out)]) == 0
    written = {path for path in out.rglob("*") if path.is_file() and path.parent.name != "tensorboard"}
    assert {path.suffix for path in written} >= {".md", ".json", ".jsonl", ".png", ".pt"}
    for path in written:
        path.unlink()
        path.symlink_to(victim)
        (path.parent / f".{os.getpid()}.{path.name}").symlink_to(victim)
    (out / "lock").unlink(missing_ok=True)  # refused there: test_trainer_lock.py
    assert main([*TINY, "--out", str(out)]) == 0
    assert victim.read_text() == "precious"
    assert not [path for path in written if path.is_symlink()]


# ------------------------------------------------------------------------------------------- what killed processes left


def writer(path: Path) -> int:
    """A process that is about to write ``path`` and does not come to the end of it."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        with whole_file(path) as file:
            file.write(b"half")
            file.flush()
            os.write(writing, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return process


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_files_of_killed_processes_are_swept(tmp_path: Path) -> None:
    process = writer(tmp_path / "file")
    try:
        sweep(tmp_path)
        assert len(names(tmp_path)) == 1, "it was being written"
    finally:
        kill(process)
    assert len(names(tmp_path)) == 1
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_process_numbers_do_not_matter(tmp_path: Path) -> None:
    """In a container the next process often has the same one; that of another machine says nothing here."""
    (tmp_path / f".{os.getpid()}.{TOKEN}.file").write_text("half")
    with whole_file(tmp_path / "other") as file:
        (moved,) = [path for path in tmp_path.iterdir() if path.name.endswith(".other")]
        moved = moved.rename(tmp_path / f".999999999.{TOKEN}.other")  # of no process here
        sweep(tmp_path)
        assert names(tmp_path) == [moved.name]
        moved.rename(file.name)
    assert names(tmp_path) == ["other"]


def test_without_locks_the_process_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    for number in (process.pid, os.getpid()):
        (tmp_path / f".{number}.{TOKEN}.file").write_text("half")
    sweep(tmp_path)
    assert names(tmp_path) == [f".{os.getpid()}.{TOKEN}.file"]
    write_text(tmp_path / "written", "text")
    assert (tmp_path / "written").read_text() == "text"


def test_a_sweep_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer finds that its file is gone, or about to go, and takes another."""
    lock, calls = fcntl.flock, []

    def late(file: Any, operation: int) -> None:
        calls.append(file.name)
        if len(calls) == 1:
            os.unlink(file.name)
        elif len(calls) == 2:
            raise BlockingIOError
        lock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write_text(tmp_path / "file", "text")
    assert len(set(calls)) == 3 and (tmp_path / "file").read_text() == "text"


def test_what_is_no_partial_file_is_left(tmp_path: Path) -> None:
    (tmp_path / f".123.{TOKEN}.link").symlink_to(tmp_path / ".hidden")
    for name in (".hidden", ".123.notes", f".{TOKEN}.file", f"123.{TOKEN}.file", f".123.{TOKEN}"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == before
