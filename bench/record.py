"""What a run leaves: the machine, and a result for every contender of every case. As JSON, in one schema.

    {"schema": 1, "command": [...], "started": "2026-01-31T12:00:00+00:00", "commit": "..." or null,
     "partial": whether it was interrupted, "machine": {...}, "versions": {...},
     "results": [{"case": {the fields of Case}, "contender": "cpu", "kind": "fused", "bytes": model bytes of a step,
                  "rounds": [seconds per call, one for every round], "forward": [...], "backward": [the parts of them],
                  "first_call": seconds or null, "extra_memory": bytes or null, "launches": n or null,
                  "synchronizations": n or null, "load": load average a core when it was timed, or null,
                  "error": why there is no time, or null, "figures": [{the fields of Figure}]}],
     "overhead": [{"op": ..., "contender": ..., "device": ..., "forward": [seconds, ...], "backward": [seconds, ...],
                   "load": ..., "figures": [...]}]}

Round i of one contender was measured right beside round i of the others: ratios are taken round by round. The figures
follow from the rest, and are there for whoever reads the file: with what makes one worthless (``doubts``).
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

import fdistill_ops as fd
from fdistill_ops.trainer.files import to_json, write_text

from .cases import Case, size_name
from .clock import cache_bytes
from .figures import Figure, figures, of_overhead
from .ops import OPS

SCHEMA = 1
SCALE = "torch mse_loss"
"""The operation of PyTorch's that host overheads are given in."""


@dataclass
class Result:
    """One contender on one case. ``kind``: "fused" (one of our back ends), "reference", "eager", "compile" or
    "copy"; "failed" for a case that could not be measured. ``rounds`` is empty where ``error`` says why; ``forward``
    and ``backward`` are parts of them, where a step has both. ``load``: the load average, for each core."""

    case: Case
    contender: str
    kind: str
    bytes: int
    rounds: list[float] = field(default_factory=list)
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    first_call: float | None = None
    extra_memory: int | None = None
    launches: int | None = None
    synchronizations: int | None = None
    load: float | None = None
    error: str | None = None

    def add(self, seconds: float, forward: float | None) -> None:
        """A round, of a call and of the forward part of it."""
        parts = {"rounds": seconds} | ({} if forward is None else {"forward": forward, "backward": seconds - forward})
        for name, value in parts.items():
            getattr(self, name).append(float(f"{value:.5g}"))

    @property
    def ours(self) -> bool:
        """Whether it is what users call: operations without kernels are the reference."""
        return self.kind == "fused" or (self.kind == "reference" and not OPS[self.case.op].fused)

    @property
    def fails(self) -> bool:
        """Whether the run has failed with it. Eager formulas also check an operation that is its own reference."""
        checks = self.kind == "eager" and not OPS[self.case.op].fused
        return self.error is not None and (self.ours or self.kind == "failed" or checks)

    def costs(self) -> tuple[float | None, ...]:
        """What is measured once: seconds of the first call, bytes, launches, synchronisations."""
        return self.first_call, self.extra_memory, self.launches, self.synchronizations


@dataclass
class Overhead:
    """Seconds per call on a tensor of a few bytes, one value for every round."""

    op: str
    contender: str
    device: str
    forward: list[float]
    backward: list[float]
    load: float | None = None

    def both(self) -> list[float]:
        """Forward and, where there is one, backward."""
        return [a + b for a, b in zip(self.forward, self.backward or [0.0] * len(self.forward), strict=False)]


Entry = TypeVar("Entry", Result, Overhead)


