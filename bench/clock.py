"""Timing on a CPU and on a GPU, and the statistics of rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

Step = Callable[[int], object]
"""One call, on the set of inputs with that index."""


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(step: Step, settle: Sequence[int], calls: Sequence[int], device: str) -> float:
    """Mean time of step(i) over the calls, after the untimed ones of ``settle``: what a call finds is then what its
    like left behind, in the caches, the predictors and the allocators, as in a training loop."""
    for i in settle:
        step(i)
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        for i in calls:
            step(i)
        return (time.perf_counter() - start) / len(calls)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    before.record()
    for i in calls:
        step(i)
    after.record()
    after.synchronize()
    return before.elapsed_time(after) * 1e-3 / len(calls)


def cache_bytes(device: str) -> int:
    """The largest cache of the device; 32 MiB where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        found = max(found, int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]] if text[-1] in "KM" else 0)
    return found or 32 << 20


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """The distance of the quartiles, relative to the median."""
        return (self.high - self.low) / self.median

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        levels = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(levels).tolist())
