"""The operators: torch.library definitions, their fake implementations, and autograd.

Eager calls on plain tensors go from the public function straight to the back end's kernel, whose gradient
:class:`_Attach` hangs into the graph. Tracing (torch.compile, torch.export, FakeTensor and other modes, vmap)
goes through ``torch.ops.fdistill``, the same kernels as operators.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from ._autograd import refuse_double_backward
from ._checks import OptionalTensors, compute_dtype
from .params import REDUCTIONS, LossParams, WeightParams, schema
from .stats import FIELDS

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_SAMPLE = REDUCTIONS["sample"]
_keep_graph = torch._C._autograd._get_current_graph_task_keep_graph
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_DERIVATIVES = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)


def _traced(x: Tensor) -> bool:
    """Whether somebody watches the operators: the call must then be one."""
    if torch.compiler.is_compiling():
        return True
    transform = _functorch_level()
    if transform is not None and transform.key() in _DERIVATIVES:
        raise RuntimeError(
            "fdistill_ops: torch.func's derivatives (grad, vjp, jvp, jacrev, ...) are not supported; "
            "use backward() or torch.autograd.grad"
        )
    return transform is not None or _dispatch_modes() > 0 or type(x) not in _PLAIN_TYPES


def _refuse_tangents(*inputs: Tensor) -> None:
    """Forward-mode differentiation would otherwise take the loss for a constant."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
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


# Function.apply without its search for functorch's wrappers, which _traced has sent elsewhere.
_attach = super(torch.autograd.Function, _Attach).apply


def _scaled(gradient: Tensor, scale: Tensor, upstream: Tensor | None) -> Tensor:
    """gradient * scale * upstream: scale is [B] for float16 gradients and plays no part for others, upstream is
    0-dimensional or [B]."""
    if gradient.dtype == torch.float16:
        factor = scale if upstream is None else upstream * scale
    elif upstream is None:
        return gradient
    else:
        factor = upstream
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


