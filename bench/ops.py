"""The public operations: their inputs, the call of each side, and the memory traffic they need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fdistill_ops as fd

from . import baselines
from .cases import HEADS, MODES, Case

Inputs = dict[str, Tensor]
Call = partial[Tensor]
MATCHING = ("f_distill", "distribution_matching", "score_difference")
"""The operations that a case's guidance and mask are for."""
WEIGHTED = ("f_distill", "f_weights")
"""Those that its divergence and histogram are for."""
OF_LOGITS = ("f_weights", "gan_generator", "gan_discriminator")
"""Those whose size is that of the logits, [B, heads]."""
_GUIDANCE = 7.5  # of the ops that always have guidance
_ALPHA = 1.2  # of the score identity


@dataclass(frozen=True)
class Op:
    """An operation of the library.

    ``ours`` and ``eager`` bind the inputs of a case. ``leaves`` are the inputs that are differentiated; ``traffic`` is
    what has to cross memory without guidance and mask.
    """

    inputs: Callable[[Case, torch.Generator], Inputs]
    ours: Callable[[Case, Inputs], Call]
    eager: Callable[[Case, Inputs], Call]
    leaves: tuple[str, ...] = ()
    fused: bool = True  # has kernels; otherwise it is the reference on every back end
    traffic: Callable[[Case], float] = field(default=lambda case: 4.0 * case.tensor_bytes)

    def modes(self) -> tuple[str, ...]:
        return MODES if self.leaves else MODES[:1]


def make_inputs(case: Case, seed: int) -> Inputs:
    """One set of inputs, the same for every contender."""
    made = OPS[case.op].inputs(case, torch.Generator().manual_seed(seed))
    tensors = {name: tensor.to(case.device) for name, tensor in made.items()}
    for name in OPS[case.op].leaves:
        tensors[name].requires_grad_()
    return tensors


def model_bytes(case: Case) -> int:
    """Bytes that have to cross memory, whoever computes it: inputs read once, results written once."""
    extra = 0.0
    if case.op in MATCHING:
        extra += case.tensor_bytes if case.guidance is not None else 0
        extra += case.elements if case.mask else 0
    return round(OPS[case.op].traffic(case) + extra)


# -------------------------------------------------------------------------------------------------------------- inputs


def _samples(case: Case, generator: torch.Generator) -> Inputs:
    """x, teacher and fake, correlated as predictions are, and what the options ask for."""

    def randn() -> Tensor:
        return torch.randn(case.shape, generator=generator)

    clean = randn()
    tensors = {name: (clean + 0.5 * randn()).to(case.torch_dtype) for name in ("x", "teacher", "fake")}
    if case.guidance is not None:
        tensors["uncond"] = (clean + 0.5 * randn()).to(case.torch_dtype)
    if case.mask:
        tensors["mask"] = torch.rand(case.shape, generator=generator) > 0.5
        tensors["mask"].reshape(case.shape[0], -1)[:, 0] = True  # at least one of each sample
    return tensors


def _logits(case: Case, generator: torch.Generator) -> Inputs:
    batch = case.shape[0]
    return {
        "logits": torch.randn(batch, HEADS, generator=generator),
        "t": torch.rand(batch, generator=generator, dtype=torch.float64),
        "bins": torch.ones(10),
    }


def _with_logits(case: Case, generator: torch.Generator) -> Inputs:
    return _samples(case, generator) | _logits(case, generator)


def _noisy(case: Case, generator: torch.Generator) -> Inputs:
    """As DMD2 has them: predictions of eps, and the noisy input."""
    tensors = _samples(case, generator)
    tensors["uncond"] = (tensors["teacher"] + 0.3 * torch.randn(case.shape, generator=generator)).to(case.torch_dtype)
    tensors["x_t"] = (tensors["x"] + tensors["fake"]).to(case.torch_dtype)
    power = 0.1 + 0.8 * torch.rand(case.shape[0], generator=generator, dtype=torch.float64)
    return tensors | {"power": power, "alpha": power.sqrt(), "sigma": (1 - power).sqrt()}


def _logit_bytes(case: Case, tensors: int) -> float:
    """Reads the logits; backward reads them again and writes their gradient."""
    bytes_ = case.shape[0] * HEADS * case.torch_dtype.itemsize
    return float(tensors * bytes_ * (1 if case.mode == "forward" else 3))


def _alone(case: Case, generator: torch.Generator) -> Inputs:
    """Logits in the case's dtype: there is nothing else that has it."""
    tensors = _logits(case, generator)
    return tensors | {"logits": tensors["logits"].to(case.torch_dtype)}


def _gan(case: Case, generator: torch.Generator) -> Inputs:
    shape = (case.shape[0], HEADS)
    return {name: torch.randn(shape, generator=generator).to(case.torch_dtype) for name in ("real", "fake")}


# --------------------------------------------------------------------------------------------------------------- calls


