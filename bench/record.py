"""What a run leaves: the machine, and a result for every contender of every case. As JSON, in one schema.

    {"schema": 1, "command": [...], "started": "2026-01-31T12:00:00+00:00", "commit": "..." or null,
     "machine": {...}, "versions": {...},
     "results": [{"case": {the fields of Case}, "contender": "cpu", "kind": "fused", "bytes": model bytes of a step,
                  "rounds": [seconds per call, one for every round], "first_call": seconds or null,
                  "extra_memory": bytes or null, "launches": n or null, "synchronizations": n or null,
                  "error": why there is no time, or null}],
     "overhead": [{"op": ..., "contender": ..., "device": ..., "forward": [seconds, ...], "backward": [seconds, ...]}]}

Round i of one contender was measured right beside round i of the others: ratios are taken round by round.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fdistill_ops as fd
from fdistill_ops.trainer.files import to_json, write_text

from .cases import Case
from .clock import Spread, cache_bytes
from .ops import OPS

SCHEMA = 1


@dataclass
class Result:
    """One contender on one case. ``kind``: "fused" (one of our back ends), "reference", "eager", "compile" or
    "copy"; "failed" for a case that could not be measured. ``rounds`` is empty where ``error`` says why."""

    case: Case
    contender: str
    kind: str
    bytes: int
    rounds: list[float] = field(default_factory=list)
    first_call: float | None = None
    extra_memory: int | None = None
    launches: int | None = None
    synchronizations: int | None = None
    error: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is what users call: operations without kernels are the reference."""
        return self.kind == "fused" or (self.kind == "reference" and not OPS[self.case.op].fused)

    @property
    def fails(self) -> bool:
        """Whether the run has failed with it. Eager formulas also check an operation that is its own reference."""
        checks = self.kind == "eager" and not OPS[self.case.op].fused
        return self.error is not None and (self.ours or self.kind == "failed" or checks)

    @property
    def seconds(self) -> Spread:
        return Spread.of(self.rounds)

    @property
    def bandwidth(self) -> float:
        """Model bytes per second."""
        return self.bytes / self.seconds.median

    def ratio(self, other: Result | None) -> float | None:
        """How many times as long the other takes: the median over the rounds, None where one of the two has none."""
        if other is None or not self.rounds or not other.rounds:
            return None
        return Spread.of([b / a for a, b in zip(self.rounds, other.rounds, strict=False)]).median


@dataclass
class Overhead:
    """Seconds per call on a tensor of a few bytes, one value for every round."""

    op: str
    contender: str
    device: str
    forward: list[float]
    backward: list[float]

    def microseconds(self) -> tuple[float, float | None]:
        """Medians of forward and backward; None where there is no backward."""
        backward = Spread.of(self.backward).median * 1e6 if self.backward else None
        return Spread.of(self.forward).median * 1e6, backward


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

    def groups(self) -> list[list[Result]]:
        """The results of each case, in the order they were measured."""
        found: dict[Case, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.case, []).append(result)
        return list(found.values())

    def write(self, path: Path) -> None:
        """Never a part of a file."""
        write_text(path, to_json({"schema": SCHEMA} | asdict(self), indent=1) + "\n")

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


def _result(entry: dict[str, Any]) -> Result:
    case = entry.pop("case")
    case["shape"] = tuple(case["shape"])
    result = Result(case=Case(**case), **entry)
    hash(result.case)
    if result.case.op not in OPS:
        raise ValueError(f"there is no operation {result.case.op!r}")
    if not all(isinstance(size, int) and size > 0 for size in result.case.shape):
        raise ValueError(f"{result.case.shape} is no shape")
    _check_times(result.rounds)
    return result


def _overhead(entry: dict[str, Any]) -> Overhead:
    overhead = Overhead(**entry)
    _check_times(overhead.forward)
    _check_times(overhead.backward)
    return overhead


def _check_times(times: Any) -> None:
    if not isinstance(times, list) or not all(isinstance(t, int | float) and 0 < t < math.inf for t in times):
        raise ValueError("a round is no time")


def new_record(device: str, command: Iterable[str]) -> Record:
    started = datetime.now(UTC).isoformat(timespec="seconds")
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
