"""Tensors for log dictionaries that nobody may ever read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import make_wrapper_subclass, tree_map_only

# What a Deferred answers by itself.
_METADATA = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad_fn", "is_cuda")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.detach}


def when_read(compute: Callable[[], Tensor], shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A :class:`Deferred`; under torch.compile and torch.export, which cannot put it off, the elements themselves."""
    return compute() if torch.compiler.is_compiling() else Deferred(compute, shape, dtype, device)


class Deferred(Tensor):
    """A tensor whose elements are computed when the first operation reads them: until then it
    costs no launch and no memory of its own (what ``compute`` holds it keeps alive).

    Args:
        compute: returns the elements: a tensor of the given shape and dtype on the device, that requires no gradient.
        shape, dtype, device: what it is to look like.
    """

    _compute: Callable[[], Tensor] | None
    _value: Tensor | None

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], shape: Any, dtype: torch.dtype, device: torch.device) -> Deferred:
        return make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)

    def __init__(self, compute: Callable[[], Tensor], shape: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._compute, self._value = compute, None

    @property
    def computed(self) -> bool:
        """Whether somebody has read it."""
        return self._compute is None

    def value(self) -> Tensor:
        """The elements as an ordinary tensor."""
        if self._compute is not None:
            self._value = self._compute()
            self._compute = None  # and what it held
        assert self._value is not None
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            if func is Tensor.detach:
                return args[0]
            return super().__torch_function__(func, types, args, kwargs or {})
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For operations that C++ starts, such as collectives."""
        args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
        return func(*args, **kwargs)
