"""Timing on a CPU and on a GPU, and the statistics of rounds."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

Step = Callable[[int], Any]
"""One call, on the set of inputs with that index."""
LEVEL = 0.95
"""Of the intervals of medians."""


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def load_average(before: float | None = None) -> float | None:
    """Of the last minute, for each core, or that of before where it is larger; None where the system does not say."""
    if not hasattr(os, "getloadavg"):
        return None
    return max(before or 0.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def seconds_per_call(
    forward: Step, backward: Callable[[Any], object] | None, settle: Sequence[int], calls: Sequence[int], device: str
) -> tuple[float, float | None]:
    """Mean seconds of a call, and of the part of it in ``forward(i)`` where ``backward(value)`` follows. The calls of
    ``settle`` come first, untimed: what a call finds is then what its like left behind, in the caches, the predictors
    and the allocators, as in a training loop."""

    def run(calls: Sequence[int], mark: Callable[[], Any]) -> list[Any]:
        """A mark before the first call and after each part of every call."""
        marks = [mark()]
        for i in calls:
            value = forward(i)
            if backward is not None:
                marks.append(mark())
                backward(value)
                del value  # what that frees belongs to this step
                marks.append(mark())
        return marks

    run(settle, float)
    if torch.device(device).type != "cuda":
        marks = run(calls, time.perf_counter)
        seconds = time.perf_counter() - marks[0]
        share = sum(marks[1::2]) - sum(marks[:-1:2])
        return seconds / len(calls), None if backward is None else share / len(calls)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def event() -> torch.cuda.Event:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        return events[-1]

    synchronize(device)
    events[0].record()
    run(calls, float)  # without events between the kernels, each of which takes the host a moment
    events[1].record()
    synchronize(device)
    seconds = events[0].elapsed_time(events[1]) * 1e-3 / len(calls)
    if backward is None:
        return seconds, None
    marks = run(calls[:50], event)
    synchronize(device)
    parts = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return seconds, seconds * sum(parts[::2]) / sum(parts)


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
    """Of the values of rounds: their median, an interval for it, and how far the quartiles are apart, relative to it.

    The interval is between two of the values, and has the median of all possible rounds within it with a probability
    of LEVEL, whatever their distribution; of fewer than six, which cannot say so much, it holds all.
    """

    median: float
    low: float
    high: float
    relative: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        first, median, third = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        ordered, out = sorted(values), _outside(len(values))
        return cls(median, ordered[out], ordered[-1 - out], (third - first) / median)


@functools.cache
def _outside(count: int) -> int:
    """How many of the least values, and of the greatest, lie outside of the interval: each of them is on one side of
    the median of all with a chance of a half."""
    out, ways, total = 0, 1, 1  # to have at most ``out`` of the values below
    while total / 2**count <= (1 - LEVEL) / 2:
        out += 1
        ways = ways * (count - out + 1) // out
        total += ways
    return max(out - 1, 0)
