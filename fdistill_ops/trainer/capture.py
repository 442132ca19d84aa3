"""CUDA graphs of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CapturedUpdate:
    """A function of a named tuple of tensors and a number, captured as a CUDA graph for each number: afterwards it is
    one launch from the host.

    The first calls run as they are, on a stream of their own, as a capture needs; they are updates like any other.
    """

    WARM_UP = 3

    def __init__(self, function: Callable[[Any, int], Any]) -> None:
        self.function = function
        self.calls: dict[int, int] = {}
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Any, Any]] = {}

    def __call__(self, values: Any, number: int) -> Any:
        self.calls[number] = self.calls.get(number, 0) + 1
        if self.calls[number] <= self.WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = self.function(values, number)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if number not in self.graphs:
            graph, inputs = torch.cuda.CUDAGraph(), type(values)(*(value.clone() for value in values))
            with torch.cuda.graph(graph):
                result = self.function(inputs, number)
            self.graphs[number] = graph, inputs, result
        graph, inputs, result = self.graphs[number]
        for kept, value in zip(inputs, values, strict=True):
            kept.copy_(value)
        graph.replay()
        return result
