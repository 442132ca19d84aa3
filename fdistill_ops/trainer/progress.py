"""How far a stage is, and how long it will still take: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable
from typing import Any

from . import ranks

SECONDS = 10.0  # between two lines


def bar(stage: str, items: Iterable[Any] | None = None, total: int | None = None, first: int = 0) -> Any:
    """tqdm's bar, over items or up to a total, shown by one process: bars of several would overwrite each other. Where
    stderr is no terminal it is a line every ten seconds and one at the end."""
    from tqdm import tqdm

    class Lines(tqdm):
        disable: bool

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            if not pos:
                print(str(self) if msg is None else msg, file=sys.stderr, flush=True)
            return True

        def close(self) -> None:
            if not self.disable and self.last_print_n < self.n:
                self.display()
            self.disable = True

    terminal = sys.stderr.isatty()
    hidden = not ranks.is_main() or multiprocessing.parent_process() is not None
    settings = {"mininterval": 0.5, "dynamic_ncols": True} if terminal else {"mininterval": SECONDS, "miniters": 1}
    return (tqdm if terminal else Lines)(items, total=total, initial=first, desc=stage, disable=hidden, **settings)
