"""What a call costs beside time: memory, kernel launches, host synchronisations."""

from __future__ import annotations

import gc
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import fdistill_ops as fd

from .clock import synchronize

Call = Callable[[], object]
_CALL = "a call to fdistill-bench"
_LAUNCH = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|LaunchCooperative)")


def extra_memory(calls: Sequence[Call], release: Callable[[], None], device: str) -> list[int]:
    """Most bytes in use at once during each call beyond those before it, the gradients it leaves included.

    ``release`` drops the gradients of earlier ones.
    """
    found: list[int] = []
    if torch.device(device).type == "cuda":
        for call in calls:
            release()
            gc.collect()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            call()
            synchronize(device)
            found.append(torch.cuda.max_memory_allocated(device) - before)
        return found
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for call in calls:
            release()
            gc.collect()
            fd.empty_cache()
            with record_function(_CALL):
                call()
            release()
            found.append(fd.empty_cache())  # what came from the pool of the C++ back end, which PyTorch does not see
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    spans = [(event.start_ns(), event.end_ns()) for event in events if event.name() == _CALL]
    for i, (start, end) in enumerate(spans):
        found[i] += max(itertools.accumulate((bytes_ for at, bytes_ in changes if start <= at <= end), initial=0))
    return found


def launches(call: Call) -> int:
    """Kernels and graphs that a call launches on a GPU."""
    torch.cuda.synchronize()
    with _quiet(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if _LAUNCH.match(event.key))


def host_synchronizations(call: Call) -> int:
    """How often a call makes the host wait for the GPU."""
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(previous)
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's library writes to the standard error stream whenever it starts and stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
