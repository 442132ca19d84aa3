"""Files that are never half written, and the log."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

Record = dict[str, Any]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, moved to ``path`` once everything is there and on the disk, and removed if anything went
    wrong."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # that of a full disk names none
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


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
            self.file = (folder / "log.jsonl").open("w", encoding="utf-8", buffering=1)
            if importlib.util.find_spec("tensorboard") is not None:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder / "tensorboard"))

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
