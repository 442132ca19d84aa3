"""Property tests for kernels of your own, against :mod:`fdistill_ops.reference`.

Hypothesis strategies for whole sets of loss arguments (shapes, dtypes, layouts, masks, logits that misbehave),
comparisons whose tolerance is derived from the arithmetic instead of chosen, and :func:`poison`, which makes unwritten
outputs show::

    @hypothesis.given(fd.testing.loss_arguments(only={"weight", "mask"}))
    def test_mine(arguments):
        x = arguments["x"]
        expected = fd.reference.distribution_matching_loss(**arguments)
        (wanted,) = torch.autograd.grad(expected, x)
        with fd.testing.poison():
            actual = my_loss(**arguments)  # takes x, teacher, fake, and a weight and a mask or None
            (gradient,) = torch.autograd.grad(actual, x)
        fd.testing.assert_close(actual, expected, ulps=4, terms=x.numel())
        fd.testing.assert_gradient_close(gradient, wanted, roundings=2)

Hypothesis is imported when a strategy is asked for, not with this module.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "GradientErrors",
    "assert_close",
    "assert_gradient_close",
    "dtypes",
    "gradient_errors",
    "lay_out",
    "layouts",
    "logits",
    "loss_arguments",
    "masks",
    "poison",
    "shapes",
    "tensors",
    "times",
    "ulp",
    "unit_roundoff",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "permuted", "channels_last", "sliced", "stepped", "offset", "chunk", "expanded")


# ------------------------------------------------------------------------------------------------------------- poison

_ALLOCATORS = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.empty_permuted,
        Tensor.new_empty,
        Tensor.new_empty_strided,
    }
)


class _Poison(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return _poisoned(result) if func in _ALLOCATORS and isinstance(result, Tensor) else result


def _poisoned(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return tensor
    with torch.no_grad():
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.fill_(math.nan)
        if tensor.dtype is torch.bool:
            return tensor.fill_(True)
        try:
            return tensor.fill_(torch.iinfo(tensor.dtype).max)
        except TypeError:  # of less than a byte, or quantized: nothing can be written
            return tensor


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Within it, freshly allocated memory is NaN (the largest value, for integers): an element that a kernel forgot to
    write shows. Covers torch.empty, empty_like, empty_strided, empty_permuted and the new_empty methods, on this
    thread, however they were imported."""
    with _Poison():
        yield


# -------------------------------------------------------------------------------------------------------- comparisons


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to that dtype: 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of that dtype at each value's magnitude (float64); the smallest subnormal's
    where the value is subnormal there."""
    info = torch.finfo(dtype)
    magnitude = value.detach().double().abs().nan_to_num(nan=0.0, posinf=info.max).clamp(info.tiny, info.max)
    _, exponent = torch.frexp(magnitude)
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent - 1)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    ulps: float = 0.5,
    terms: int = 1,
    noise: Tensor | float = 0.0,
    what: str = "result",
) -> None:
    """Asserts that every element of ``actual`` is ``expected`` up to rounding::

        |actual - expected| <= ulps * ulp(expected, actual.dtype) + (sqrt(terms) - 1) * u * |expected| + noise

    Args:
        actual: the result, in the dtype it came in; that dtype's spacing is the ulp.
        expected: the truth, in any dtype; compared in float64. ``actual`` must have its NaNs and infinities there too.
        ulps: final rounding: 0.5 for one correct rounding, one more half for each further rounding.
        terms: length of the sums behind an element, whose error grows with its square root at the accumulation's u:
            2^-24, or 2^-53 for a float64 result.
        noise: what else is allowed, absolutely: the propagated rounding of intermediate steps.
        what: named in the message.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return
    error, allowed, share = errors_and_tolerances(actual, expected, ulps=ulps, terms=terms, noise=noise)
    bad = (share > 1).reshape(-1)
    if not bool(bad.any()):
        return
    worst = int(torch.where(bad, share.reshape(-1), -1.0).argmax())
    raise AssertionError(
        f"{what}: {int(bad.sum())} of {bad.numel()} elements are off; at {_where(worst, actual.shape)} got "
        f"{float(actual.reshape(-1)[worst])!r}, expected {float(expected.reshape(-1)[worst])!r} ({actual.dtype}), "
        f"error {float(error.reshape(-1)[worst]):.4g}, allowed {float(allowed.reshape(-1)[worst]):.4g}"
    )


