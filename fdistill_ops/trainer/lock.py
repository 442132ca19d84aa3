"""One run at a time in a folder: two would overwrite each other's results."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from . import ranks
from .files import reason, say, sweep

NAME = "lock"  # in the folder; empty where nobody holds it


class LockError(OSError):
    """Why a folder cannot be written to, as one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within it no other run writes to the folder. The ranks of a run are one: the main one holds it for all. However
    the process ends, the system lets go of it.

    Raises:
        LockError: on every rank, where another run holds it.
    """
    with ExitStack() as stack:
        refusal: OSError | None = None
        if ranks.is_main():
            try:
                stack.enter_context(_locked(folder))
            except OSError as error:
                refusal = error
        refusal = ranks.from_main(refusal)
        if refusal is not None:
            raise refusal
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    path = folder / NAME
    # Neither through a link nor waiting for the other end of a pipe.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise LockError(f"{path}: not a file, or one that has another name too; it is for a run's lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockError(f"{folder}: another run writes to this folder{_holder(descriptor)}") from None
        except OSError as error:
            say(f"lock: {path} cannot be locked ({reason(error)}); let no other run write to this folder")
        _write(descriptor)
        sweep(folder)
        try:
            yield
        finally:
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _write(descriptor: int) -> None:
    """Who holds it, for the message to another run. The lock holds without it, were the disk full."""
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "started": started}
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> str:
    """What the file says of its holder, who may be about to write it."""
    for _ in range(20):
        try:
            holder: Any = json.loads(os.pread(descriptor, 1000, 0))
            text = f"{holder['process']} on {holder['host']}, started {holder['started']}"
        except (ValueError, TypeError, KeyError):
            time.sleep(0.05)
        else:
            return ": process " + "".join(letter for letter in text if letter.isprintable())
    return ""
