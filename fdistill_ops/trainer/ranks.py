"""Several processes, started by torchrun: each takes its part of every batch, and the gradients are averaged.

All ranks draw the same random numbers for the whole batch, so that the result does not depend on how many there are, up
to rounding. Without torchrun every function here is that of one process alone.
"""

from __future__ import annotations

import atexit
import gc
import inspect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if dist.is_available():
    import torch.distributed.nn.functional  # before any group: it keeps for ever the one there is when it is imported

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for another before the job ends
# No network here changes its buffers. PyTorch has renamed the argument.
_NAMES = {"broadcast_buffers", "forward_sync_buffers"} & inspect.signature(DistributedDataParallel).parameters.keys()
CONSTANT_BUFFERS: Any = {max(_NAMES): False}

_control: Any = None  # a group of all ranks for what is on the CPU, gloo


def requested() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: str) -> str:
    """The device of this process: with several on GPUs, the one of its local rank."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and requested() > 1 else device


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Within it the processes form a group: nccl for GPUs, gloo for CPUs.

    None of the group's threads outlives the process's last Python code: one that lets go of a tensor after it ends the
    process with SIGABRT. The threads end with the last reference to the group, so none may be left.
    """
    if requested() == 1:
        yield
        return
    global _control
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    _control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        _control = None
        dist.destroy_process_group()
        atexit.register(gc.collect)  # modules and the frames of an exception hold it too, in cycles


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def is_main() -> bool:
    """Whether this rank writes files and talks to the user."""
    return rank() == 0


def mine(whole: Tensor) -> Tensor:
    """This rank's part of a batch, whose size is a multiple of the number of ranks."""
    return whole if world() == 1 else whole.chunk(world())[rank()]


def parallel(module: nn.Module) -> nn.Module:
    """The module to train: it averages the gradients over the ranks in backward. Its state is ``module``'s."""
    return module if world() == 1 else DistributedDataParallel(module, **CONSTANT_BUFFERS)


def gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value, group=_control)
    return values


def largest(value: int) -> int:
    """The largest of the ranks' values; the GPU is not waited for."""
    if world() == 1:
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return int(found)


def from_main(value: Any) -> Any:
    """The main rank's value, on every rank."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_control)
    return values[0]


def combined(parts: list[dict[str, float]]) -> dict[str, float]:
    """Losses and statistics (LossStats by name) of the whole batch, from those of every rank's part of it."""
    whole = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name.endswith("_min"):
            whole[name] = min(values)
        elif name.endswith("_max"):
            whole[name] = max(values)
        elif name == "nonfinite":
            whole[name] = sum(values)
        elif name == "grad_norm":
            whole[name] = math.hypot(*values)
        elif name == "effective_sample_size":
            whole[name] = _effective_sample_size(parts)
        else:
            whole[name] = sum(values) / len(values)
    return whole


def _effective_sample_size(parts: list[dict[str, float]]) -> float:
    """(sum w)^2 / sum w^2. Of a part, sum w is in proportion to the mean, and sum w^2 is (sum w)^2 / ESS."""
    sums = [part["weight_mean"] for part in parts]
    squares = sum(
        total**2 / part["effective_sample_size"] if total else 0.0 for total, part in zip(sums, parts, strict=True)
    )
    return sum(sums) ** 2 / squares if squares else 0.0
