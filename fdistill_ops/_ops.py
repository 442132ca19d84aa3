"""The operators: torch.library definitions, their fake implementations, and autograd.

Eager calls on plain tensors go from the public function straight to the back end's kernel, whose gradient
:class:`_Attach` hands to autograd. Tracing (torch.compile, torch.export, FakeTensor and other modes, vmap) and tensors
of other types go through ``torch.ops.fdistill``: the same kernels as operators, which choose the back end when they
run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _reference, backends
from ._autograd import refuse_double_backward
from ._checks import OPTIONAL_NAMES, OptionalTensors, compute_dtype, named
from ._torch import DERIVATIVES as _DERIVATIVES
from ._torch import DUAL_LEVEL as _DUAL_LEVEL
from ._torch import dispatch_modes as _dispatch_modes
from ._torch import functorch_level as _functorch_level
from ._torch import keep_graph as _keep_graph
from ._torch import register_autograd, register_fake, unwrapped_apply
from ._validation import PLAIN_TYPES, call_named, refuse_functional, same_device
from .params import REDUCTIONS, LossParams, WeightParams, schema
from .stats import FIELDS

_SAMPLE, _NONE = REDUCTIONS["sample"], REDUCTIONS["none"]
_PLAIN_OR_NONE = frozenset((*PLAIN_TYPES, type(None)))


def _chosen(x: Tensor) -> str:
    """The back end of a call with this tensor. Compiled code runs operators, which choose when they run."""
    return "operators" if torch.compiler.is_compiling() else backends.choose(x.device)


def _traced(*operands: Tensor | None) -> bool:
    """Whether the call must be an operator: it is being traced, or an operand is of a type that may have its own idea
    of what an operator does."""
    if torch.compiler.is_compiling():
        return True
    transform = _functorch_level()
    if transform is not None and transform.key() in _DERIVATIVES:
        raise RuntimeError(
            "fdistill_ops: torch.func's derivatives (grad, vjp, jvp, jacrev, ...) are not supported; "
            "use backward() or torch.autograd.grad"
        )
    if transform is not None or _dispatch_modes() > 0:
        return True
    return not _PLAIN_OR_NONE.issuperset(map(type, operands))


def _operator(operator: Any, operands: Mapping[str, Tensor | None], differentiable: Container[str], *rest: Any) -> Any:
    """Calls an operator with these operands, in this order, and the rest. Nothing flows to those that are not named
    differentiable."""

    def call(*values: Tensor | None) -> Any:
        pairs = zip(operands, values, strict=True)
        return operator(*[v if v is None or name in differentiable else v.detach() for name, v in pairs], *rest)

    refuse_functional(operands)
    return call_named(call, operands)


def _refuse_tangents(*inputs: Tensor) -> None:
    """Forward-mode differentiation would otherwise take the loss for a constant."""
    if getattr(forward_ad, _DUAL_LEVEL) >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs
    ):
        raise RuntimeError("fdistill_ops: forward-mode derivatives are not supported; use backward()")


# ------------------------------------------------------------------------------------------------------------ autograd


class _Attach(torch.autograd.Function):
    """Gives a computed loss the gradients computed with it: ``inputs`` are the tensors they belong to. Called as
    :data:`_attach`."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        loss: tuple[Tensor],
        gradients: Sequence[Tensor],
        scale: Tensor | None,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.backend, ctx.inputs = backend, [weakref.ref(tensor) for tensor in inputs]
        ctx.save_for_backward(scale, *gradients)
        return loss[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale, *gradients = ctx.saved_tensors
        scaled = ctx.backend.scale_gradient
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                gradients = [scaled(gradient, scale, upstream, True) for gradient in gradients]
            gradients = refuse_double_backward(gradients, ctx.inputs, upstream)
        else:
            keep = _keep_graph()
            gradients = [scaled(gradient, scale, upstream, keep) for gradient in gradients]
        return (None, None, None, None, *gradients)


# Functorch's wrappers were sent elsewhere by _traced.
_attach = unwrapped_apply(_Attach)


def _scaled(gradient: Tensor, scale: Tensor, upstream: Tensor) -> Tensor:
    """gradient * scale * upstream: scale is [B] for float16 gradients and plays no part for others, upstream is
    0-dimensional or [B]."""
    factor = upstream * scale if gradient.dtype == torch.float16 else upstream
    if factor.ndim == 1:
        factor = factor.reshape(factor.shape + (1,) * (gradient.ndim - 1))
    return (gradient * factor).to(gradient.dtype)


# ----------------------------------------------------------------------------------------------------------- operators

_lib = torch.library.Library("fdistill", "DEF")
_TENSORS = (
    "Tensor? weight, Tensor? teacher_uncond, Tensor? guidance, Tensor? mask, "
    "Tensor? x_t, Tensor? alpha, Tensor? sigma, Tensor? normalizer_rows"
)
_N_TENSORS, _N_LOSS, _N_WEIGHT = 8, len(LossParams._fields), len(WeightParams._fields)


def _serving(x: Tensor) -> Any:
    """The back end that an operator runs on."""
    return backends.kernels(backends.choose(x.device))


def _on_one_device(operands: Mapping[str, Tensor | None]) -> None:
    """Refuses an operand whose memory a kernel cannot read: whoever calls an operator by itself has not been through
    the checks of the public functions."""
    (its_name, first), *others = operands.items()
    for name, tensor in others:
        if tensor is not None and first is not None:
            same_device(tensor, name, first, its_name)


def _define(name: str, arguments: str, returns: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _lib.define(f"{name}({arguments}) -> ({returns})", tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, kernel, "CompositeExplicitAutograd")
    register_fake(f"fdistill::{name}", fake, lib=_lib)


def _register_autograd(name: str, n_inputs: int, gradients: slice, inputs: Sequence[int]) -> None:
    """``gradients`` of the outputs, followed by their scale, are the derivatives with respect to those inputs."""

    wanted = inputs

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.inputs = [weakref.ref(inputs[index]) for index in wanted]
        ctx.save_for_backward(output[gradients.stop], *output[gradients])

    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scale, *saved = ctx.saved_tensors
        result: list[Tensor | None] = [None] * n_inputs
        needed = [(i, g) for i, g in zip(wanted, saved, strict=True) if ctx.needs_input_grad[i]]
        twice = torch.is_grad_enabled()  # create_graph=True
        with torch.no_grad():
            scaled = [_scaled(gradient, scale, upstream) for _, gradient in needed]
        if twice:
            scaled = refuse_double_backward(scaled, ctx.inputs, upstream)
        for (index, _), gradient in zip(needed, scaled, strict=True):
            result[index] = gradient
        return tuple(result)

    register_autograd(f"fdistill::{name}", backward, setup_context=setup_context, lib=_lib)


def _present(outputs: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Outputs as an operator must return them: a tensor each, empty for what a back end left out."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in outputs)


def _fake_loss(
    x: Tensor, dtype: torch.dtype, params: LossParams, gradients: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """loss, gradients, the scale of float16 gradients, stats."""
    per_sample = params.reduction == _SAMPLE
    loss = x.new_empty(x.shape[:1] if per_sample else (), dtype=dtype)
    half = any(tensor is not None and tensor.dtype == torch.float16 for tensor in gradients)
    scale = x.new_empty(x.shape[0], dtype=dtype) if half else x.new_empty(0)
    stats = x.new_empty(len(FIELDS), dtype=dtype) if params.need_stats else x.new_empty(0)
    saved = [x.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in gradients]
    return loss, saved, scale, stats


# f_weights ------------------------------------------------------------------------------------------------------------


def _f_weights(logits: Tensor, t: Tensor | None, bins: Tensor | None, *numbers: Any) -> Any:
    _on_one_device({"logits": logits, "t": t, "histogram": bins})
    return _present(_serving(logits).f_weights(logits, t, bins, WeightParams(*numbers)), logits)


def _f_weights_fake(logits: Tensor, t: Tensor | None, bins: Tensor | None, *numbers: Any) -> Any:
    dtype = compute_dtype(logits)
    return (
        logits.new_empty(logits.shape[0], dtype=dtype),
        logits.new_empty(0) if bins is None else torch.empty_like(bins),
        logits.new_empty(3, dtype=torch.float64),
    )


_define(
    "f_weights",
    f"Tensor logits, Tensor? t, Tensor? bins, {schema(WeightParams)}",
    "Tensor weights, Tensor bins, Tensor ratio_stats",
    _f_weights,
    _f_weights_fake,
)


def weights(
    logits: Tensor, t: Tensor | None, bins: Tensor | None, params: WeightParams
) -> tuple[Tensor, Tensor | None, Tensor]:
    """weights [B], the new histogram (empty without one), [ratio mean, clipped low, clipped high] (float64)."""
    backend = _chosen(logits)
    if backend == "reference":
        return _reference.weights(logits, t, bins, params)
    if _traced(logits, t, bins):
        operands = {"logits": logits, "t": t, "histogram": bins}
        return _operator(torch.ops.fdistill.f_weights, operands, (), *params)
    return backends.kernels(backend).f_weights(logits, t, bins, params)


# distribution matching ------------------------------------------------------------------------------------------------


def _distribution_matching(x: Tensor, teacher: Tensor, fake: Tensor, *rest: Any) -> Any:
    tensors, params, need_grad = rest[:_N_TENSORS], LossParams(*rest[_N_TENSORS:-1]), rest[-1]
    _on_one_device(named(x, teacher, fake, tensors))
    return _present(_serving(x).distribution_matching(x, teacher, fake, tensors, params, need_grad), x)


def _distribution_matching_fake(x: Tensor, teacher: Tensor, fake: Tensor, *rest: Any) -> Any:
    params, need_grad = LossParams(*rest[_N_TENSORS:-1]), rest[-1]
    dtype = compute_dtype(x, teacher, fake, rest[1], rest[4])
    loss, (gradient,), scale, stats = _fake_loss(x, dtype, params, [x if need_grad else None])
    return loss, gradient, scale, stats


_define(
    "distribution_matching",
    f"Tensor x, Tensor teacher, Tensor fake, {_TENSORS}, {schema(LossParams)}, bool need_grad",
    "Tensor loss, Tensor gradient, Tensor gradient_scale, Tensor stats",
    _distribution_matching,
    _distribution_matching_fake,
)
_register_autograd("distribution_matching", 3 + _N_TENSORS + _N_LOSS + 1, slice(1, 2), [0])


def distribution_matching(
    x: Tensor, teacher: Tensor, fake: Tensor, tensors: OptionalTensors, params: LossParams
) -> tuple[Tensor, Tensor]:
    """The loss, differentiable in x, and the statistics (empty where none were asked for)."""
    backend = _chosen(x)
    if backend == "reference":
        return _reference.distribution_matching(x, teacher, fake, tensors, params)
    need_grad = x.requires_grad and torch.is_grad_enabled()
    _refuse_tangents(x)
    if _traced(x, teacher, fake, *tensors):
        operands = named(x, teacher, fake, tensors)
        loss, _, _, stats = _operator(torch.ops.fdistill.distribution_matching, operands, ("x",), *params, need_grad)
        return loss, stats.detach()
    kernels = backends.kernels(backend)
    loss, gradient, scale, stats = kernels.distribution_matching(x, teacher, fake, tensors, params, need_grad)
    return (_attach(kernels, (loss,), (gradient,), scale, x) if need_grad else loss), stats


def difference(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    tensors: OptionalTensors,
    params: LossParams,
    out: Tensor | None,
) -> Tensor:
    """g itself: the gradient of the sum."""
    backend = _chosen(x)
    if backend == "reference":
        return _reference.difference(x, teacher, fake, tensors, params, out)
    if _traced(x, teacher, fake, *tensors, out):
        with torch.no_grad():
            wide = x.detach().float() if x.dtype is torch.float16 else x  # whose gradients are stored without a scale
            operands = named(wide, teacher, fake, tensors)
            _, g, _, _ = _operator(torch.ops.fdistill.distribution_matching, operands, (), *params, True)
            return g.to(x.dtype) if out is None else call_named(Tensor.copy_, {"out": out}, g)
    return backends.kernels(backend).difference(x, teacher, fake, tensors, params, out)


# f-distill ------------------------------------------------------------------------------------------------------------


def _f_distill(
    x: Tensor, teacher: Tensor, fake: Tensor, logits: Tensor, t: Tensor | None, bins: Tensor | None, *rest: Any
) -> Any:
    tensors, numbers, need_grad = rest[:_N_TENSORS], rest[_N_TENSORS:-1], rest[-1]
    weight_params, params = WeightParams(*numbers[:_N_WEIGHT]), LossParams(*numbers[_N_WEIGHT:])
    _on_one_device(named(x, teacher, fake, tensors) | {"logits": logits, "t": t, "histogram": bins})
    outputs = _serving(x).f_distill(x, teacher, fake, logits, t, bins, tensors, weight_params, params, need_grad)
    return _present(outputs, x)


def _f_distill_fake(
    x: Tensor, teacher: Tensor, fake: Tensor, logits: Tensor, t: Tensor | None, bins: Tensor | None, *rest: Any
) -> Any:
    outputs = _distribution_matching_fake(x, teacher, fake, *rest[:_N_TENSORS], *rest[_N_TENSORS + _N_WEIGHT :])
    return *outputs, x.new_empty(0) if bins is None else torch.empty_like(bins)


_define(
    "f_distill",
    f"Tensor x, Tensor teacher, Tensor fake, Tensor logits, Tensor? t, Tensor? bins, {_TENSORS}, "
    f"{schema(WeightParams, 'weight_')}, {schema(LossParams)}, bool need_grad",
    "Tensor loss, Tensor gradient, Tensor gradient_scale, Tensor stats, Tensor new_bins",
    _f_distill,
    _f_distill_fake,
)
_register_autograd("f_distill", 6 + _N_TENSORS + _N_WEIGHT + _N_LOSS + 1, slice(1, 2), [0])


def f_distill(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    logits: Tensor,
    t: Tensor | None,
    bins: Tensor | None,
    tensors: OptionalTensors,
    weight_params: WeightParams,
    params: LossParams,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, differentiable in x, the statistics, the new histogram (empty without one)."""
    backend = _chosen(x)
    if backend == "reference":
        return _reference.f_distill(x, teacher, fake, logits, t, bins, tensors, weight_params, params)
    need_grad = x.requires_grad and torch.is_grad_enabled()
    _refuse_tangents(x)
    if _traced(x, teacher, fake, logits, t, bins, *tensors):
        head = {"x": x, "teacher": teacher, "fake": fake, "logits": logits, "t": t, "histogram": bins}
        operands = {**head, **dict(zip(OPTIONAL_NAMES, tensors, strict=True))}
        numbers = (*weight_params, *params, need_grad)
        loss, _, _, stats, bins = _operator(torch.ops.fdistill.f_distill, operands, ("x",), *numbers)
        return loss, stats.detach(), bins.detach()
    kernels = backends.kernels(backend)
    loss, gradient, scale, stats, bins = kernels.f_distill(
        x, teacher, fake, logits, t, bins, tensors, weight_params, params, need_grad
    )
    return (_attach(kernels, (loss,), (gradient,), scale, x) if need_grad else loss), stats, bins


# score identity -------------------------------------------------------------------------------------------------------


def _score_identity(
    x: Tensor, teacher: Tensor, fake: Tensor, weight: Any, mask: Any, normalizer: Any, *rest: Any
) -> Any:
    params, need_grads = LossParams(*rest[:_N_LOSS]), rest[_N_LOSS:]
    inputs = {"x": x, "teacher": teacher, "fake": fake}
    _on_one_device(inputs | {"weight": weight, "mask": mask, "normalizer": normalizer})
    return _present(_serving(x).score_identity(x, teacher, fake, weight, mask, normalizer, params, need_grads), x)


def _score_identity_fake(
    x: Tensor, teacher: Tensor, fake: Tensor, weight: Any, mask: Any, normalizer: Any, *rest: Any
) -> Any:
    params, need_grads = LossParams(*rest[:_N_LOSS]), rest[_N_LOSS:]
    wanted = [tensor if need else None for tensor, need in zip((x, teacher, fake), need_grads, strict=True)]
    loss, gradients, scale, stats = _fake_loss(x, compute_dtype(x, teacher, fake), params, wanted)
    return loss, *gradients, scale, stats


_define(
    "score_identity",
    "Tensor x, Tensor teacher, Tensor fake, Tensor? weight, Tensor? mask, Tensor? normalizer_rows, "
    f"{schema(LossParams)}, bool need_x, bool need_teacher, bool need_fake",
    "Tensor loss, Tensor d_x, Tensor d_teacher, Tensor d_fake, Tensor gradient_scale, Tensor stats",
    _score_identity,
    _score_identity_fake,
)
_register_autograd("score_identity", 6 + _N_LOSS + 3, slice(1, 4), [0, 1, 2])


def score_identity(
    x: Tensor,
    teacher: Tensor,
    fake: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    normalizer: Tensor | None,
    params: LossParams,
) -> tuple[Tensor, Tensor]:
    """The loss, differentiable in x, teacher and fake, and the statistics (empty where none were asked for)."""
    backend = _chosen(x)
    if backend == "reference" or params.reduction == _NONE:
        return _reference.score_identity(x, teacher, fake, weight, mask, normalizer, params)
    grad_enabled = torch.is_grad_enabled()
    inputs = (x, teacher, fake)
    need_grads = [grad_enabled and tensor.requires_grad for tensor in inputs]
    _refuse_tangents(*inputs)
    if _traced(*inputs, weight, mask, normalizer):
        operands = {"x": x, "teacher": teacher, "fake": fake, "weight": weight, "mask": mask, "normalizer": normalizer}
        numbers = (*params, *need_grads)
        outputs = _operator(torch.ops.fdistill.score_identity, operands, ("x", "teacher", "fake"), *numbers)
        return outputs[0], outputs[5].detach()
    kernels = backends.kernels(backend)
    loss, *gradients, scale, stats = kernels.score_identity(*inputs, weight, mask, normalizer, params, need_grads)
    if any(need_grads):
        wanted = [i for i in range(3) if need_grads[i]]
        loss = _attach(kernels, (loss,), [gradients[i] for i in wanted], scale, *[inputs[i] for i in wanted])
    return loss, stats