def _define(name: str, arguments: str, returns: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _lib.define(f"{name}({arguments}) -> ({returns})", tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fdistill::{name}", fake, lib=_lib)


def _register_autograd(name: str, n_inputs: int, gradients: slice, inputs: Sequence[int]) -> None:
    """``gradients`` of the outputs, followed by their scale, are the derivatives with respect to those inputs."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[gradients.stop], *output[gradients])

    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        scale, *saved = ctx.saved_tensors
        result: list[Tensor | None] = [None] * n_inputs
        for index, gradient in zip(inputs, saved, strict=True):
            if ctx.needs_input_grad[index]:
                result[index] = _scaled(gradient, scale, upstream)
        return tuple(result)

    torch.library.register_autograd(f"fdistill::{name}", backward, setup_context=setup_context, lib=_lib)


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
    return _present(backends.kernels(logits.device).f_weights(logits, t, bins, WeightParams(*numbers)), logits)


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


def f_weights(
    logits: Tensor, t: Tensor | None, bins: Tensor | None, params: WeightParams
) -> tuple[Tensor, Tensor, Tensor]:
    """weights [B], the new histogram (empty without one), [ratio mean, clipped low, clipped high] (float64)."""
    if _traced(logits):
        return torch.ops.fdistill.f_weights(logits.detach(), t, bins, *params)
    return backends.kernels(logits.device).f_weights(logits, t, bins, params)


# distribution matching ------------------------------------------------------------------------------------------------


def _distribution_matching(x: Tensor, teacher: Tensor, fake: Tensor, *rest: Any) -> Any:
    tensors, params, need_grad = rest[:_N_TENSORS], LossParams(*rest[_N_TENSORS:-1]), rest[-1]
    return _present(backends.kernels(x.device).distribution_matching(x, teacher, fake, tensors, params, need_grad), x)


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
    need_grad = x.requires_grad and torch.is_grad_enabled()
    _refuse_tangents(x)
    if _traced(x):
        teacher, fake, tensors = teacher.detach(), fake.detach(), _detached(tensors)
        loss, _, _, stats = torch.ops.fdistill.distribution_matching(x, teacher, fake, *tensors, *params, need_grad)
        return loss, stats.detach()
    backend = backends.kernels(x.device)
    loss, gradient, scale, stats = backend.distribution_matching(x, teacher, fake, tensors, params, need_grad)
    return (_attach(backend, (loss,), (gradient,), scale, x) if need_grad else loss), stats


def difference(
    x: Tensor, teacher: Tensor, fake: Tensor, tensors: OptionalTensors, params: LossParams, out: Tensor | None
) -> Tensor:
    """g itself: the gradient of the sum."""
    if _traced(x):
        with torch.no_grad():
            _, g, scale, _ = torch.ops.fdistill.distribution_matching(x, teacher, fake, *tensors, *params, True)
            g = _scaled(g, scale, None)
            return g if out is None else out.copy_(g)
    return backends.kernels(x.device).difference(x, teacher, fake, tensors, params, out)


def _detached(tensors: OptionalTensors) -> OptionalTensors:
    return tuple(tensor if tensor is None else tensor.detach() for tensor in tensors)  # type: ignore[return-value]


# f-distill ------------------------------------------------------------------------------------------------------------


def _f_distill(
    x: Tensor, teacher: Tensor, fake: Tensor, logits: Tensor, t: Tensor | None, bins: Tensor | None, *rest: Any
) -> Any:
    tensors, numbers, need_grad = rest[:_N_TENSORS], rest[_N_TENSORS:-1], rest[-1]
    weight_params, params = WeightParams(*numbers[:_N_WEIGHT]), LossParams(*numbers[_N_WEIGHT:])
    backend = backends.kernels(x.device)
    outputs = backend.f_distill(x, teacher, fake, logits, t, bins, tensors, weight_params, params, need_grad)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, differentiable in x, the statistics, the new histogram (empty without one)."""
    need_grad = x.requires_grad and torch.is_grad_enabled()
    _refuse_tangents(x)
    if _traced(x):
        teacher, fake, logits, tensors = teacher.detach(), fake.detach(), logits.detach(), _detached(tensors)
        loss, _, _, stats, bins = torch.ops.fdistill.f_distill(
            x,
            teacher,
            fake,
            logits,
            t,
            bins,
            *tensors,
            *weight_params,
            *params,
            need_grad,
        )
        return loss, stats.detach(), bins.detach()
    backend = backends.kernels(x.device)
    loss, gradient, scale, stats, bins = backend.f_distill(
        x, teacher, fake, logits, t, bins, tensors, weight_params, params, need_grad
    )
    return (_attach(backend, (loss,), (gradient,), scale, x) if need_grad else loss), stats, bins


# score identity -------------------------------------------------------------------------------------------------------


def _score_identity(
    x: Tensor, teacher: Tensor, fake: Tensor, weight: Any, mask: Any, normalizer: Any, *rest: Any
) -> Any:
    params, need_grads = LossParams(*rest[:_N_LOSS]), rest[_N_LOSS:]
    backend = backends.kernels(x.device)
    return _present(backend.score_identity(x, teacher, fake, weight, mask, normalizer, params, need_grads), x)


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
    grad_enabled = torch.is_grad_enabled()
    inputs = (x, teacher, fake)
    need_grads = [grad_enabled and tensor.requires_grad for tensor in inputs]
    _refuse_tangents(*inputs)
    if _traced(x):
        weight, mask, normalizer = (v if v is None else v.detach() for v in (weight, mask, normalizer))
        outputs = torch.ops.fdistill.score_identity(*inputs, weight, mask, normalizer, *params, *need_grads)
        return outputs[0], outputs[5].detach()
    backend = backends.kernels(x.device)
    loss, *gradients, scale, stats = backend.score_identity(*inputs, weight, mask, normalizer, params, need_grads)
    if any(need_grads):
        wanted = [i for i in range(3) if need_grads[i]]
        loss = _attach(backend, (loss,), [gradients[i] for i in wanted], scale, *[inputs[i] for i in wanted])
    return loss, stats
