"""Files that are never half written, and the log."""

from __future__ import annotations

import fcntl
import importlib.util
import io
import json
import math
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

Record = dict[str, Any]

# .PROCESS.TOKEN.NAME; checkpoints were once written to .PROCESS.NAME.
_PARTIAL = re.compile(r"\.(?P<process>\d{1,10})\.(?:(?P<token>[0-9a-f]{16})\..+|.+-\d{8}\.pt)")


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, moved to ``path`` once everything is there and on the disk, and removed if anything went
    wrong. It is written under a name that nobody can foresee, so through no link that lies in wait; a link at ``path``
    itself is replaced. Its permissions are those that open() gives."""
    file = _new_beside(path)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)  # while it is locked: afterwards ``sweep`` might take it
        _sync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a full disk names none
        raise
    finally:
        Path(file.name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())


def new_text_file(path: Path) -> TextIO:
    """A new, empty file at ``path``, written line by line. What was there, a file or a link, is left to those who have
    it open."""
    file = _new_beside(path)
    try:
        os.replace(file.name, path)
    except OSError:
        file.close()
        os.unlink(file.name)
        raise
    return io.TextIOWrapper(file, encoding="utf-8", line_buffering=True)


def sweep(folder: Path) -> None:
    """Removes what killed processes left half written."""
    for path in folder.glob(".*"):
        if found := _PARTIAL.fullmatch(path.name):
            with suppress(OSError), open(path, "rb", opener=_plainly) as file:  # a link is none of ours
                if _abandoned(file, int(found["process"]), has_lock=found["token"] is not None):
                    path.unlink()


def _new_beside(path: Path) -> BinaryIO:
    """A new file in the folder of ``path``, locked for as long as it is open: the process that writes it may be one of
    another machine or container, where its number says nothing."""
    while True:
        file = path.with_name(f".{os.getpid()}.{secrets.token_hex(8)}.{path.name}").open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:  # this file system has no locks
            taken = False
        else:
            taken = not os.path.lexists(file.name)
        if not taken:
            return file
        file.close()  # somebody who sweeps came before the lock


def _plainly(path: str, flags: int) -> int:
    """An opener that neither follows a link nor waits for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _abandoned(file: BinaryIO, process: int, has_lock: bool) -> bool:
    """Whether nobody writes it any more; if so, nobody can begin to while ``file`` is open."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        has_lock = False
    return has_lock or not _alive(process)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user; no number of a process
        pass
    return True


def _sync(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: what is not finite becomes null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Log:
    """JSON lines, each written at once, and TensorBoard's files beside them where tensorboard is installed. The lines
    hold nothing that differs between two runs with one seed, such as a time.

    Args:
        folder: for log.jsonl and tensorboard/; None writes nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.file: TextIO | None = None
        self.board: Any = None
        if folder is not None:
            self.file = new_text_file(folder / "log.jsonl")
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                # Its files are named after the time, the machine and the process, which can be foreseen.
                self.board = SummaryWriter(str(folder / "tensorboard"), filename_suffix=f".{secrets.token_hex(8)}")

    def write(self, stage: str, record: Record) -> None:
        self.repeat(stage, [record])
        if self.board is not None:
            for name, value in record.items():
                if name != "step":
                    self.board.add_scalar(f"{stage}/{name}", value, record["step"])

    def repeat(self, stage: str, records: list[Record]) -> None:
        """Records of an earlier run, which TensorBoard's files have."""
        if self.file is not None:
            self.file.writelines(to_json({"stage": stage} | record) + "\n" for record in records)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def reason(error: Exception) -> str:
    """The first line of what an exception says."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def say(text: str) -> None:
    """To stderr: stdout carries the table alone."""
    print(text, file=sys.stderr, flush=True)
