"""What the calls are made of: tensors in unusual memory and of unusual types, and objects that are not what an argument
should be. The scripts that reproduce a finding hold the source of those they use, so that everything here needs PyTorch
alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------- values


def numbers(shape: Sequence[int], seed: int, scale: float = 1.0) -> Tensor:
    """Normally distributed, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def uniform(shape: Sequence[int], seed: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniformly distributed, float64."""
    random = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low + (high - low) * random


def put(tensor: Tensor, values: dict[int, float]) -> Tensor:
    """Some elements replaced, by their index in the flat tensor."""
    for index, value in values.items():
        tensor.view(-1)[index] = value
    return tensor


def attempt(call: Callable[[], Any]) -> Exception | None:
    """The exception of a call, or None."""
    try:
        call()
    except Exception as error:
        return error
    return None


# ------------------------------------------------------------------------------- memory: the same values lie elsewhere


def permuted(tensor: Tensor) -> Tensor:
    """Dimensions in the reverse order."""
    order = tuple(reversed(range(tensor.ndim)))
    return tensor.permute(order).contiguous().permute(order)


def swapped(tensor: Tensor) -> Tensor:
    """The last two dimensions transposed."""
    return tensor if tensor.ndim < 2 else tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def channels_last(tensor: Tensor) -> Tensor:
    if tensor.ndim not in (4, 5):
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


def sliced(tensor: Tensor) -> Tensor:
    """Part of a larger tensor along the first and the last dimension."""
    if tensor.ndim == 0:
        return tensor
    size = list(tensor.shape)
    for d in {0, tensor.ndim - 1}:
        size[d] += 2
    view = tensor.new_zeros(size)
    for d in {0, tensor.ndim - 1}:
        view = view.narrow(d, 1, tensor.shape[d])
    return view.copy_(tensor)


def stepped(tensor: Tensor) -> Tensor:
    """Every second element of the last dimension."""
    if tensor.ndim == 0:
        return tensor
    return tensor.new_zeros([*tensor.shape[:-1], 2 * tensor.shape[-1] + 1])[..., 1::2].copy_(tensor)


def rows_stepped(tensor: Tensor) -> Tensor:
    """Every second sample."""
    return tensor if tensor.ndim == 0 else tensor.new_zeros([2 * tensor.shape[0], *tensor.shape[1:]])[::2].copy_(tensor)


def offset(tensor: Tensor) -> Tensor:
    """One element into its storage: vector loads are unaligned."""
    return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def unaligned(tensor: Tensor) -> Tensor:
    """One byte into its memory."""
    if tensor.numel() == 0:
        return tensor
    memory = bytearray(tensor.numel() * tensor.itemsize + 1)
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape).copy_(tensor)


def chunked(tensor: Tensor) -> Tensor:
    """The second half of a stacked prediction."""
    return tensor if tensor.ndim == 0 else tensor.new_zeros([2, *tensor.shape])[1].copy_(tensor)


def odd_strides(tensor: Tensor) -> Tensor:
    """Dimensions of size 1, which have any stride there is."""
    odd = (0, 7, 2**40, 1)
    strides = [odd[d % 4] if size == 1 else tensor.stride(d) for d, size in enumerate(tensor.shape)]
    return tensor.as_strided(tensor.shape, strides)


def negated(tensor: Tensor) -> Tensor:
    """Lazily negated."""
    return torch._neg_view(-tensor)


def imaginary(tensor: Tensor) -> Tensor:
    """The imaginary part of a conjugate: lazily negated, every second element."""
    return torch.view_as_complex(torch.stack([tensor, -tensor], -1)).conj().imag


def real_part(tensor: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack([tensor, -tensor], -1)).conj().real


def diagonal(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 0 else torch.diag_embed(tensor).diagonal(dim1=-2, dim2=-1)


# --------------------------------------------------------------------------------------- memory: elements that share it


def expanded(tensor: Tensor) -> Tensor:
    """The first sample for all."""
    return tensor[:1].expand(tensor.shape) if tensor.ndim and tensor.shape[0] else tensor


def inner_expanded(tensor: Tensor) -> Tensor:
    """The first element of the last dimension for all."""
    return tensor[..., :1].expand(tensor.shape) if tensor.ndim and tensor.shape[-1] else tensor


def one_value(tensor: Tensor) -> Tensor:
    """One element for all: strides of 0."""
    return tensor.reshape(-1)[:1].reshape((1,) * tensor.ndim).expand(tensor.shape) if tensor.numel() else tensor


def windows(tensor: Tensor) -> Tensor:
    """Every sample begins one element after the one before."""
    if tensor.ndim < 2 or tensor.numel() == 0:
        return tensor
    return tensor.contiguous().as_strided(tensor.shape, (1, *tensor.contiguous().stride()[1:]))


def no_memory(tensor: Tensor) -> Tensor:
    """Zeros without an address, as automatic differentiation makes them."""
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


def no_memory_view(tensor: Tensor) -> Tensor:
    """The same as a view with an offset, whose address is not 0."""
    if tensor.ndim == 0:
        return tensor
    return torch._efficientzerotensor((tensor.shape[0] + 1, *tensor.shape[1:]), dtype=tensor.dtype)[1:]


# -------------------------------------------------------------------------------------------------------------- types


class Sub(torch.Tensor):
    """A subclass that adds nothing."""


def sub(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Sub)


def parameter(tensor: Tensor) -> Tensor:
    return torch.nn.Parameter(tensor, requires_grad=False)


def buffer(tensor: Tensor) -> Tensor:
    return torch.nn.Buffer(tensor)


def two(tensor: Tensor) -> Tensor:
    """A wrapper around two tensors, without memory of its own."""
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(tensor, tensor.clone())


def fake_tensor(tensor: Tensor) -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(tensor)


def functional(tensor: Tensor) -> Tensor:
    return torch._to_functional_tensor(tensor)


def masked(tensor: Tensor) -> Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.masked.masked_tensor(tensor, torch.ones(tensor.shape, dtype=torch.bool))


def made_in_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def uninitialized(tensor: Tensor) -> Tensor:
    return torch.nn.UninitializedParameter(dtype=tensor.dtype)


def sparse(tensor: Tensor) -> Tensor:
    return tensor.to_sparse()


def sparse_rows(tensor: Tensor) -> Tensor:
    return tensor.to_sparse_csr()


def sparse_columns(tensor: Tensor) -> Tensor:
    return tensor.to_sparse_csc()


def mkldnn(tensor: Tensor) -> Tensor:
    return tensor.float().to_mkldnn()


def nested(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor.float()), layout=torch.jagged)


def nested_strided(tensor: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(tensor.float()))


def quantized(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


# ------------------------------------------------------------------------------------------------------------ objects


HOSTILE = ("no number", "no index", "no comparison", "neither", "no conversion", "no order")
"""What the objects below say when they fail."""


class Anything:
    """Neither a number nor a tensor."""


class GoodFloat:
    """No number, but float() makes one of it."""

    def __float__(self) -> float:
        return 0.5


class BadFloat:
    """float() and operator.index() fail, not with a TypeError."""

    def __float__(self) -> float:
        raise ZeroDivisionError("no number")

    def __index__(self) -> int:
        raise KeyError("no index")


class BadEqual:
    """Cannot be compared, nor hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise LookupError("no comparison")


class BadClass:
    """Says that it is a float, and is none. (One whose ``__class__`` raises is not drawn: isinstance() passes that
    on.)"""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return float


class BadBool:
    """Neither true nor false."""

    def __bool__(self) -> bool:
        raise ArithmeticError("neither")


class FloatSubclass(float):
    """A float all the same."""


class IntSubclass(int):
    """An int all the same."""


class StrSubclass(str):
    """A string all the same."""


class HostileFloat(float):
    """A float that cannot be compared or converted."""

    def __float__(self) -> float:
        raise IndexError("no conversion")

    def __lt__(self, other: object) -> bool:
        raise AttributeError("no order")

    __le__ = __gt__ = __ge__ = __lt__  # type: ignore[assignment]


# ------------------------------------------------------------------------------------------------------------- threads


def crossed(first: str, second: str) -> tuple[list[str], list[str]]:
    """Two threads choose a back end each for a while; the one that began first also ends first. What each has seen
    within its own block, before and after the other one began or ended."""
    import threading

    import fdistill_ops as fd

    seen: tuple[list[str], list[str]] = ([], [])
    began, other_began, ended = threading.Event(), threading.Event(), threading.Event()

    def look(place: int) -> None:
        seen[place].append(fd.backends.choose(torch.device("cpu")))

    def run_first() -> None:
        with fd.use_backend(first):
            look(0)
            began.set()
            other_began.wait(10)
            look(0)
        ended.set()

    def run_second() -> None:
        began.wait(10)
        with fd.use_backend(second):
            look(1)
            other_began.set()
            ended.wait(10)
            look(1)

    threads = [threading.Thread(target=run) for run in (run_first, run_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen
