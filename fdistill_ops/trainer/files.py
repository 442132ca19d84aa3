"""Files that are never half written, the log, and the cache of what was trained."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch

Record = dict[str, Any]
Module = TypeVar("Module", bound=torch.nn.Module)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, moved to ``path`` once everything is there, and removed if anything went wrong."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
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
    """JSON lines, each written at once. Holds nothing that differs between two runs with one seed, such as a time."""

    def __init__(self, path: Path) -> None:
        self.file: TextIO = path.open("w", encoding="utf-8", buffering=1)

    def write(self, stage: str, records: list[Record]) -> None:
        for record in records:
            self.file.write(to_json({"stage": stage} | record) + "\n")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def say(text: str) -> None:
    """To stderr: stdout carries the table alone."""
    print(text, file=sys.stderr, flush=True)


def cached(
    path: Path, key: str, module: Module, train: Callable[[], list[Record]]
) -> tuple[Module, list[Record]] | None:
    """What the cache file holds, if it was written under this key: the trained module and the records of its training.
    Otherwise trains ``module`` by ``train`` and writes the file; None then.

    A file that cannot be read, or was written for something else, is reported and replaced.
    """
    if path.exists():
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or content.get("key") != key:
                raise ValueError("it was written for something else")
            loaded = copy.deepcopy(module)  # a state that fits in part must not leave its traces in the module
            loaded.load_state_dict(content["state"])
            records = list(content["log"])
        except Exception as error:  # whatever a damaged file makes the unpickler raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            say(f"cache: {path} is not used: {reason}; training again")
        else:
            say(f"cache: {path} is used")
            return loaded, records
    records = train()
    with whole_file(path) as partial:
        torch.save({"key": key, "state": module.state_dict(), "log": records}, partial)
    return None
