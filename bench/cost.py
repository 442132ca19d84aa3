"""What a step costs beside time: memory, kernel launches, host synchronisations."""

from __future__ import annotations

import gc
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

import fdistill_ops as fd

from .clock import Step, synchronize

_LAUNCH = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|LaunchCooperative)")


def extra_memory(step: Step, release: Callable[[], None], device: str) -> int:
    """Most bytes in use at once during a step beyond those before it, the gradients it leaves included.

    ``release`` drops the gradients of earlier steps.
    """
    release()
    gc.collect()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step(0)
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    fd.empty_cache()
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(0)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    release()
    return most + fd.empty_cache()  # what came from the pool of the C++ back end, which PyTorch does not see


def launches(step: Step) -> int:
    """Kernels and graphs that a step launches on a GPU."""
    torch.cuda.synchronize()
    with _quiet(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(0)
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if _LAUNCH.match(event.key))


def host_synchronizations(step: Step) -> int:
    """How often a step makes the host wait for the GPU."""
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(0)
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
