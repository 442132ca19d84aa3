"""A bar on the standard error stream, where that is a terminal."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

_WIDTH = 24


class Progress:
    """``with Progress(n) as progress: ... progress.step("what comes next")``."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = max(total, 1), 0, time.monotonic()
        self.shown = sys.stderr.isatty()

    def step(self, what: str) -> None:
        """Shows what is being done now; everything named before is finished."""
        if self.shown:
            elapsed = time.monotonic() - self.started
            left = f", {elapsed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
            filled = _WIDTH * self.done // self.total
            bar = "#" * filled + "." * (_WIDTH - filled)
            line = f"[{bar}] {self.done}/{self.total} {what}{left}"
            sys.stderr.write("\r\033[K" + line[: shutil.get_terminal_size().columns - 1])
            sys.stderr.flush()
        self.done += 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
