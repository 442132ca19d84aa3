"""Legal calls, drawn from a seeded generator: the same seed gives the same calls."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .signatures import POSITIONAL
from .specs import After, Call, Histogram, Lit, Spec, Tens, differentiated

T = TypeVar("T")
FLOATS = ("float32", "bfloat16", "float16", "float64")
DIVERGENCES = ("js", "rkl", "kl", "sf", "sh", "jf", "neyman", "pearson", "alpha:0.3", "alpha=-0.7", "Alpha(2)", "alpha")
DIVERGENCES += ("jensen-shannon", "Reverse_KL", " forward kl ", "hellinger", "neyman_chi2")
LAYOUTS = (
    "permuted",
    "swapped",
    "channels_last",
    "sliced",
    "stepped",
    "rows_stepped",
    "offset",
    "chunked",
    "odd_strides",
)
LAYOUTS += ("negated", "imaginary", "real_part", "expanded", "inner_expanded", "one_value", "windows", "unaligned")
LAYOUTS += ("diagonal", "no_memory", "no_memory_view")
WRAPS = ("sub", "parameter", "buffer", "made_in_inference")
WRAPPERS = ("two", "fake_tensor", "functional", "masked")
_SIZES = (1, 1, 2, 2, 3, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65)
PREDICTIONS = ("'eps'", "'v'", "'flow'", "'score'", "'epsilon'", "'v_prediction'", "'flow_prediction'")
REAL_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "uint16")
REAL_DTYPES += ("uint32", "uint64")


@dataclass(frozen=True)
class Limits:
    """``most``: elements of an ordinary tensor. ``large``: of a rare large one."""

    most: int = 400
    large: int = 200_000
    heads: int = 5


LIMITS = {"triton": Limits(24, 200, 2), "cuda-emulated": Limits(200, 20_000, 5)}


class Draw:
    """The generator of one call."""

    def __init__(self, rng: random.Random, backend: str) -> None:
        self.rng, self.backend = rng, backend
        self.limits = LIMITS.get(backend, Limits())

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, values: Sequence[T]) -> T:
        return values[int(self.rng.random() * len(values))]

    def seed(self) -> int:
        return int(self.rng.random() * 2**20)

    # ------------------------------------------------------------------------------------------------------- operands

    def shape(self) -> tuple[int, ...]:
        """Mostly of a few dimensions; up to a hundred, mostly of size 1."""
        kind = self.rng.random()
        if kind < 0.88:
            ndim = self.pick((1, 1, 2, 2, 2, 3, 3, 4, 4, 5))
        else:
            ndim = self.rng.randint(6, 16) if kind < 0.95 else self.rng.randint(17, 64 if kind < 0.985 else 100)
        most = self.limits.most if self.chance(0.97) else self.limits.most * 12
        if self.chance(0.003):
            most = self.limits.large
        sizes = [1] * ndim
        where = list(range(ndim))
        if ndim > 5:
            where = sorted([*self.rng.sample(where, self.rng.randint(0, 4)), 0])
        for d in where:
            size = self.pick(_SIZES) if self.chance(0.97) else 0
            if size == 0 or math.prod(sizes) * size <= most:
                sizes[d] = size
            elif most > 10_000:
                sizes[d] = max(1, most // max(math.prod(sizes), 1))
        return tuple(sizes)

    def dtype(self) -> str:
        return self.pick(FLOATS) if self.chance(0.6) else "float32"

    def laid(self, spec: Tens, count: int) -> Tens:
        """In some memory layout, of some type."""
        if self.chance(0.4):
            layout = self.pick(LAYOUTS)
            if layout == "unaligned" and self.backend not in ("cpu", "reference"):
                layout = "offset"  # no tensor on a GPU is
            if layout in ("imaginary", "real_part") and spec.dtype not in ("float32", "float64", "float16"):
                layout = "negated" if spec.dtype != "bool" else "stepped"
            if layout.startswith("no_memory") and spec.shape in (0, ()):
                layout = "offset"  # PyTorch itself gets the dtype of their products wrong
            if (layout == "negated" and spec.dtype not in FLOATS) or (layout == "diagonal" and count > 200):
                layout = "offset"
            spec = replace(spec, layout=layout)
        if self.chance(0.06):
            spec = replace(spec, wrap=self.pick(WRAPS))
        elif self.chance(0.012):
            spec = replace(spec, wrap=self.pick(WRAPPERS))
            if spec.layout in (
                "negated",
                "imaginary",
                "no_memory",
                "no_memory_view",
            ):  # a TwoTensor loses the sign by itself
                spec = replace(spec, layout="")
        return spec

    def tensor(self, shape: tuple[int, ...], dtype: str | None = None) -> Tens:
        """Of the call's shape: ordinary values, sometimes extreme or non-finite ones."""
        scale = self.pick((1.0, 1.0, 1.0, 1e-3, 30.0))
        if self.chance(0.02):
            scale = self.pick((1e-30, 1e-40, 1e20, 1e38, 0.0))
        spec = Tens(dtype=dtype or self.dtype(), seed=self.seed(), high=scale)
        count = math.prod(shape)
        if count and self.chance(0.06):
            values = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e30)
            puts = {int(self.rng.random() * min(count, 64)): self.pick(values) for _ in range(self.rng.randint(1, 2))}
            spec = replace(spec, puts=tuple(puts.items()))
        return self.laid(spec, count)

    def rows(self, shape: tuple[int, ...], low: float, high: float, number: float = 0.4) -> Spec:
        """A number, or a tensor of some leading dimensions, or of as many with ones among them."""
        if self.chance(number):
            return self.number(low, high)
        dtype = self.pick(("float32", "float64", "float32", "bfloat16", "float16"))
        leading: tuple[int | None, ...] | int = min(self.pick((0, 1, 1, 1, 2, 3, 99)), len(shape))
        if self.chance(0.3):
            leading = self.with_ones(len(shape))
        return self.laid(Tens(leading, dtype, self.seed(), low, high), math.prod(shape))

    def with_ones(self, ndim: int) -> tuple[int | None, ...]:
        """A shape that broadcasts: x's with ones in some places."""
        return tuple(1 if self.chance(0.5) else None for _ in range(ndim))

    def per_sample(self, shape: tuple[int, ...]) -> tuple[int | None, ...] | int:
        return (None, *[1] * (len(shape) - 1)) if self.chance(0.3) else 1

    def number(self, low: float, high: float) -> Lit:
        value = round(low + (high - low) * self.rng.random(), 3)
        form = self.pick(("{}", "{}", "{}", "np.float32({})", "np.float64({})", "FloatSubclass({})", "Fraction('{}')"))
        if self.chance(0.2) and math.ceil(low) <= math.floor(high):
            whole = self.rng.randint(math.ceil(low), math.floor(high))
            form, value = self.pick(("{}", "np.int64({})", "IntSubclass({})", "np.int8({})")), whole
        return Lit(form.format(value), form.format("given"))

    def eps(self) -> Lit:
        return self.pick(
            (Lit("0.0"), Lit("1e-6"), Lit("0.1"), Lit("1"), Lit("-0.0"), Lit("2**63"), Lit("np.float32(1e-3)"))
        )

    # ---------------------------------------------------------------------------------------------------------- losses

    def samples(self, shape: tuple[int, ...]) -> dict[str, Spec]:
        x = self.tensor(shape)
        if self.chance(0.75):
            x = replace(x, grad=True, leaf=self.chance(0.9))
            if x.wrap in ("parameter", "buffer", "made_in_inference") or x.layout.startswith("no_memory"):
                x = replace(x, leaf=True)
            if x.wrap == "made_in_inference":
                x = replace(x, wrap="")
        other = x.dtype if self.chance(0.5) else self.dtype()
        given: dict[str, Spec] = {"x": x}
        for name in ("teacher", "fake"):
            given[name] = self.tensor(shape, other if self.chance(0.9) else None)
            if self.chance(0.04):
                given[name] = Lit(
                    self.pick(("x", "x.detach()") if name == "teacher" else ("x", "teacher", "x.detach()"))
                )
        return given

    def common(self, given: dict[str, Spec], shape: tuple[int, ...]) -> None:
        """weight is left to the loss."""
        if self.chance(0.3):
            given["mask"] = self.mask(shape)
        if self.chance(0.35):
            given["normalizer"] = self.pick((Lit("None"), Lit("'mean_abs'"), self.given_normalizer(shape)))
        if self.chance(0.3):
            given["eps"] = self.eps()
        if self.chance(0.3):
            given["nonfinite"] = Lit(self.pick(("'zero'", "'zero'", "'propagate'", "StrSubclass('zero')")))
        if self.chance(0.4):
            given["reduction"] = Lit(self.pick(("'sum'", "'sample'", "'sample'", "'none'", "'mean'")))
        if self.chance(0.25):
            given["return_stats"] = Lit(self.pick(("True", "True", "True", "False")))

    def given_normalizer(self, shape: tuple[int, ...]) -> Tens:
        dtype = self.pick(("float32", "float64", "bfloat16"))
        return self.laid(Tens(self.per_sample(shape), dtype, self.seed(), 0.5, 2.0), shape[0])

    def mask(self, shape: tuple[int, ...]) -> Spec:
        spec = Tens(dtype="bool", seed=self.seed())
        kind = self.rng.random()
        if kind < 0.1:
            spec = replace(spec, low=0.5)  # all
        elif kind < 0.2:
            spec = replace(spec, low=-1.0, high=0.0)  # none
        if self.chance(0.4):
            ones = self.with_ones(len(shape))
            cut = ones[self.rng.randrange(len(ones)) :]
            spec = replace(spec, shape=self.pick((1, 1, min(2, len(shape)), ones, cut, ())))
        return self.laid(spec, math.prod(shape))

    def guidance(self, given: dict[str, Spec], shape: tuple[int, ...]) -> None:
        if self.chance(0.3):
            given["teacher_uncond"] = self.tensor(shape)
            dtype = self.pick(("float32", "float64", "bfloat16"))
            size = self.pick((self.per_sample(shape), self.per_sample(shape), 0))
            scale = self.laid(Tens(size, dtype, self.seed(), -2.0, 8.0), shape[0])
            given["guidance_scale"] = self.number(-2.0, 8.0) if self.chance(0.5) else scale

    def prediction(self, given: dict[str, Spec], shape: tuple[int, ...]) -> None:
        if self.chance(0.35):
            given["prediction"] = Lit(self.pick(PREDICTIONS))
            given["x_t"] = self.tensor(shape)
            given["alpha"], given["sigma"] = self.rows(shape, 0.25, 1.0), self.rows(shape, 0.0625, 2.0)
        elif self.chance(0.1):
            given["prediction"] = Lit(self.pick(("'x0'", "'sample'")))

    def logits(self, batch: int) -> Tens:
        heads = self.pick((0, 0, 0, 1, 2, self.limits.heads))
        shape = (batch, heads) if heads else (batch,)
        if self.chance(0.1):
            shape = (batch, *self.pick(((1, 2, 2), (1, 1), (1, 1, 1, 1, 2), (3, 1))))
        scale = self.pick((1.0, 2.0, 10.0, 0.1, 0.0)) if self.chance(0.95) else 1000.0
        spec = Tens(shape, self.dtype(), self.seed(), None, scale)
        count = math.prod(shape)
        if count and self.chance(0.15):
            values = (math.nan, math.inf, -math.inf, 10.0, -10.0, 88.8, -104.0, 3e4, -0.0, 1e-30, 1e300)
            spec = replace(spec, puts=((int(self.rng.random() * count), self.pick(values)),))
        return self.laid(spec, count)

    def weight_options(self, given: dict[str, Spec], batch: int) -> None:
        if self.chance(0.7):
            name = self.pick(DIVERGENCES)
            given["divergence"] = Lit(repr(name) if self.chance(0.9) else f"fd.get_divergence({name!r})", name)
        if self.chance(0.3):
            given["logit_clip"] = self.pick(
                (Lit("None"), Lit("3.0"), Lit("inf"), Lit("0.0"), Lit("30"), Lit("np.float32(5)"))
            )
        if self.chance(0.3):
            pairs = (
                "None",
                "(0.0, 2.0)",
                "(0.5, 3)",
                "(4.0, 4.0)",
                "(0, inf)",
                "(0.01, 100.0)",
                "[0.1, 20.0]",
                "(1e-300, 1)",
            )
            given["ratio_clip"] = Lit(self.pick(pairs))
        if self.chance(0.25):
            given["normalize"] = Lit(self.pick(("None", "'mean'")))
        if self.chance(0.35):
            given["t"], given["histogram"] = self.times(batch), self.histogram()
        elif self.chance(0.05):
            given["t"] = Lit("None")
        if self.chance(0.05):
            given["group"] = Lit("None")

    def times(self, batch: int) -> Tens:
        dtype = self.pick(REAL_DTYPES) if self.chance(0.5) else "float64"
        high = 100.0 if "int" in dtype else self.pick((1.0, 1.0, 3.0))
        shape = (batch,) if self.chance(0.8) else (batch, *[1] * self.rng.randint(1, 3))
        spec = Tens(shape, dtype, self.seed(), -0.1 * high, high)
        if batch and dtype in ("float64", "float32") and self.chance(0.15):
            values = (math.nan, math.inf, -math.inf, 0.25, 0.5, 1.0, 1e300)
            spec = replace(spec, puts=((int(self.rng.random() * batch), self.pick(values)),))
        return self.laid(spec, batch) if dtype in FLOATS else spec

    def histogram(self) -> Histogram:
        low, high = self.pick((("0.0", "1.0"), ("0.0", "1.0"), ("0", "100"), ("-1.5", "3.0"), ("0.002", "80.0")))
        made = Histogram(low, high, self.pick((1, 2, 4, 10, 33)), self.pick(("0.0", "0.0", "0.5", "0.9", "1.0", "1")))
        if self.chance(0.3):
            count = self.pick((1, 3, 8))
            stored = Tens((count,), self.pick(("float32", "float64", "bfloat16")), self.seed(), 0.1, 3.0)
            if self.chance(0.3):
                stored = replace(stored, puts=((0, self.pick((math.nan, math.inf, -1.0, 0.0, 1e30))),))
            layout = self.pick(("", "stepped", "offset", "negated"))
            made = replace(made, stored=replace(stored, layout=layout))
        elif self.chance(0.15):
            made = replace(made, dtype=self.pick(("float64", "bfloat16", "float16")))
        return replace(made, training=self.chance(0.85))

    # ------------------------------------------------------------------------------------------------ around the call

    def surrounded(self, call: Call) -> Call:
        """Contexts, threads, backward, and how the arguments are given."""
        names = list(call.arguments)
        first = POSITIONAL.get(call.target, ())
        given = 0
        while given < min(len(first), len(names)) and names[given] == first[given]:
            given += 1
        positional = self.rng.randint(0, given) if self.chance(0.5) else given
        mode = self.pick(("no_grad", "inference")) if self.chance(0.07) else ""
        threads = self.pick((2, 3)) if self.chance(0.04) else 1
        call = replace(call, positional=positional, grad_mode=mode, threads=threads, poison=self.chance(0.5))
        return replace(call, after=self.after(call))

    def after(self, call: Call) -> After:
        leaves = differentiated(call)
        wrapped = any(isinstance(s, Tens) and s.wrap in WRAPPERS for s in call.arguments.values())
        if (
            not leaves
            or call.grad_mode
            or call.target in ("score_difference", "f_score_difference", "f_weights")
            or self.chance(0.15)
        ):
            return After()
        if wrapped or call.target in ("to_x0", "gan_generator_loss", "gan_discriminator_loss"):
            return After("grad")
        kind = self.pick(AFTER_KINDS)
        if kind == "backward" and any(not call.arguments[name].leaf for name in leaves):  # type: ignore[union-attr]
            kind = "grad"
        seed = self.seed()
        upstream = self.pick(("", "", *UPSTREAMS)).format(seed=seed)
        return After(kind, upstream)


AFTER_KINDS = ("grad", "grad", "grad", "backward", "backward", "twice", "freed", "unused", "create_graph")
AFTER_KINDS += ("hook on x", "hook on the loss", "hook before", "hook after")
UPSTREAMS = (
    "torch.full_like(loss, 0.3)",
    "torch.full_like(loss, 2.0)",
    "torch.full_like(loss, -65536.0)",
    "numbers(loss.shape, {seed}).to(loss.dtype)",
    "torch.tensor(0.7, dtype=loss.dtype).expand(loss.shape)",
    "negated(numbers(loss.shape, {seed}).to(loss.dtype))",
    "numbers((*loss.shape, 2), {seed}).to(loss.dtype)[..., 1]",
    "torch.zeros_like(loss)",
    "torch.full_like(loss, inf)",
    "torch.full_like(loss, nan)",
    "no_memory(loss.detach())",
    "no_memory_view(loss.detach())",
    "sub(numbers(loss.shape, {seed}).to(loss.dtype))",
    "numbers(loss.shape, {seed})",
    "torch.ones(3, 5)",
)
