"""Where a kernel that numbers a sample's elements 0 to N - 1 finds them, whatever the strides (kernels/memory.py)."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

Strides = tuple[int, ...]
MAX_DIMS = 3


class Layout(NamedTuple):
    """Sizes of the two inner dimensions, and each operand's strides: (sample,) where a sample is dense (or, for a row
    operand, constant), else (sample, d1, d2, d3); None for an absent operand."""

    inner: tuple[int, int]
    strides: tuple[Strides | None, ...]


@functools.lru_cache(maxsize=4096)
def plan(shape: tuple[int, ...], leader: Strides, operands: tuple[Strides | None, ...], n_rows: int) -> Layout | None:
    """None where it takes more than three dimensions. ``leader``: strides that give the order of the elements; the last
    ``n_rows`` operands are rows, with a stride for each leading dimension they have."""
    n_operands = len(operands)
    merged: list[tuple[int, tuple[int, ...]]] = []
    empty = 0 in shape  # where there are no elements, any layout does
    for d in sorted(range(1, len(shape)), key=lambda d: -leader[d]):
        if shape[d] == 1 or empty:
            continue
        here = tuple(strides[d] if strides is not None and d < len(strides) else 0 for strides in operands)
        if merged and all(outer == inner * shape[d] for outer, inner in zip(merged[-1][1], here, strict=True)):
            merged[-1] = (merged[-1][0] * shape[d], here)
        else:
            merged.append((shape[d], here))
    if len(merged) > MAX_DIMS:
        return None
    merged = [(1, (0,) * n_operands)] * (MAX_DIMS - len(merged)) + merged
    sizes = [size for size, _ in merged]
    result: list[Strides | None] = []
    for i, strides in enumerate(operands):
        if strides is None:
            result.append(None)
            continue
        sample = strides[0] if strides else 0
        inner = tuple(column[i] for _, column in merged)
        is_row = i >= n_operands - n_rows
        dense = all(
            size == 1 or stride == (0 if is_row else math.prod(sizes[k + 1 :]))
            for k, (size, stride) in enumerate(zip(sizes, inner, strict=True))
        )
        result.append((sample,) if dense else (sample, *inner))
    return Layout((sizes[1], sizes[2]), tuple(result))
