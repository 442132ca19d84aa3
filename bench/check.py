"""Whether a result is right. Only what is gets a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import fdistill_ops as fd

from .cases import Case
from .ops import OF_LOGITS, OPS, Inputs

_CHUNK = 1 << 22  # elements that are converted to float64 at a time

Results = list[Tensor]
"""The value, and in the mode forward+backward the gradients of the leaves."""


def expected(case: Case, inputs: Inputs) -> Results:
    """By the reference, in float64, a few samples at a time."""
    weight = None
    if case.op == "f_distill":
        with fd.use_backend("reference"):
            weight = OPS["f_weights"].ours(case, inputs)()
    chunks = [inputs] if case.op in OF_LOGITS else list(_chunks(case, inputs))
    values, gradients, sizes, at = [], [], [], 0
    for chunk in chunks:
        wide = {name: _widened(tensor) for name, tensor in chunk.items()}
        leaves = [wide[name].requires_grad_() for name in OPS[case.op].leaves]
        if weight is None:
            call = OPS[case.op].ours(case, wide)
        else:
            weights = weight[at : at + len(wide["x"])]
            call = partial(OPS["distribution_matching"].ours(case, wide), weight=weights)
            at += len(weights)
        with fd.use_backend("reference"):
            value = call()
        counted = wide.get("mask", wide.get("x"))
        sizes.append(1.0 if counted is None else float(counted.sum() if "mask" in wide else counted.numel()))
        if case.mode != "forward":
            gradients.append(torch.autograd.grad(value.sum(), leaves))
        values.append(value.detach())
    if values[0].ndim > 0:
        return [torch.cat(values), *(torch.cat(parts) for parts in zip(*gradients, strict=True))]
    # The loss is a mean over elements: that of a chunk over the chunk's.
    shares = [size / sum(sizes) for size in sizes]
    value = torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum()
    scaled = ([g * share for g in parts] for parts, share in zip(gradients, shares, strict=bool(gradients)))
    return [value, *(torch.cat(parts) for parts in zip(*scaled, strict=True))]


def _chunks(case: Case, inputs: Inputs) -> Iterator[Inputs]:
    rows = max(1, _CHUNK // max(1, case.elements // case.shape[0]))
    batched = {name: tensor for name, tensor in inputs.items() if name != "bins"}
    for at in range(0, case.shape[0], rows):
        yield {name: tensor[at : at + rows] for name, tensor in batched.items()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.dtype.is_floating_point else tensor


def tolerance(case: Case, fused: bool) -> float:
    """Of an element, relative to its size plus the root mean square of all.

    A fused operation computes in float32 and rounds once to the dtype. The published formulas round in the dtype along
    the way, most in ``x - g``, where in bfloat16 an x of 8 leaves an error of 0.03.
    """
    rounding = torch.finfo(case.torch_dtype).eps
    arithmetic = 64 * torch.finfo(torch.float32).eps
    return max(rounding, arithmetic) if fused else max(6 * rounding, 1e-4)


def difference(results: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> str | None:
    """What is wrong with the results, in words; None where they are right."""
    if len(results) != len(wanted):
        return f"{len(results)} results, {len(wanted)} expected"
    for index, (got, want) in enumerate(zip(results, wanted, strict=True)):
        what = "value" if index == 0 else f"gradient {index}"
        if got.shape != want.shape:
            return f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
        scale = want.square().mean().sqrt() + 1e-300
        worst = max(
            float(((g.double() - w).abs() / (w.abs() + scale)).nan_to_num(torch.inf, torch.inf).max())
            for g, w in zip(got.reshape(-1).split(_CHUNK), want.reshape(-1).split(_CHUNK), strict=True)
        )
        if worst > tolerance:
            return f"{what}: off by {worst:.2g} of its size, {tolerance:.2g} allowed"
    return None