def errors_and_tolerances(
    actual: Tensor, expected: Tensor, *, ulps: float, terms: int, noise: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each element the error, what :func:`assert_close` allows, and the one in units of the other (float64; infinite
    where one is finite and the other is not)."""
    dtype = actual.dtype
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    extra = noise.detach().double().cpu() if isinstance(noise, Tensor) else torch.tensor(float(noise)).double()
    u = unit_roundoff(torch.float64 if dtype is torch.float64 else torch.float32)
    allowed = (
        ulps * ulp(want, dtype)
        + ((math.sqrt(terms) - 1) * u) * want.abs().nan_to_num(posinf=0.0)
        + extra.nan_to_num(nan=math.inf)
    ).expand_as(got)
    largest = torch.finfo(dtype).max
    overflow = got.isinf() & (want.abs() + allowed >= largest) & (got.sign() == want.sign())
    same = (got == want) | (got.isnan() & want.isnan()) | overflow | (allowed.isinf() & want.isfinite())
    error = torch.where(same, 0.0, (got - want).abs())
    return error, allowed, torch.where(same, 0.0, (error / allowed).nan_to_num(nan=math.inf, posinf=math.inf))


def _where(flat: int, shape: torch.Size) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return tuple(reversed(index))


@dataclass(frozen=True)
class GradientErrors:
    """How far one gradient is from another as a whole.

    Attributes:
        relative_l2: L2 norm of the error over the L2 norm of the expected gradient.
        cosine: cosine of the angle between the two.
        bias: component of the error along the expected gradient, relative: a gradient that is systematically 1% too
            long has a bias of 0.01, while independent roundings cancel in it.
    """

    relative_l2: float
    cosine: float
    bias: float


def gradient_errors(actual: Tensor, expected: Tensor) -> GradientErrors:
    """Relative L2 error, cosine and signed bias, in float64. Both zero counts as equal."""
    got, want = actual.detach().double().reshape(-1), expected.detach().double().reshape(-1)
    norm, length = float(want.norm()), float(got.norm())
    if norm == 0.0:
        return GradientErrors(0.0 if length == 0.0 else math.inf, 1.0 if length == 0.0 else 0.0, 0.0)
    error = got - want
    cosine = float(got @ want) / (norm * length) if length else 0.0
    return GradientErrors(float(error.norm()) / norm, cosine, float(error @ want) / norm**2)


def assert_gradient_close(actual: Tensor, expected: Tensor, *, roundings: float = 1.0, what: str = "gradient") -> None:
    """Asserts that a gradient as a whole is the expected one up to ``roundings`` roundings to its dtype (plus a few in
    the arithmetic of the losses, float32 or float64): relative L2 error at most roundings * u, 1 - cosine at most its
    square, and a bias that shrinks with the square root of the number of distinct elements, as independent roundings'
    does. Elements that are not finite must be the same in both, and count nothing."""
    dtype = actual.dtype
    work = unit_roundoff(torch.float64 if dtype is torch.float64 else torch.float32)
    got, want = _finite_parts(actual.detach().double().cpu(), expected.detach().double().cpu(), dtype, what)
    norm = float(want.norm())
    # One rounding errs by at most u relative, and by half the smallest subnormal where the value is subnormal.
    info = torch.finfo(dtype)
    rounding = (want.abs() * unit_roundoff(dtype)).clamp(min=info.smallest_normal * info.eps / 2)
    share = float(rounding[want != 0].norm()) / norm if norm else 0.0
    arithmetic = (4 + math.sqrt(math.log2(max(want.numel(), 1)) + 1)) * work
    bound = roundings * share + arithmetic
    # The common factor (normaliser, weight, count) errs for all alike; independent roundings average out: six standard
    # deviations of their mean, weighted by the gradient. Equal values are rounded alike.
    values, group = want.abs().reshape(-1).unique(return_inverse=True)
    shares = torch.zeros_like(values).index_add_(0, group, (rounding * want.abs()).reshape(-1))
    independent = float(shares.norm()) / norm**2 if norm else 0.0
    errors = gradient_errors(got, want)
    slack = 4 * torch.finfo(torch.float64).eps
    for name, value, limit in (
        ("relative L2 error", errors.relative_l2, bound),
        ("1 - cosine", 1 - errors.cosine, bound**2 + slack),
        ("bias", abs(errors.bias), 6 * roundings * independent + arithmetic + bound**2),
    ):
        assert value <= limit, f"{what}: {name} is {value:.4g}, allowed {limit:.4g} ({errors})"


def _finite_parts(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> tuple[Tensor, Tensor]:
    """Both with zeros where one of them is not finite: there they must agree, up to one rounding at the end of the
    range."""
    info = torch.finfo(dtype)
    bad = ~(got.isfinite() & want.isfinite())
    beyond = (got.abs() >= info.max * (1 - info.eps)) & (want.abs() >= info.max * (1 - info.eps))
    same = (got.isnan() & want.isnan()) | (beyond & (got.sign() == want.sign()))
    assert bool(same[bad].all()), f"{what}: {int((bad & ~same).sum())} of {bad.numel()} elements differ in being finite"
    return torch.where(bad, 0.0, got), torch.where(bad, 0.0, want)


# ------------------------------------------------------------------------------------------------------------ layouts


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same shape and dtype in another memory layout, and the same values (except ``"expanded"``).

    Args:
        layout: ``"contiguous"``; ``"permuted"`` (dimensions reversed in memory); ``"channels_last"`` (4 and 5
            dimensions; contiguous elsewhere); ``"sliced"`` (part of a larger tensor along every dimension);
            ``"stepped"`` (every second element of the last dimension); ``"offset"`` (contiguous, one element into its
            storage, so that vector loads are unaligned); ``"chunk"`` (the second half of a stacked prediction, as
            ``chunk(2)`` gives); ``"expanded"`` (the first sample for all, stride 0).
    """
    shape = tensor.shape
    if layout == "contiguous" or tensor.ndim == 0:
        return tensor.contiguous()
    if layout == "permuted":
        order = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "channels_last":
        if tensor.ndim not in (4, 5):
            return tensor.contiguous()
        return tensor.contiguous(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":
        buffer = tensor.new_zeros([size + 2 for size in shape])
        view = buffer[tuple(slice(1, size + 1) for size in shape)]
    elif layout == "stepped":
        buffer = tensor.new_zeros([*shape[:-1], 2 * shape[-1] + 1])
        view = buffer[..., 1::2][..., : shape[-1]]
    elif layout == "offset":
        view = tensor.new_zeros(tensor.numel() + 1)[1:].view(shape)
    elif layout == "chunk":
        view = tensor.new_zeros([2 * shape[0], *shape[1:]]).chunk(2)[1] if shape[0] else tensor.contiguous()
    elif layout == "expanded":
        return tensor[:1].contiguous().expand(shape) if shape[0] else tensor.contiguous()
    else:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}")
    return view.copy_(tensor)


# --------------------------------------------------------------------------------------------------------- strategies


def shapes(
    *, min_dims: int = 1, max_dims: int = 5, max_side: int = 9, empty: bool = True
) -> SearchStrategy[tuple[int, ...]]:
    """Shapes [B, ...], sides of 0 among them unless ``empty`` is False. Sides around powers of two come up often."""
    from hypothesis import strategies as st

    low = 0 if empty else 1
    side = st.integers(low, max_side) | st.sampled_from(
        [n for n in (1, 2, 3, 4, 7, 8, 15, 16, 17, 33) if n <= max_side]
    )
    return st.lists(side, min_size=min_dims, max_size=max_dims).map(tuple)


def dtypes(*, low_precision: bool = True) -> SearchStrategy[torch.dtype]:
    """float32, float64 and, unless ``low_precision`` is False, bfloat16 and float16."""
    from hypothesis import strategies as st

    return st.sampled_from(DTYPES if low_precision else (torch.float32, torch.float64))


def layouts() -> SearchStrategy[str]:
    """A name that :func:`lay_out` knows."""
    from hypothesis import strategies as st

    return st.sampled_from(LAYOUTS)


def tensors(
    shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    layout: str | None = None,
    scales: Sequence[float] = (1.0, 1e-3, 30.0),
    nonfinite: bool = False,
    device: torch.device | str = "cpu",
) -> SearchStrategy[Tensor]:
    """Normally distributed tensors of that shape, of one of ``scales``.

    Args:
        dtype, layout: drawn where None.
        nonfinite: some elements are NaN or infinite.
    """
    from hypothesis import strategies as st

    @st.composite
    def build(draw: DrawFn) -> Tensor:
        chosen_dtype = draw(dtypes()) if dtype is None else dtype
        chosen_layout = draw(layouts()) if layout is None else layout
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        scale = draw(st.sampled_from(tuple(scales)))
        value = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale
        if nonfinite and value.numel():
            for _ in range(draw(st.integers(0, 2))):
                index = draw(st.integers(0, value.numel() - 1))
                value.view(-1)[index] = draw(st.sampled_from((math.nan, math.inf, -math.inf)))
        return lay_out(value.to(chosen_dtype).to(device), chosen_layout)

    return build()


def masks(shape: Sequence[int], *, device: torch.device | str = "cpu") -> SearchStrategy[Tensor | None]:
    """None, or a bool mask of that shape: all, none, one element, whole samples, random; expanded ones among them."""
    from hypothesis import strategies as st

    size = tuple(shape)

    @st.composite
    def build(draw: DrawFn) -> Tensor | None:
        kind = draw(st.sampled_from(("none", "all", "empty", "random", "samples", "rows", "one")))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        if kind == "none":
            return None
        if kind == "samples":
            row = torch.rand(size[:1] + (1,) * (len(size) - 1), generator=generator) < 0.5
            return row.to(device).expand(size)
        if kind == "rows":
            row = torch.rand((*size[:2], *(1,) * (len(size) - 2)), generator=generator) < 0.5
            return row.to(device).expand(size)
        mask = torch.rand(size, generator=generator) < {"all": 2.0, "random": 0.5}.get(kind, -1.0)
        if kind == "one" and mask.numel():
            mask.view(-1)[draw(st.integers(0, mask.numel() - 1))] = True
        return lay_out(mask.to(device), draw(st.sampled_from(("contiguous", "permuted", "stepped", "offset"))))

    return build()


def logits(
    batch: int, *, dtype: torch.dtype | None = None, nonfinite: bool = True, device: torch.device | str = "cpu"
) -> SearchStrategy[Tensor]:
    """Discriminator logits [B] or [B, K]: ordinary ones, ones far outside every clip and, unless ``nonfinite`` is
    False, NaNs and infinities."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: DrawFn) -> Tensor:
        heads = draw(st.sampled_from((None, 1, 2, 5)))
        shape = (batch,) if heads is None else (batch, heads)
        value = draw(tensors(shape, dtype=torch.float64, layout="contiguous", scales=(0.0, 0.1, 2.0, 10.0, 1000.0)))
        bad = (math.nan, math.inf, -math.inf) if nonfinite else ()
        for _ in range(draw(st.integers(0, 3)) if value.numel() else 0):
            index = draw(st.integers(0, value.numel() - 1))
            value.view(-1)[index] = draw(st.sampled_from((0.0, -0.0, 88.8, -104.0, 3e4, -3e4, 1e-30, *bad)))
        result = value.to(draw(dtypes()) if dtype is None else dtype).to(device)
        return lay_out(result, draw(st.sampled_from(("contiguous", "permuted", "stepped", "offset"))))

    return build()


def times(
    batch: int,
    min_t: float,
    max_t: float,
    *,
    nonfinite: bool = True,
    device: torch.device | str = "cpu",
) -> SearchStrategy[Tensor]:
    """t [B], float64 or float32: inside the range, on its ends, outside it and, unless ``nonfinite`` is False, NaN."""
    from hypothesis import strategies as st

    width = max_t - min_t
    inside = st.floats(0.0, 1.0, width=32).map(lambda part: min_t + part * width)
    special = [min_t, max_t, min_t - width, max_t + 1e6 * width, *([math.nan] if nonfinite else [])]
    one = st.one_of(inside, inside, st.sampled_from(special))
    return st.builds(
        lambda values, dtype: torch.tensor(values, dtype=dtype, device=device),
        st.lists(one, min_size=batch, max_size=batch),
        st.sampled_from((torch.float64, torch.float32)),
    )


# Arguments that are drawn together: naming one is naming the others.
_TOGETHER = (
    {"teacher_uncond", "guidance_scale"},
    {"prediction", "x_t", "alpha", "sigma"},
    {"logit_clip", "ratio_clip"},
)
_OF_LOSSES = {"weight", "mask", "normalizer", "eps", "nonfinite", "reduction", *_TOGETHER[0], *_TOGETHER[1]}
_OF_WEIGHTS = {"divergence", "normalize", *_TOGETHER[2]}


def loss_arguments(
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    f_distill: bool = False,
    nonfinite: bool = False,
    requires_grad: bool = True,
    device: torch.device | str = "cpu",
    only: Collection[str] | None = None,
    layout: str | None = None,
    mixed: bool = True,
) -> SearchStrategy[dict[str, Any]]:
    """A full set of keyword arguments of :func:`fdistill_ops.distribution_matching_loss`, or of
    :func:`fdistill_ops.f_distill_loss` with ``f_distill``: guidance, mask, prediction, normaliser, reduction, weights
    and mixed dtypes and layouts all vary.

    Args:
        shape, dtype: of x; drawn where None.
        nonfinite: some elements, logits and times are not finite.
        requires_grad: x is a leaf that requires a gradient.
        only: names of the optional arguments that are drawn, for a kernel that takes no others: ``{"weight", "mask"}``,
            say. One of teacher_uncond and guidance_scale stands for both, one of prediction, x_t, alpha and sigma for
            the four, one of logit_clip and ratio_clip for both. None: all; with ``f_distill`` without a weight.
        layout: of all tensors, a name that :func:`lay_out` knows; drawn for each where None.
        mixed: the dtypes of the other tensors may differ from x's.

    Raises:
        ValueError: only holds the name of no such argument.
    """
    from hypothesis import strategies as st

    known = _OF_LOSSES | (_OF_WEIGHTS if f_distill else set())
    if isinstance(only, str) or (only is not None and not known.issuperset(only)):
        raise ValueError(f"only must hold names among {', '.join(sorted(known))}; got {only!r}")
    named = known - ({"weight"} if f_distill else set()) if only is None else set(only)
    named = named.union(*(group for group in _TOGETHER if group & named))

    @st.composite
    def build(draw: DrawFn) -> dict[str, Any]:
        size = draw(shapes()) if shape is None else tuple(shape)
        x_dtype = draw(dtypes()) if dtype is None else dtype
        other = x_dtype if not mixed or draw(st.booleans()) else draw(dtypes())

        def like_x(of: torch.dtype) -> Tensor:
            return draw(tensors(size, dtype=of, layout=layout, nonfinite=nonfinite, device=device))

        def rows(low: float, high: float) -> float | Tensor:
            if draw(st.booleans()):
                return draw(st.floats(low, high, width=32))
            leading = size[: draw(st.integers(0, min(2, len(size))))]
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
            uniform = torch.rand(leading, generator=generator, dtype=torch.float64)
            return (low + (high - low) * uniform).to(draw(st.sampled_from((torch.float32, torch.float64)))).to(device)

        x = like_x(x_dtype).requires_grad_(requires_grad)
        arguments: dict[str, Any] = {"x": x, "teacher": like_x(other), "fake": like_x(other)}
        if "guidance_scale" in named and draw(st.booleans()):
            arguments["teacher_uncond"] = like_x(other)
            scale = draw(st.floats(-2.0, 8.0, width=32))
            per_sample = torch.full(size[:1], scale, device=device) + torch.arange(size[0], device=device) / 8
            arguments["guidance_scale"] = per_sample if draw(st.booleans()) else scale
        if "mask" in named:
            arguments["mask"] = draw(masks(size, device=device))
            if layout is not None and arguments["mask"] is not None:
                arguments["mask"] = lay_out(arguments["mask"], layout)
        if "prediction" in named:
            arguments["prediction"] = draw(st.sampled_from(("x0", "x0", "eps", "v", "flow", "score")))
            if arguments["prediction"] != "x0":
                arguments |= {"x_t": like_x(other), "alpha": rows(0.25, 1.0), "sigma": rows(0.0625, 2.0)}
        if "normalizer" in named:
            arguments["normalizer"] = draw(st.sampled_from(("mean_abs", "mean_abs", None, "given")))
            if arguments["normalizer"] == "given":
                arguments["normalizer"] = torch.linspace(0.5, 2.0, size[0], device=device)
        choices = {"eps": (1e-6, 1e-6, 0.0, 0.1), "nonfinite": ("propagate", "zero")}
        choices["reduction"] = ("mean", "mean", "sum", "sample")
        for name, values in choices.items():
            if name in named:
                arguments[name] = draw(st.sampled_from(values))
        if f_distill:
            arguments["logits"] = draw(logits(size[0], nonfinite=nonfinite, device=device))
        if "divergence" in named:
            short = ("rkl", "kl", "js", "sf", "sh", "jf", "neyman", "pearson", "alpha:0.3")
            arguments["divergence"] = draw(st.sampled_from(short))
        if "logit_clip" in named:
            arguments["logit_clip"] = draw(st.sampled_from((10.0, 3.0, None)))
            pairs = ((0.1, 20.0), (0.0, 5.0), None)
            arguments["ratio_clip"] = pairs[0] if arguments["logit_clip"] is None else draw(st.sampled_from(pairs))
        if "normalize" in named:
            arguments["normalize"] = draw(st.sampled_from(("mean", None)))
        if "weight" in named and draw(st.booleans()):
            arguments["weight"] = rows(0.0, 3.0)
        return arguments

    return build()
