"""Work in a child process, which may die or never end: who waits for it knows at what."""

from __future__ import annotations

import faulthandler
import mmap
import os
import pickle
import select
import signal
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Death:
    """``place``: at which of the items. ``reason``: the signal's name, "hang", or the exit status."""

    place: int
    reason: str


def in_child(
    work: Callable[[T], Any], items: Sequence[T], limit: float, enough: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[int, Any]], Death | None]:
    """``work`` of each item in a forked child; the results that are not None, with their places, as far as it came. An
    item that takes more than ``limit`` seconds ends it; so does, without a Death, a result that is ``enough``.

    Raises:
        RuntimeError: ``work`` raised; that is a defect of the caller.
    """
    place = mmap.mmap(-1, 8)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _work(work, items, place, writing, enough)
    os.close(writing)
    try:
        hung = _collect_until(reading, place, limit, child)
        data = b"".join(hung[1])
    finally:
        os.close(reading)
    _, status = os.waitpid(child, 0)
    at = struct.unpack("q", place[:8])[0]
    results, error = _parsed(data)
    if error:
        raise RuntimeError(f"at item {at}, {items[at]!r}:\n{error}")
    if hung[0]:
        return results, Death(at, "hang")
    if os.WIFSIGNALED(status):
        return results, Death(at, signal.Signals(os.WTERMSIG(status)).name)
    if os.WEXITSTATUS(status):
        return results, Death(at, f"exit status {os.WEXITSTATUS(status)}")
    return results, None


def _work(
    work: Callable[[T], Any],
    items: Sequence[T],
    place: mmap.mmap,
    writing: int,
    enough: Callable[[Any], bool] | None,
) -> None:
    """The child: never returns."""
    try:
        faulthandler.disable()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)  # what dies says so there
        for i, item in enumerate(items):
            place[:8] = struct.pack("q", i)
            result = work(item)
            if result is not None:
                _send(writing, (i, result))
                if enough is not None and enough(result):
                    break
    except BaseException:
        _send(writing, (-1, traceback.format_exc()))
        os._exit(0)
    os._exit(0)


def _send(writing: int, message: tuple[int, Any]) -> None:
    data = pickle.dumps(message)
    data = struct.pack("q", len(data)) + data
    while data:
        data = data[os.write(writing, data) :]


def _collect_until(reading: int, place: mmap.mmap, limit: float, child: int) -> tuple[bool, list[bytes]]:
    """What the child writes until it ends; True if it had to be ended."""
    chunks: list[bytes] = []
    last, since = -1, time.monotonic()
    while True:
        ready, _, _ = select.select([reading], [], [], min(limit, 0.5))
        if ready:
            chunk = os.read(reading, 1 << 16)
            if not chunk:
                return False, chunks
            chunks.append(chunk)
        at = struct.unpack("q", place[:8])[0]
        if at != last:
            last, since = at, time.monotonic()
        elif time.monotonic() - since > limit:
            os.kill(child, signal.SIGKILL)
            return True, chunks


def _parsed(data: bytes) -> tuple[list[tuple[int, Any]], str]:
    results, start = [], 0
    while start + 8 <= len(data):
        size = struct.unpack("q", data[start : start + 8])[0]
        if start + 8 + size > len(data):
            break
        place, value = pickle.loads(data[start + 8 : start + 8 + size])
        if place < 0:
            return results, value
        results.append((place, value))
        start += 8 + size
    return results, ""
