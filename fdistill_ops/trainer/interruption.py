"""Ctrl-C and SIGTERM: a training saves and ends between two steps; anything else ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from . import ranks

Handler = Callable[[int, FrameType | None], None]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal to end. Not an Exception, as KeyboardInterrupt is not: nothing is to catch it by accident."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name, self.status = signal.Signals(number).name, 128 + number


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)


@contextmanager
def raised() -> Iterator[None]:
    """Within it the signals raise Interrupted at once."""
    with handled(_raise):
        yield


@contextmanager
def deferred() -> Iterator[list[int]]:
    """Within it the signals are only noted, in the list; the second Ctrl-C is not (torchrun sends it on, so there it
    comes twice)."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number in noted and number == signal.SIGINT and ranks.world() == 1:
            raise Interrupted(number)
        noted.append(number)

    with handled(note):
        yield noted
    if noted:
        raise Interrupted(noted[0])


@contextmanager
def handled(handler: Handler, numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Within it the signals go to the handler."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python handles none
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
