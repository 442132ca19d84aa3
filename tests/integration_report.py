"""The table of docs/integration.md: what a loss costs in its code base and patched, and how far its gradient is from
float64.

    python tests/integration_report.py

With FDISTILL_CODEBASES (a folder with checkouts) of the code bases themselves, else of what tests/codebases restates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from typing import Any

import torch
from integration_cases import CASES, SOURCES, Case, Operators, importable, in_float64, relative_error, run
from test_integrations import batch, fdistill_model

CLOSENESS = 0.1  # of the predictions to each other, in units of their distance from the samples


def cost(case: Case) -> tuple[int, float, int]:
    """Operators of forward and backward, the tensors they make in units of x's bytes, waits for the host."""
    tensors = case.tensors(torch.float32)
    model = case.build(tensors)
    x = tensors["x"].requires_grad_()
    with Operators() as forward:
        loss, _ = model.loss(x)
    with Operators() as backward:
        torch.autograd.grad(loss, [x, *model.leaves])
    made = (forward.bytes + backward.bytes) / (x.numel() * x.itemsize)
    return forward.count + backward.count, made, len(forward.waits)


def errors(case: Case, patched: Any) -> list[str]:
    """Relative error of x's gradient in float32 and bfloat16: original, patched."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        tensors = case.tensors(dtype, CLOSENESS)
        exact = in_float64(case, tensors).gradients[0]
        original = relative_error(run(case, tensors).gradients[0], exact)
        with patched():
            ours = relative_error(run(case, tensors).gradients[0], exact)
        found.append(f"{original:.1e} / {ours:.1e}")
    return found


def weights_cost(patched: Any) -> list[str]:
    module = importlib.import_module("fastgen.methods.distribution_matching.f_distill")
    counts = []
    for context in (contextlib.nullcontext, patched):
        model = fdistill_model(module, "js")
        with context(), Operators() as operators:
            model._get_f_div_weighting_h(*batch(0))
        counts.append(operators)
    theirs, ours = counts
    return [f"{theirs.count} / {ours.count}", "", f"{len(theirs.waits)} / {len(ours.waits)}", "", ""]


def row(case: Case, source: str) -> list[str]:
    def patched() -> Any:
        return case.integration.patch(strict=source != "restated")

    large = dataclasses.replace(case, shape=(*case.shape[:-2], 64, 64))
    theirs = cost(large)
    with patched():
        ours = cost(large)
    costs = [f"{theirs[0]} / {ours[0]}", f"{theirs[1]:.1f} / {ours[1]:.1f}", f"{theirs[2]} / {ours[2]}"]
    return [case.name, *costs, *errors(case, patched)]


def main() -> None:
    source = SOURCES[-1]
    print(f"{source}, torch {torch.__version__}; original / patched")
    print("| loss | operators | tensors made, in N | waits | gradient error, float32 | bfloat16 |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        with importable(case.project, source):
            print("| " + " | ".join(row(case, source)) + " |")
    with importable("FastGen", source):
        patch = CASES[0].integration.patch
        print("| fastgen weights | " + " | ".join(weights_cost(lambda: patch(strict=source != "restated"))) + " |")


if __name__ == "__main__":
    main()
