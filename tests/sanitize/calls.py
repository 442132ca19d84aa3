"""Random calls of one back end, compared with the oracle of the tests.

    python tests/sanitize/calls.py cpu --calls 1000

Run by ``make sanitize`` with instrumented modules, and with two workers under ThreadSanitizer. Call i of a seed is the
same wherever it runs: ``--first i --calls 1`` repeats it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from conftest import as_tensor, check_identity, check_loss, expected_matching, in_threads, roundings, to_numpy

import fdistill_ops as fd
from fdistill_ops import _native
from fdistill_ops import _oracle as oracle
from fdistill_ops.testing import DTYPES, LAYOUTS, assert_close, lay_out, poison

# Shares of calls by the elements of x: less than a vector or a warp; chunks that threads share; more than caches hold.
SIZES = {
    "cpu": ((900, 0.92), (50_000, 0.07), (300_000, 0.008), (1_200_000, 0.002)),
    "cuda-emulated": ((600, 0.95), (9_000, 0.05)),
}
DIVERGENCES = ("rkl", "kl", "js", "sf", "sh", "jf", "neyman", "pearson", "alpha:0.3")


class Draw:
    """Arguments, drawn from one generator."""

    def __init__(self, seed: str, backend: str) -> None:
        self.random = Random(seed)
        self.backend = backend

    def maybe(self, share: float) -> bool:
        return self.random.random() < share

    def shape(self) -> tuple[int, ...]:
        """[B, ...] of one to five dimensions; sides of 0 and 1 among them."""
        sizes = SIZES[self.backend]
        most = self.random.choices([size for size, _ in sizes], [share for _, share in sizes])[0]
        if self.maybe(0.05):
            return tuple(self.random.choice((0, 1, 3)) for _ in range(self.random.randint(1, 4)))
        sides: list[int] = []
        left = max(1, int(most * self.random.uniform(0.3, 1)))
        for last in [False] * self.random.randint(0, 4) + [True]:
            side = left if last else min(left, self.random.choice((1, 1, 2, 3, 4, 7, 8, 16)))
            sides.append(side)
            left //= side
        if self.maybe(0.5):
            self.random.shuffle(sides)
        return tuple(sides)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype | None = None, *bad: float) -> torch.Tensor:
        """Normally distributed; one element is one of ``bad``, where there are such."""
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * self.random.choice((1.0, 1e-3, 30.0))
        if bad and value.numel():
            value.view(-1)[self.random.randrange(value.numel())] = self.random.choice(bad)
        layout = "contiguous" if self.maybe(0.5) else self.random.choice(LAYOUTS)
        return lay_out(value.to(dtype or self.random.choice(DTYPES)), layout)

    def rows(self, shape: tuple[int, ...], low: float, high: float) -> float | torch.Tensor:
        """A number, or one for each of some leading part of x's shape."""
        if self.maybe(0.4):
            return self.random.uniform(low, high)
        leading = shape[: self.random.randint(1, min(3, len(shape)))]
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        value = low + (high - low) * torch.rand(leading, generator=generator, dtype=torch.float64)
        return lay_out(value.to(self.random.choice((torch.float32, torch.float64))), self.random.choice(LAYOUTS))

    def mask(self, shape: tuple[int, ...]) -> torch.Tensor | None:
        kind = self.random.choice(("none", "none", "random", "empty", "rows", "last"))
        if kind == "none":
            return None
        if kind == "empty":
            return torch.zeros(shape, dtype=torch.bool)
        generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        part = {"rows": (*shape[:2], *(1,) * (len(shape) - 2)), "last": (*(1,) * (len(shape) - 1), shape[-1])}
        mask = torch.rand(part.get(kind, shape), generator=generator) < 0.6
        return lay_out(mask, self.random.choice(LAYOUTS)) if kind == "random" else mask.expand(shape)

    def matching(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of distribution_matching_loss."""
        of_x = self.random.choice(DTYPES)
        others = of_x if self.maybe(0.6) else self.random.choice(DTYPES)
        arguments: dict[str, Any] = {name: self.tensor(shape, others) for name in ("teacher", "fake")}
        arguments["x"] = self.tensor(shape, of_x).requires_grad_()
        if self.maybe(0.3):
            arguments["teacher_uncond"] = self.tensor(shape, others)
            scale = self.random.uniform(-2, 8)
            arguments["guidance_scale"] = scale if self.maybe(0.5) else torch.linspace(-1, scale, shape[0])
        if self.maybe(0.3):
            arguments["prediction"] = self.random.choice(("eps", "v", "flow", "score"))
            arguments |= {"x_t": self.tensor(shape, others), "alpha": self.rows(shape, 0.25, 1.0)}
            arguments["sigma"] = self.rows(shape, 0.0625, 2.0)
        if self.maybe(0.5):
            arguments["weight"] = self.rows(shape, 0.0, 3.0)
        normalizer = self.random.choice(("mean_abs", "mean_abs", None, torch.linspace(0.5, 2.0, shape[0])))
        return arguments | {
            "mask": self.mask(shape),
            "normalizer": normalizer,
            "nonfinite": self.random.choice(("propagate", "zero")),
            "reduction": self.random.choice(("mean", "mean", "sum", "sample")),
        }

    def logits(self, batch: int) -> torch.Tensor:
        """[B] or [B, K], some of them not finite or far outside of every clip."""
        bad = (float("nan"), float("inf"), 3e4) if self.maybe(0.2) else ()
        return self.tensor((batch,) if self.maybe(0.5) else (batch, self.random.randint(1, 5)), None, *bad)

    def weights(self) -> dict[str, Any]:
        """Options of f_weights."""
        return {
            "divergence": self.random.choice(DIVERGENCES),
            "logit_clip": self.random.choice((10.0, 3.0)),
            "ratio_clip": self.random.choice(((0.1, 20.0), (0.0, 5.0), None)),
            "normalize": self.random.choice(("mean", None)),
        }


# -------------------------------------------------------------------------------------------------------------- calls


def matching(draw: Draw) -> None:
    """Loss, score difference, and the gradient for an incoming one that is not 1."""
    arguments = draw.matching(draw.shape())
    expected, x = expected_matching(arguments), arguments["x"]
    stats = draw.maybe(0.3)
    result = fd.distribution_matching_loss(**arguments, return_stats=stats)
    loss = result[0] if stats else result
    check_loss(loss, expected, arguments)
    upstream = torch.linspace(-1.5, 3.25, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (gradient,) = torch.autograd.grad(loss, x, upstream, retain_graph=draw.maybe(0.5))
    factor = to_numpy(upstream).reshape(-1, *[1] * (x.ndim - 1))
    assert_close(
        gradient,
        as_tensor(expected.gradients["x"] * factor),
        # The saved gradient's rounding, which is up to twice as large a part of the product, and the product's.
        ulps=2 * roundings(x.dtype) + 0.5,
        noise=as_tensor(expected.gradient_noise["x"] * abs(factor)) + torch.finfo(x.dtype).tiny * 2**-9,
        what="gradient times the incoming one",
    )
    g = fd.score_difference(**{name: value for name, value in arguments.items() if name != "reduction"})
    assert_close(g, as_tensor(expected.g), noise=as_tensor(expected.g_noise), what="score difference")


def identity(draw: Draw) -> None:
    # At least one element: without one, statistics of the normaliser are NaN, of which the oracle knows nothing.
    shape, dtype = tuple(max(side, 1) for side in draw.shape()), draw.random.choice(DTYPES)
    arguments: dict[str, Any] = {
        name: draw.tensor(shape, dtype if draw.maybe(0.8) else None).requires_grad_()
        for name in ("x", "teacher", "fake")
    }
    arguments |= {"mask": draw.mask(shape), "normalizer": draw.random.choice(("mean_abs", None))}
    arguments["reduction"] = draw.random.choice(("mean", "sum", "sample"))
    check_identity(arguments, draw.random.uniform(-2, 2))


def weights(draw: Draw) -> None:
    """f_weights with a histogram, and a loss that computes the same weights by itself."""
    batch = draw.random.choice((0, 1, 2, 5, 33, 400, 1500))
    logits, options = draw.logits(batch), draw.weights()
    bins, ema_rate = draw.random.randint(1, 12), draw.random.choice((0.0, 0.5, 0.99))
    # Random, so that none lies on the edge of a bin, where rounding decides.
    times = [draw.random.uniform(-0.25, 1.25) for _ in range(batch)]
    t = torch.tensor(times, dtype=draw.random.choice((torch.float32, torch.float64)))
    name, _, a = options["divergence"].partition(":")
    named = options | ({"divergence": name, "a": float(a)} if a else {})
    u = oracle.U64 if logits.dtype is torch.float64 else oracle.U32
    before = to_numpy(torch.ones(bins))
    expected = oracle.f_weights(to_numpy(logits), to_numpy(t), **named, bins=before, ema_rate=ema_rate, u=u)
    first, second = (fd.RatioHistogram(0.0, 1.0, bins=bins, ema_rate=ema_rate) for _ in range(2))
    got = fd.f_weights(logits, t, histogram=first, **options)
    assert_close(got, as_tensor(expected.weights), noise=as_tensor(expected.noise), what="weights")
    x, teacher, fake = (draw.tensor((batch, 3), torch.float32) for _ in range(3))
    loss = fd.f_distill_loss(x.requires_grad_(), teacher, fake, logits, t, histogram=second, **options)
    for histogram in (first, second):
        assert_close(histogram.bins, as_tensor(expected.bins), noise=as_tensor(expected.bins_noise), what="bins")
    separate = fd.distribution_matching_loss(x, teacher, fake, weight=got)
    assert_close(loss, separate, ulps=4, terms=3 * batch + 1, what="f_distill_loss")
    loss.backward()


def out(draw: Draw) -> None:
    """A score difference into memory of the caller's."""
    shape, dtype = draw.shape(), draw.random.choice(DTYPES)
    x, teacher, fake = (draw.tensor(shape, dtype) for _ in range(3))
    layout = draw.random.choice([name for name in LAYOUTS if name != "expanded"])
    into = lay_out(torch.zeros(shape, dtype=dtype), layout)
    expected = expected_matching({"x": x, "teacher": teacher, "fake": fake})
    got = fd.score_difference(x, teacher, fake, out=into)
    assert_close(got, as_tensor(expected.g), noise=as_tensor(expected.g_noise), what="out")


CALLS: dict[Callable[[Draw], None], float] = {matching: 0.55, identity: 0.15, weights: 0.2, out: 0.1}


def call(backend: str, seed: int, index: int) -> None:
    draw = Draw(f"{seed}-{index}", backend)
    torch.set_num_threads(draw.random.randint(1, 4))
    if backend == "cpu":
        _native.module().set_isa(draw.random.choice(_native.module().isas()))
    chosen = draw.random.choices(list(CALLS), list(CALLS.values()))[0]
    try:
        with poison():
            chosen(draw)
    except Exception as error:
        where = f"in call {index} of seed {seed} ({chosen.__name__}, back end {backend})"
        raise RuntimeError(f"{type(error).__name__} {where}: {error}") from error


def run(backend: str, seed: int, indices: range, workers: int) -> None:
    """The calls, shared by so many threads. A choice of back end holds in the thread that makes it alone."""
    failed = threading.Event()

    def work(mine: range) -> None:
        with fd.use_backend(backend):
            try:
                for index in mine:
                    call(backend, seed, index)
                    if failed.is_set():
                        return
            except BaseException:
                failed.set()
                raise

    in_threads(*(partial(work, indices[i::workers]) for i in range(workers)))


def look_for_leaks() -> None:
    """Reports what nothing refers to, now that Python still holds all it knows of."""
    gc.collect()
    fd.empty_cache()
    check = getattr(ctypes.CDLL(None), "__lsan_do_recoverable_leak_check", None)
    if check is not None:
        check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backend", choices=list(SIZES))
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="Python threads that call at the same time")
    arguments = parser.parse_args()
    built = os.environ.get("FDISTILL_SANITIZED")
    if built is not None and not Path(fd.__file__).is_relative_to(built):
        raise SystemExit(f"the package is that of {fd.__file__}, not of {built}")
    indices = range(arguments.first, arguments.first + arguments.calls)
    run(arguments.backend, arguments.seed, indices, arguments.workers)
    look_for_leaks()
    workers = f", {arguments.workers} at a time" if arguments.workers > 1 else ""
    print(f"{arguments.calls} random calls of {arguments.backend}{workers}: as the oracle says")


if __name__ == "__main__":
    main()
