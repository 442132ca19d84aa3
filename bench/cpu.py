"""Forward and backward of the f-distill loss on the CPU: ours, the eager formulas, torch.compile of them, and copies
of the same bytes, in one process, round by round.

    python -m bench.cpu                                  # from the root of the repository
    python -m bench.cpu --shape 64,16,128,128 --dtype bfloat16 --rounds 21

Every figure is the median over the rounds; a ratio is the median of the ratios within a round. What is timed is
checked first: loss and gradient of ours against the eager ones, in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import fdistill_ops as fd

SHAPES = ((64, 16, 128, 128), (256, 3, 32, 32), (64, 3, 64, 64), (8, 16, 128, 128), (1, 16, 21, 60, 104))


def eager_loss(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    """The published formulas as training code writes them: normaliser in float32, pseudo target, mean squared error."""
    with torch.no_grad():
        dims = tuple(range(1, x.ndim))
        distance = (x.float() - teacher.float()).abs().mean(dim=dims, keepdim=True)
        scale = (1 / (distance + 1e-6)).to(x.dtype)
        target = x - (fake - teacher) * scale
    return 0.5 * torch.nn.functional.mse_loss(x, target, reduction="mean")


def eager_weights(logits: Tensor, t: Tensor, bins: Tensor) -> Tensor:
    """Jensen-Shannon weights with a history of the ratio over ten time bins, likewise: bincounts, boolean indexing."""
    ratio = logits.float().mean(1).clamp(-10, 10).exp().clamp(0.1, 20)
    index = (t.double() * len(bins)).floor().long().clamp(0, len(bins) - 1)
    count = torch.bincount(index, minlength=len(bins)).float()
    total = torch.bincount(index, weights=ratio, minlength=len(bins)).float()
    filled = count > 0
    means = total / (count + 1e-6)
    history = bins.float()
    history[filled] = 0.0 * history[filled] + means[filled]
    bins.copy_(history)
    ratio = ratio / (history[index] + 1e-6)
    h = 1 - 1 / (1 + ratio)
    return h / (h.mean() + 1e-6)


def eager_f_distill(x: Tensor, teacher: Tensor, fake: Tensor, logits: Tensor, t: Tensor, bins: Tensor) -> Tensor:
    with torch.no_grad():
        weights = eager_weights(logits, t, bins)
        dims = tuple(range(1, x.ndim))
        distance = (x.float() - teacher.float()).abs().mean(dim=dims, keepdim=True)
        scale = (weights.reshape(-1, *[1] * len(dims)) / (distance + 1e-6)).to(x.dtype)
        target = x - (fake - teacher) * scale
    return 0.5 * torch.nn.functional.mse_loss(x, target, reduction="mean")


def seconds(function: Callable[[], None], repeats: int) -> float:
    """Mean over the repeats, after a few untimed ones: short calls are timed on the caches they leave themselves,
    not on those of whoever ran before."""
    for _ in range(repeats // 2):
        function()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def cases(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    x, teacher, fake = (torch.randn(shape).to(dtype) for _ in range(3))
    x.requires_grad_()
    logits, t, bins = torch.randn(shape[0], 4), torch.rand(shape[0]), torch.ones(10)
    histogram = fd.RatioHistogram(0.0, 1.0)
    target = torch.empty_like(teacher)
    if weighted:
        forms = {
            "ours": lambda: fd.f_distill_loss(x, teacher, fake, logits, t, histogram=histogram),
            "eager": lambda: eager_f_distill(x, teacher, fake, logits, t, bins),
        }
        compiled_form = torch.compile(eager_f_distill)
        compiled = lambda: compiled_form(x, teacher, fake, logits, t, bins)  # noqa: E731
    else:
        forms = {
            "ours": lambda: fd.distribution_matching_loss(x, teacher, fake),
            "eager": lambda: eager_loss(x, teacher, fake),
        }
        compiled_form = torch.compile(eager_loss)
        compiled = lambda: compiled_form(x, teacher, fake)  # noqa: E731
    forms["compile"] = compiled
    check(x, forms)

    def step(form: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            form().backward()
            x.grad = None

        return run

    def copies() -> None:
        target.copy_(teacher)
        target.copy_(fake)

    return {name: step(form) for name, form in forms.items()} | {"two copies": copies}


def check(x: Tensor, forms: dict[str, Callable[[], Tensor]]) -> None:
    """A wrong result gets no time."""
    results = {}
    for name, form in forms.items():
        x.grad = None
        loss = form()
        loss.backward()
        results[name] = (loss.detach().double(), x.grad.double())
    x.grad = None
    (loss, gradient), (eager, eager_gradient) = results["ours"], results["eager"]
    rounding = 2e-2 if x.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not abs(loss - eager) <= rounding * abs(eager):
        raise SystemExit(f"the losses differ: {float(loss)} and {float(eager)}")
    if not (gradient - eager_gradient).norm() <= rounding * eager_gradient.norm():
        raise SystemExit("the gradients differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=lambda s: tuple(map(int, s.split(","))), help="B,C,H,W (default: five named ones)"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--unweighted", action="store_true", help="distribution_matching_loss, no logits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    info = fd.build_info()
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, {info['isa']}, {arguments.dtype}; "
        "milliseconds, medians"
    )
    print(
        f"{'shape':>20} {'ours':>9} {'eager':>9} {'compile':>9} {'2 copies':>9} | eager/ours compile/ours ours/copies"
    )
    for shape in (arguments.shape,) if arguments.shape else SHAPES:
        torch.compiler.reset()
        functions = cases(shape, getattr(torch, arguments.dtype), not arguments.unweighted)
        for function in functions.values():
            seconds(function, 3)
        repeats = {name: max(1, min(30, round(0.01 / seconds(function, 2)))) for name, function in functions.items()}
        rounds = [
            {name: seconds(function, repeats[name]) for name, function in functions.items()}
            for _ in range(arguments.rounds)
        ]
        time_of = {name: statistics.median(r[name] for r in rounds) * 1e3 for name in functions}

        def ratio(a: str, b: str, rounds: list[dict[str, float]] = rounds) -> float:
            return statistics.median(r[a] / r[b] for r in rounds)

        print(
            f"{','.join(map(str, shape)):>20} "
            + " ".join(f"{time_of[name]:9.3f}" for name in ("ours", "eager", "compile", "two copies"))
            + f" | {ratio('eager', 'ours'):10.1f} {ratio('compile', 'ours'):12.1f} {ratio('ours', 'two copies'):11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
