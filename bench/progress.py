"""How far a run is, on the standard error stream: a bar where that is a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

_WIDTH = 24
EVERY = 10.0
"""Seconds between two lines, at least."""


class Progress:
    """``with Progress(n) as progress: ... progress.step("what comes next")``."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started, self.last = max(total, 1), 0, time.monotonic(), -EVERY
        self.terminal = sys.stderr.isatty()

    def step(self, what: str) -> None:
        """Shows what is being done now; everything named before is finished."""
        elapsed = time.monotonic() - self.started
        left = f", {elapsed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        line = f"{self.done}/{self.total} {what}{left}"
        if self.terminal:
            filled = _WIDTH * self.done // self.total
            bar = "#" * filled + "." * (_WIDTH - filled)
            self._write("\r\033[K" + f"[{bar}] {line}"[: shutil.get_terminal_size().columns - 1])
        elif elapsed - self.last >= EVERY:
            self.last = elapsed
            self._write(f"fdistill-bench: {line}\n")
        self.done += 1

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal:
            self._write("\r\033[K")
