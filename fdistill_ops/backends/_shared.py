"""What the back ends do alike with tensors, before and after their kernels."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from .._torch import increment_version, is_batched, is_legacy_batched, is_zero
from .._validation import PLAIN_TYPES, has_memory, without_memory

T = TypeVar("T")


def lasting(allocate: Callable[[], T], device: torch.device) -> T:
    """What allocate() makes on the current stream of the device, to be kept from call to call. A thread of its own
    allocates it: what this one allocates may go to a pool that torch.compile's CUDA graphs, say, check for tensors that
    stay."""
    if device.type == "cpu":
        return allocate()
    stream = torch.cuda.current_stream(device)

    def on_stream() -> T:
        with torch.cuda.stream(stream):
            return allocate()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_stream).result()


def plain(tensor: Tensor, name: str) -> Tensor:
    """The tensor with its values in memory: not negated lazily, not a zero without memory, as automatic
    differentiation makes them.

    Raises:
        TypeError: it has no memory, such as a functional tensor outside the transform that made it.
    """
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if not has_memory(tensor) and (tensor.numel() > 0 or is_zero(tensor)):
        tensor = tensor.clone()
        if not has_memory(tensor) and tensor.numel() > 0:
            raise without_memory(name)
    return tensor


def mark_changed(tensor: Tensor) -> None:
    """Tells PyTorch, which has not seen it, that a kernel has changed the tensor: a second backward that would read it
    is then refused, as after any operation in place."""
    if not tensor.is_inference():
        increment_version(tensor)


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in whatever order (channels_last, say)."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def rows_are_dense(x: Tensor) -> bool:
    """Whether the samples lie one after the other, without gaps, each in whatever order."""
    if x.is_contiguous():
        return True
    return is_dense(x) and (x.shape[0] <= 1 or x.stride(0) * x.shape[0] == x.numel())


def histogram_buffers(bins: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The histogram as the kernels read it, float32 and dense, and memory for the new one."""
    if bins is None:
        return None, None
    bins = plain(bins, "histogram.bins")
    bins = bins if bins.dtype == torch.float32 and bins.is_contiguous() else bins.float().contiguous()
    return bins, torch.empty_like(bins)


def in_dtype_of(bins: Tensor | None, new_bins: Tensor | None) -> Tensor | None:
    """The new histogram in the dtype that the old one came in."""
    if bins is None or new_bins is None or bins.dtype == new_bins.dtype:
        return new_bins
    return new_bins.double().clamp(max=torch.finfo(bins.dtype).max).to(bins.dtype)


def opaque(factor: Tensor) -> bool:
    """Whether an incoming gradient stands for something that PyTorch's own operations alone know: several at once
    (vmap), or a tensor of another type."""
    return is_batched(factor) or is_legacy_batched(factor) or type(factor) not in PLAIN_TYPES


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """A new tensor: gradient times factor, which is 0-dimensional or [B]."""
    return (gradient * factor.reshape(factor.shape + (1,) * (gradient.ndim - factor.ndim))).to(gradient.dtype)
