"""Checkpoints: files that hold all of a training, so that it goes on where it was interrupted, to the bit.

A finished training is one that stands at its last step; so this is the cache of what was trained, too.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .files import reason, say, sweep, whole_file

State = dict[str, Any]
FORMAT = 2
KEPT = 2  # the last one, and one more in case it is damaged


class Checkpoints:
    """Those of one training in one folder: ``STAGE-KEY-STEP.pt``. The key stands for whatever decides its result, so
    that several runs may share the folder: they write the same states."""

    def __init__(self, folder: Path, stage: str, key: str) -> None:
        self.folder, self.stage, self.key = folder, stage, key
        self.prefix = f"{re.sub(r'[^a-zA-Z0-9.-]+', '_', stage)}-{key}-"
        self.whole: set[int] = set()  # steps of those known to be whole

    def path(self, step: int) -> Path:
        return self.folder / f"{self.prefix}{step:08d}.pt"

    def save(self, step: int, state: State) -> None:
        """Written aside, flushed to the disk and renamed: a kill at any moment leaves the file before or this one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # what torch.save raises where a disk is full is no OSError
        torch.save({"format": FORMAT, "key": self.key, "step": step, "state": state}, content)
        with whole_file(self.path(step)) as file:
            file.write(content.getbuffer())
        self.stands_at(step)

    def stands_at(self, step: int) -> None:
        """The training has got to that step, whose file is whole. Of the files before it, whichever run they are from,
        all but the last KEPT - 1 whole ones go. Those after it stay until the training has got there: what could not
        be read may be another time."""
        self.whole.add(step)
        before = sorted((found for found in self._steps() if found < step), reverse=True)
        if len(before) < KEPT:
            return
        kept = 1
        for found in before:
            if kept < KEPT and (found in self.whole or self._is_whole(found)):
                kept += 1
            else:
                self.path(found).unlink(missing_ok=True)

    def newest_first(self) -> Iterator[tuple[int, State]]:
        """Steps and states. A file that cannot be used is reported by its name, and the one before it comes next."""
        sweep(self.folder)
        tried: set[int] = set()
        while left := self._steps() - tried:  # looked up each time: another run may have replaced them by later ones
            step = max(left)
            tried.add(step)
            try:
                state = self._read(step)
            except Exception as error:  # whatever a damaged file makes the unpickler raise
                self.refuse(self.path(step), error)
            else:
                yield step, state

    def refuse(self, path: Path, error: Exception) -> None:
        say(f"checkpoint: {path} is not used: {reason(error)}")

    def _steps(self) -> set[int]:
        """The steps of which there are files."""
        name = re.compile(re.escape(self.prefix) + r"(\d{8}|[1-9]\d{8,})\.pt")
        found = ((path, name.fullmatch(path.name)) for path in self.folder.glob(f"{self.prefix}*.pt"))
        return {int(match[1]) for path, match in found if match and not path.is_dir()}

    def _is_whole(self, step: int) -> bool:
        try:
            self._read(step)
        except Exception as error:
            self.refuse(self.path(step), error)
            return False
        return True

    def _read(self, step: int) -> State:
        """The state in that file; raises anything where the file is not what ``save`` has written."""
        path = self.path(step)
        if not path.is_file():  # nor a link to one: a pipe would be waited for
            raise ValueError("it is no file")
        with path.open("rb") as file:
            # torch.save writes a zip file, at whose checksums torch.load does not look, and does not compress it.
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                    raise ValueError("its parts are compressed")
                if sum(part.file_size for part in parts) > file.seek(0, io.SEEK_END):
                    raise ValueError("its parts are larger than it is itself")
                if archive.testzip() is not None:
                    raise ValueError("it is damaged")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or (content.get("format"), content.get("key")) != (FORMAT, self.key):
            raise ValueError("it was written for something else")
        if content["step"] != step:
            raise ValueError("its name and its step differ")
        return content["state"]
