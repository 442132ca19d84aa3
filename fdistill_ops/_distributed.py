"""Sums over the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def ranks(group: Any) -> int:
    """How many ranks a process group has; 1 for None."""
    if group is None:
        return 1
    if not (torch.distributed.is_available() and isinstance(group, torch.distributed.ProcessGroup)):
        raise TypeError(f"group must be a process group that this process belongs to, got {group!r}")
    return torch.distributed.get_world_size(group)


def all_reduce(group: Any) -> Reduce:
    """The sum over the ranks of a process group; the identity for None and for a group of one."""
    if ranks(group) == 1:
        return lambda packed: packed

    def reduce(packed: Tensor) -> Tensor:
        torch.distributed.all_reduce(packed, group=group)
        return packed

    return reduce
