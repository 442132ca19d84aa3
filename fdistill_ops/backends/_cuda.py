"""The kernels of csrc/cuda as a back end, over either module that holds them: for GPUs, or emulated for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._call import LossCall, Operands
from ._compiled import DTYPES, Compiled, record
from ._functions import Gradients, Results
from ._shared import is_dense, lasting, mark_changed, opaque, plain, rows_are_dense, scaled

_MAX_DIMS = 9  # of x, beyond which a sample may have more dimensions than the kernels take (kDims in csrc/cuda)
_FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))


class _Memory:
    """What the kernels keep on a stream from call to call: counters, which every launch leaves at zero, and scratch."""

    __slots__ = ("counters", "record", "scratch")

    def __init__(self, counters: int, scratch: int, device: torch.device) -> None:
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)
        self.scratch = torch.empty(scratch, dtype=torch.uint8, device=device)
        self.record = (self.counters.data_ptr(), counters, self.scratch.data_ptr(), scratch)


_NOTHING = (0, 0, 0, 0)
# Returns what it lacks, counters and bytes of scratch, or None once it has run.
_Function = Callable[..., tuple[int, int] | None]


class Cuda(Compiled):
    """``name``: of the back end; ``native``: the module with the kernels; ``stream_of``: the stream in use on a device,
    as an integer; ``capturing``: whether that of the current device is being captured in a graph; ``exchange``: makes a
    device the current one and returns the one before; ``restore``: makes that one the current one again."""

    def __init__(
        self,
        name: str,
        native: Any,
        stream_of: Callable[[int], int],
        capturing: Callable[[], bool],
        exchange: Callable[[int], int],
        restore: Callable[[int], int],
    ) -> None:
        super().__init__(native.operands)
        self.name = name
        self._native, self._stream_of, self._capturing = native, stream_of, capturing
        self._exchange, self._restore = exchange, restore
        self._memory: dict[tuple[int, int], _Memory] = {}

    def _with_memory(self, function: _Function, device: torch.device, *arguments: Any) -> None:
        """Calls function(*arguments, memory, stream), on the device, with as much memory as it needs."""

        def run(stream: int) -> None:
            with_memory = self._with_fresh_memory if self._capturing() else self._with_kept_memory
            with_memory(function, device, stream, *arguments)

        self._on(device, run)

    def _on(self, device: torch.device, run: Callable[[int], None]) -> None:
        """Calls run(the stream in use on the device) while that is the current device."""
        index = device.index or 0
        before = self._exchange(index)
        try:
            run(self._stream_of(index))
        finally:
            if before != index:
                self._restore(before)

    def _with_fresh_memory(self, function: _Function, device: torch.device, stream: int, *arguments: Any) -> None:
        """A graph has memory of its own, cleared whenever it runs."""
        lacking = function(*arguments, _NOTHING, stream)
        if lacking is not None:
            memory = _Memory(*lacking, device)
            function(*arguments, memory.record, stream)

    def _with_kept_memory(self, function: _Function, device: torch.device, stream: int, *arguments: Any) -> None:
        key = (device.index or 0, stream)
        kept = self._memory.get(key)
        try:
            lacking = function(*arguments, _NOTHING if kept is None else kept.record, stream)
            if lacking is None:
                return
            counters, scratch = (max(1 << (n - 1).bit_length(), 4096) for n in lacking)
            if kept is not None:
                counters, scratch = max(counters, kept.record[1]), max(scratch, kept.record[3])
            kept = self._memory[key] = lasting(lambda: _Memory(counters, scratch, device), device)
            function(*arguments, kept.record, stream)
        except BaseException:
            self._memory.pop(key, None)  # the first of two launches may have counted there
            raise

    def run_loss(self, device: torch.device, *arguments: Any) -> None:
        self._with_memory(self._native.loss, device, *arguments)

    def run_weights(self, device: torch.device, arguments: Any, weights: int, ratio_stats: int) -> None:
        self._with_memory(self._native.f_weights, device, arguments, weights, ratio_stats)

    def run(self, call: LossCall, gradients: Gradients, weight_arguments: Any = None, scaled: bool = True) -> Results:
        operands = call.operands
        if operands.x.ndim <= _MAX_DIMS:
            return super().run(call, gradients, weight_arguments, scaled)
        # Copies whose dimensions merge. Rows of coefficients stay apart from what they cover.
        dense = Operands(*(v if v is None else v.contiguous() for v in operands))  # type: ignore[arg-type]
        targets = [None if g is None else torch.empty_like(g, memory_format=torch.contiguous_format) for g in gradients]
        results = super().run(call._replace(operands=dense), targets, weight_arguments, scaled)
        for gradient, target in zip(gradients, targets, strict=True):
            if gradient is not None and target is not None:
                gradient.copy_(target)
        return results

    def scale_gradient(self, gradient: Tensor, scale: Tensor | None, upstream: Tensor, keep: bool) -> Tensor:
        """A saved gradient times the incoming one (0-dimensional or [B]) and, in float16, its ``scale`` [B]: in place
        unless the graph is kept. The host does not wait for the factor: a kernel reads it and, where it is 1 and there
        is nothing to copy, nothing else."""
        if gradient.dtype is not torch.float16:
            scale = None
        if opaque(upstream):
            return scaled(gradient, upstream if scale is None else upstream * scale)
        per_sample = upstream.ndim == 1 or scale is not None
        gradient = plain(gradient, "gradient")
        in_order = rows_are_dense(gradient) or (not per_sample and is_dense(gradient))
        if not in_order or upstream.dtype not in _FLOATING:
            return scaled(gradient, upstream if scale is None else upstream * scale)
        batch = gradient.shape[0] if per_sample else 1
        out = torch.empty_like(gradient) if keep else gradient
        rows = batch, gradient.numel() // batch if batch else 0
        factors = record(upstream, "the incoming gradient"), record(scale, "scale")
        call = gradient.data_ptr(), out.data_ptr(), DTYPES[gradient.dtype], *rows, *factors
        self._on(gradient.device, lambda stream: self._native.scale_gradient(*call, stream))
        if not keep:
            mark_changed(gradient)
        return out

    def empty_cache(self) -> int:
        self._memory.clear()
        return 0