def _matching_options(case: Case, inputs: Inputs) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if case.guidance is not None:
        options |= {"teacher_uncond": inputs["uncond"], "guidance_scale": case.guidance}
    return options | ({"mask": inputs["mask"]} if case.mask else {})


def _eager_options(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    return inputs.get("uncond"), 1.0 if case.guidance is None else case.guidance, inputs.get("mask")


def _xtf(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs["x"], inputs["teacher"], inputs["fake"]


def _weight_options(case: Case, inputs: Inputs) -> dict[str, Any]:
    if not case.histogram:
        return {"divergence": case.divergence}
    histogram = fd.RatioHistogram(0.0, 1.0, bins=len(inputs["bins"]), ema_rate=0.0).to(inputs["bins"].device)
    return {"divergence": case.divergence, "t": inputs["t"], "histogram": histogram}


def _eager_weights(case: Case, inputs: Inputs) -> tuple[Any, ...]:
    bins = inputs["bins"].clone() if case.histogram else None
    return inputs["logits"], inputs["t"], bins, baselines.weighting(case.divergence)


def _ours_f_distill(case: Case, inputs: Inputs) -> Call:
    options = _matching_options(case, inputs) | _weight_options(case, inputs)
    return partial(fd.f_distill_loss, *_xtf(inputs), inputs["logits"], **options)


def _ours_dmd2(case: Case, inputs: Inputs) -> Call:
    return partial(
        fd.distribution_matching_loss,
        *_xtf(inputs),
        teacher_uncond=inputs["uncond"],
        guidance_scale=_GUIDANCE,
        prediction="eps",
        x_t=inputs["x_t"],
        alpha=inputs["alpha"],
        sigma=inputs["sigma"],
        eps=0.0,
        nonfinite="zero",
    )


def _eager_dmd2(case: Case, inputs: Inputs) -> Call:
    x, teacher, fake = _xtf(inputs)
    return partial(baselines.dmd2, x, inputs["x_t"], teacher, fake, inputs["uncond"], _GUIDANCE, inputs["power"])


def _ours_to_x0(case: Case, inputs: Inputs) -> Call:
    schedule = {"alpha": inputs["alpha"], "sigma": inputs["sigma"]}
    return partial(fd.to_x0, inputs["x"], inputs["x_t"], prediction="eps", **schedule)


OPS: dict[str, Op] = {
    "f_distill": Op(
        _with_logits,
        _ours_f_distill,
        lambda case, i: partial(baselines.f_distill, *_xtf(i), *_eager_weights(case, i), *_eager_options(case, i)),
        leaves=("x",),
    ),
    "distribution_matching": Op(
        _samples,
        lambda case, i: partial(fd.distribution_matching_loss, *_xtf(i), **_matching_options(case, i)),
        lambda case, i: partial(baselines.matching, *_xtf(i), *_eager_options(case, i)),
        leaves=("x",),
    ),
    "dmd2": Op(_noisy, _ours_dmd2, _eager_dmd2, leaves=("x",), traffic=lambda case: 6.0 * case.tensor_bytes),
    "score_difference": Op(
        _samples,
        lambda case, i: partial(fd.score_difference, *_xtf(i), **_matching_options(case, i)),
        lambda case, i: partial(baselines.score_difference, *_xtf(i), *_eager_options(case, i)),
    ),
    "score_identity": Op(
        _samples,
        lambda case, i: partial(fd.score_identity_loss, *_xtf(i), alpha=_ALPHA),
        lambda case, i: partial(baselines.score_identity, *_xtf(i), _ALPHA),
        leaves=("x", "teacher", "fake"),
        traffic=lambda case: 6.0 * case.tensor_bytes,
    ),
    "to_x0": Op(
        _noisy,
        _ours_to_x0,
        lambda case, i: partial(baselines.to_x0, i["x"], i["x_t"], i["alpha"], i["sigma"]),
        fused=False,
        leaves=("x",),
        traffic=lambda case: (3.0 if case.mode == "forward" else 5.0) * case.tensor_bytes,
    ),
    "f_weights": Op(
        _alone,
        lambda case, i: partial(fd.f_weights, i["logits"], **_weight_options(case, i)),
        lambda case, i: partial(baselines.f_weights, *_eager_weights(case, i)),
        traffic=lambda case: case.shape[0] * (case.torch_dtype.itemsize * HEADS + 8.0 + 4.0),
    ),
    "gan_generator": Op(
        _gan,
        lambda case, i: partial(fd.gan_generator_loss, i["fake"]),
        lambda case, i: partial(baselines.gan_generator, i["fake"]),
        fused=False,
        leaves=("fake",),
        traffic=lambda case: _logit_bytes(case, 1),
    ),
    "gan_discriminator": Op(
        _gan,
        lambda case, i: partial(fd.gan_discriminator_loss, i["real"], i["fake"]),
        lambda case, i: partial(baselines.gan_discriminator, i["real"], i["fake"]),
        fused=False,
        leaves=("real", "fake"),
        traffic=lambda case: _logit_bytes(case, 2),
    ),
}
