"""Checkpoints: files that hold all of a training, so that it goes on where it was interrupted, to the bit.

A finished training is one that stands at its last step; so this is the cache of what was trained, too.
"""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .files import reason, say, whole_file

State = dict[str, Any]
FORMAT = 2
KEPT = 2  # the last one, and one more in case it is damaged


class Checkpoints:
    """Those of one training in one folder: ``STAGE-KEY-STEP.pt``. The key stands for whatever decides its result."""

    def __init__(self, folder: Path, stage: str, key: str) -> None:
        self.folder, self.key = folder, key
        self.prefix = f"{re.sub(r'[^a-zA-Z0-9.-]+', '_', stage)}-{key}-"
        self.whole: list[int] = []  # steps of those known to be whole

    def path(self, step: int) -> Path:
        return self.folder / f"{self.prefix}{step:08d}.pt"

    def save(self, step: int, state: State) -> None:
        """Written aside, flushed to the disk and renamed: a kill at any moment leaves the file before or this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # what torch.save raises where a disk is full is no OSError
        torch.save({"format": FORMAT, "key": self.key, "step": step, "state": state}, content)
        with whole_file(self.path(step)) as partial:
            partial.write_bytes(content.getbuffer())
        self.whole = [*(known for known in self.whole if known < step), step]
        for known in self.whole[:-KEPT]:
            self.path(known).unlink(missing_ok=True)
        self.whole = self.whole[-KEPT:]

    def newest_first(self) -> Iterator[tuple[int, State]]:
        """Steps and states. A file that cannot be used is reported by its name, and the one before it comes next."""
        self._sweep()
        for path in sorted(self.folder.glob(f"{self.prefix}*.pt"), reverse=True):
            try:
                # torch.save writes a zip file, at whose checksums torch.load does not look.
                with zipfile.ZipFile(path) as file:
                    if file.testzip() is not None:
                        raise ValueError("it is damaged")
                content = torch.load(path, map_location="cpu", weights_only=True)
                if not isinstance(content, dict) or (content.get("format"), content.get("key")) != (FORMAT, self.key):
                    raise ValueError("it was written for something else")
                if self.path(content["step"]) != path:
                    raise ValueError("its name and its step differ")
                step, state = content["step"], content["state"]
            except Exception as error:  # whatever a damaged file makes the unpickler raise
                self.refuse(path, error)
            else:
                yield step, state

    def refuse(self, path: Path, error: Exception) -> None:
        say(f"checkpoint: {path} is not used: {reason(error)}")

    def _sweep(self) -> None:
        """Removes what a killed process left half written."""
        for partial in self.folder.glob(f".*.{self.prefix}*.pt"):
            process = partial.name.split(".")[1]
            if process.isdigit() and not _alive(int(process)):
                partial.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return True