@dataclass
class Record:
    """A whole run."""

    machine: dict[str, Any]
    versions: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    overhead: list[Overhead] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    started: str = ""
    commit: str | None = None
    partial: bool = False

    def groups(self) -> list[list[Result]]:
        """The results of each case, in the order they were measured."""
        found: dict[Case, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.case, []).append(result)
        return list(found.values())

    def scale(self, entry: Overhead) -> Overhead | None:
        """PyTorch's own loss beside it: the unit of host overheads."""
        return next((o for o in self.overhead if (o.op, o.device) == (SCALE, entry.device)), None)

    def on(self) -> str:
        """The machine, the versions and the day in one line."""
        of, versions = self.machine.get, self.versions.get
        names = ", ".join(filter(None, [of("gpu"), of("processor")]))
        where = f"{names}, {of('cores')} cores, {size_name(of('cache_bytes') or 0)} of cache, {versions('isa')}"
        version = f"torch {versions('torch')}, Python {versions('python')}; commit {self.commit}"
        return f"{where}; {version}; {self.started[:10]}"

    def told(self) -> Iterator[tuple[Result | Overhead, dict[str, Figure]]]:
        """Every result, then every overhead, with its figures by name."""
        for group in self.groups():
            others = {result.contender: result for result in group}
            yield from ((result, figures(result, others)) for result in group)
        yield from ((entry, of_overhead(entry, self.scale(entry))) for entry in self.overhead)

    def write(self, path: Path) -> None:
        """Never a part of a file. A line for each result."""
        told = [
            asdict(entry) | {"figures": [figure.told() for figure in found.values()]} for entry, found in self.told()
        ]
        content = {"schema": SCHEMA} | asdict(self)
        content |= {"results": told[: len(self.results)], "overhead": told[len(self.results) :]}
        lines = [f' "{name}": {_lines(value)}' for name, value in content.items()]
        write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def read(cls, path: Path) -> Record:
        """ValueError where the file is no record of this schema."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            results = [_result(entry) for entry in content.pop("results")]
            overhead = [_overhead(entry) for entry in content.pop("overhead")]
            record = cls(**content, results=results, overhead=overhead)
            for name, kind in (("machine", dict), ("versions", dict), ("started", str)):
                if not isinstance(getattr(record, name), kind):
                    raise ValueError(f"{name} is no {kind.__name__}")
            return record
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no record of schema {SCHEMA}: {error}") from None


def _lines(value: Any) -> str:
    """JSON, the entries of a list of objects on lines of their own."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return to_json(value)
    return "[\n  " + ",\n  ".join(map(to_json, value)) + "\n ]"


def _result(entry: dict[str, Any]) -> Result:
    entry.pop("figures", None)
    case = entry.pop("case")
    case["shape"] = tuple(case["shape"])
    result = Result(case=Case(**case), **entry)
    hash(result.case)
    if result.case.op not in OPS:
        raise ValueError(f"there is no operation {result.case.op!r}")
    if not all(isinstance(size, int) and size > 0 for size in result.case.shape):
        raise ValueError(f"{result.case.shape} is no shape")
    return _checked(result, "rounds", "forward", "backward")


def _overhead(entry: dict[str, Any]) -> Overhead:
    entry.pop("figures", None)
    return _checked(Overhead(**entry), "forward", "backward")


def _checked(entry: Entry, *names: str) -> Entry:
    for times in (getattr(entry, name) for name in names):
        if not isinstance(times, list) or not all(isinstance(t, int | float) and 0 < t < math.inf for t in times):
            raise ValueError("a round is no time")
    if not isinstance(entry.load, int | float | None):
        raise ValueError("a load is no number")
    return entry


def new_record(device: str, command: Iterable[str]) -> Record:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Record(machine(device), versions(), command=list(command), started=started, commit=commit())


def machine(device: str) -> dict[str, Any]:
    info: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes("cpu"),
        "cache_bytes": cache_bytes("cpu"),
        "system": platform.platform(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_cache_bytes": cache_bytes(device),
            "gpu_capability": f"{properties.major}.{properties.minor}",
        }
    return info


def versions() -> dict[str, Any]:
    build = fd.build_info()
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "fdistill_ops": fd.__version__,
        "isa": build.get("isa"),
        "compiler": build.get("compiler"),
    }


def commit() -> str | None:
    """Of the checkout that the package lies in, with a + where files differ from it; None outside of one."""
    root = Path(fd.__file__).parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def memory_bytes(device: str) -> int:
    """Free memory."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 4 << 30


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
