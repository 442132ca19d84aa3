"""CUDA graphs of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CapturedUpdate:
    """A function of a named tuple of tensors, captured as a CUDA graph: afterwards it is one launch from the host.

    The first calls run as they are, on a stream of their own, as a capture needs; they are updates like any other.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.calls = function, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, values: Any) -> Any:
        self.calls += 1
        if self.calls <= self.WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = self.function(values)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.inputs = type(values)(*(value.clone() for value in values))
            with torch.cuda.graph(self.graph):
                self.result = self.function(self.inputs)
        for kept, value in zip(self.inputs, values, strict=True):
            kept.copy_(value)
        self.graph.replay()
        return self.result
