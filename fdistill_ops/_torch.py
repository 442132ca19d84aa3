"""Every private or version-dependent name of PyTorch that the package uses: none is used anywhere else.

Each is looked up once, at import, and stays PyTorch's own function: a call pays nothing for the indirection. The
oldest version that a name was looked for in is 2.4.1, the newest 2.14.1. What is gone in some version has its
replacement here, and docs/versions.md says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph
from torch.utils import _pytree

OLDEST = (2, 4)


def _at(owner: Any, path: str) -> Any:
    """The attribute behind this path; None without one."""
    return reduce(lambda found, name: getattr(found, name, None), path.split("."), owner)


def _needed(path: str, owner: Any = torch, called: str = "torch") -> Any:
    """The attribute behind this path.

    Raises:
        ImportError: this PyTorch has none.
    """
    found = _at(owner, path)
    if found is None:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"fdistill_ops needs PyTorch {oldest} or newer, as far as its names have stayed: torch {torch.__version__} "
            f"has no {called}.{path}"
        )
    return found


# Operators. Both came with 2.4: nothing older will do.
register_fake: Callable[..., Any] = _needed("library.register_fake")
register_autograd: Callable[..., Any] = _needed("library.register_autograd")

# What is going on around a call. All three are in 2.4.
dispatch_modes: Callable[[], int] = _needed("_C._len_torch_dispatch_stack")
functorch_level: Callable[[], Any] = _needed("_C._functorch.peek_interpreter_stack")
DERIVATIVES = (_needed("_C._functorch.TransformType.Grad"), _needed("_C._functorch.TransformType.Jvp"))
DUAL_LEVEL = "_current_level"
"""The attribute of torch.autograd.forward_ad that is at least 0 within its dual_level(). In 2.4."""


def _always() -> bool:
    return True


keep_graph: Callable[[], bool] = _at(torch._C, "_autograd._get_current_graph_task_keep_graph") or _always
"""In backward: whether the graph is kept. Not in 2.4.1: every backward then counts as one that keeps it, and returns a
gradient of its own in place of the saved one."""
KNOWS_KEPT_GRAPHS = keep_graph is not _always


def unwrapped_apply(function: Any) -> Any:
    """function.apply of a torch.autograd.Function, without its search for functorch's wrappers. In 2.4."""
    return super(torch.autograd.Function, function).apply


# What a tensor is. All of them are in 2.4.
is_functional: Callable[[Tensor], bool] = _needed("_is_functional_tensor")
is_zero: Callable[[Tensor], bool] = _needed("_is_zerotensor")
"""Whether it is a zero without memory, as automatic differentiation makes them."""
is_batched: Callable[[Tensor], bool] = _needed("_C._functorch.is_batchedtensor")
is_legacy_batched: Callable[[Tensor], bool] = _at(torch._C, "_functorch.is_legacy_batchedtensor") or (lambda _: False)
is_lazy: Callable[[Any], bool] = _needed("nn.parameter.is_lazy")
TAKES_REAL_ONES = "allow_non_fake_inputs"
"""The attribute of a FakeTensorMode. In 2.4."""

# Memory and streams. All of them are in 2.4; the last four are in builds with CUDA or ROCm alone.
from_dlpack: Callable[[Any], Tensor] = _needed("_C._from_dlpack")
"""torch.from_dlpack without its search for the device of what it is given, which is a capsule here."""
increment_version: Callable[[Tensor], None] = _needed("increment_version", graph, "torch.autograd.graph")
raw_stream: Callable[[int], int] | None = _at(torch._C, "_cuda_getCurrentRawStream")
capturing: Callable[[], bool] | None = _at(torch._C, "_cuda_isCurrentStreamCapturing")
exchange_device: Callable[[int], int] | None = _at(torch._C, "_cuda_exchangeDevice")
"""Makes a device the current one and returns the one before."""
restore_device: Callable[[int], int] | None = _at(torch._C, "_cuda_maybeExchangeDevice")
"""Makes that one the current one again, unless it has no context yet: a context takes memory."""

# Averages of many tensors, in the trainer. In 2.4.
foreach_lerp_: Callable[..., None] = _needed("_foreach_lerp_")

# Tensors of types of our own, in the integrations. All of them are in 2.4.
make_wrapper_subclass: Callable[..., Any] = _needed("Tensor._make_wrapper_subclass")
make_subclass: Callable[..., Any] = _needed("Tensor._make_subclass")
tree_map_only: Callable[..., Any] = _needed("tree_map_only", _pytree, "torch.utils._pytree")
