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
from ._call import NAMES, LossCall, Needs, Operands, WeightCall, WeightResult, compute_dtype
from ._torch import DERIVATIVES as _TRANSFORMS
from ._torch import DUAL_LEVEL as _DUAL_LEVEL
from ._torch import dispatch_modes as _dispatch_modes
from ._torch import functorch_level as _functorch_level
from ._torch import keep_graph as _keep_graph
from ._torch import register_autograd, register_fake, unwrapped_apply
from ._validation import PLAIN_TYPES, call_named, refuse_functional, same_device
from .divergences import divergence_of
from .params import DERIVATIVES, REDUCTIONS, LossParams, WeightParams, schema
from .stats import FIELDS

_SAMPLE = REDUCTIONS["sample"]
_PLAIN_OR_NONE = frozenset((*PLAIN_TYPES, type(None)))
_DIFFERENTIABLE = NAMES[:3]
_NOTHING: Needs = (False, False, False)


def _traced(*operands: Tensor | None) -> bool:
    """Whether the call must be an operator: it is being traced, or an operand is of a type that may have its own idea
    of what an operator does."""
    if torch.compiler.is_compiling():
        return True
    transform = _functorch_level()
    if transform is not None and transform.key() in _TRANSFORMS:
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
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
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
        ctx.backend, ctx.inputs = backend, list(map(weakref.ref, inputs))
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


def _optional(names: Sequence[str]) -> str:
    return ", ".join(f"Tensor? {name}" for name in names)


def _serving(x: Tensor) -> backends.Backend:
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


def _present(outputs: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Outputs as an operator must return them: a tensor each, empty for what a back end left out."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in outputs)


# f_weights ------------------------------------------------------------------------------------------------------------


def _weight_call(logits: Tensor, t: Tensor | None, bins: Tensor | None, numbers: Sequence[Any]) -> WeightCall:
    params = WeightParams(*numbers)
    return WeightCall(logits, t, bins, divergence_of(params.kind, params.a), params)


def _f_weights(logits: Tensor, t: Tensor | None, bins: Tensor | None, *numbers: Any) -> Any:
    _on_one_device({"logits": logits, "t": t, "histogram": bins})
    return _present(_serving(logits).f_weights(_weight_call(logits, t, bins, numbers)), logits)


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


def f_weights(call: WeightCall, backend: str) -> WeightResult:
    """The f-weights of a divergence that kernels know, within this process."""
    if backend == "reference":
        return _reference.f_weights(call)
    if _traced(call.logits, call.t, call.bins):
        return WeightResult(*_operator(torch.ops.fdistill.f_weights, call.named(), (), *call.params))
    return backends.kernels(backend).f_weights(call)


# loss -----------------------------------------------------------------------------------------------------------------

_SOURCES = ("logits", "t", "bins")
_RETURNS = ("loss", "d_x", "d_teacher", "d_fake", "gradient_scale", "stats", "new_bins")


class _Arguments:
    """The arguments of the operator, apart."""

    def __init__(self, *values: Any) -> None:
        remaining = iter(values)

        def take(n: int) -> list[Any]:
            return [next(remaining) for _ in range(n)]

        self.operands = Operands(*take(len(NAMES)))
        self.sources = take(len(_SOURCES))
        self.weight_numbers = take(len(WeightParams._fields))
        self.params = LossParams(*take(len(LossParams._fields)))
        of_x, of_teacher, of_fake = DERIVATIVES[self.params.rule]
        x, teacher, fake = remaining
        self.needs: Needs = (x and of_x, teacher and of_teacher, fake and of_fake)

    def named(self) -> dict[str, Tensor | None]:
        return self.operands.named() | dict(zip(("logits", "t", "histogram"), self.sources, strict=True))

    def call(self) -> LossCall:
        logits, t, bins = self.sources
        weights = None if logits is None else _weight_call(logits, t, bins, self.weight_numbers)
        return LossCall(self.operands, self.params, "operators", weights)


def _loss(*values: Any) -> Any:
    given = _Arguments(*values)
    _on_one_device(given.named())
    x = given.operands.x
    result = _serving(x).loss(given.call(), given.needs)
    return _present((result.loss, *result.gradients, result.scale, result.stats, result.bins), x)


def _loss_fake(*values: Any) -> Any:
    given = _Arguments(*values)
    x, params, bins = given.operands.x, given.params, given.sources[-1]
    dtype, nothing = given.operands.compute_dtype(), x.new_empty(0)
    wanted = [v if need else None for v, need in zip(given.operands[:3], given.needs, strict=True)]
    half = any(tensor is not None and tensor.dtype == torch.float16 for tensor in wanted)
    return (
        x.new_empty(x.shape[:1] if params.reduction == _SAMPLE else (), dtype=dtype),
        *(x.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in wanted),
        x.new_empty(x.shape[0], dtype=dtype) if half else x.new_empty(0),
        x.new_empty(len(FIELDS), dtype=dtype) if params.need_stats else x.new_empty(0),
        nothing if bins is None else torch.empty_like(bins),
    )


_define(
    "loss",
    f"Tensor x, Tensor teacher, Tensor fake, {_optional(NAMES[3:])}, {_optional(_SOURCES)}, "
    f"{schema(WeightParams, 'weight_')}, {schema(LossParams, 'loss_')}, bool need_x, bool need_teacher, bool need_fake",
    ", ".join(f"Tensor {name}" for name in _RETURNS),
    _loss,
    _loss_fake,
)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, *gradients, scale, _, _ = output
    ctx.n, ctx.wanted = len(inputs), _Arguments(*inputs).needs
    ctx.inputs = [weakref.ref(tensor) for tensor in inputs[:3]]
    ctx.save_for_backward(scale, *gradients)


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    scale, *gradients = ctx.saved_tensors
    result: list[Tensor | None] = [None] * ctx.n
    places = [i for i, wanted in enumerate(ctx.wanted) if wanted and ctx.needs_input_grad[i]]
    twice = torch.is_grad_enabled()  # create_graph=True
    with torch.no_grad():
        scaled = [_scaled(gradients[i], scale, upstream) for i in places]
    if twice:
        scaled = refuse_double_backward(scaled, ctx.inputs, upstream)
    for i, gradient in zip(places, scaled, strict=True):
        result[i] = gradient
    return tuple(result)


register_autograd("fdistill::loss", _backward, setup_context=_save, lib=_lib)


def _traced_loss(call: LossCall, needs: Needs) -> tuple[Tensor, ...]:
    """The operator's results."""
    weights = call.weights
    sources: dict[str, Tensor | None] = dict.fromkeys(_SOURCES) if weights is None else weights.named()
    numbers = (*(WeightParams() if weights is None else weights.params), *call.params, *needs)
    differentiable = [name for name, need in zip(_DIFFERENTIABLE, needs, strict=True) if need]
    return _operator(torch.ops.fdistill.loss, call.operands.named() | sources, differentiable, *numbers)


def loss(call: LossCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, differentiable in what its rule has derivatives for; the statistics (empty or None unless asked for);
    and the histogram after this batch (likewise)."""
    if call.backend == "reference":
        return _reference.loss(call)
    x, teacher, fake = call.operands[:3]
    of_x, of_teacher, of_fake = DERIVATIVES[call.params.rule]
    needs = _NOTHING
    if torch.is_grad_enabled():
        needs = (x.requires_grad, of_teacher and teacher.requires_grad, of_fake and fake.requires_grad)
    if getattr(forward_ad, _DUAL_LEVEL) >= 0:
        _refuse_tangents(*(v for v, has in zip((x, teacher, fake), (of_x, of_teacher, of_fake), strict=True) if has))
    weights = call.weights
    sources = () if weights is None else (weights.logits, weights.t, weights.bins)
    if _traced(*call.operands, *sources):
        loss, *_, stats, bins = _traced_loss(call, needs)
        return loss, stats.detach(), bins.detach()
    kernels = backends.kernels(call.backend)
    result = kernels.loss(call, needs)
    if needs == _NOTHING:
        return result.loss, result.stats, result.bins
    if needs[1] or needs[2]:
        places = [i for i in range(3) if needs[i]]
        gradients = [result.gradients[i] for i in places]
        inputs = [call.operands[i] for i in places]
        attached = _attach(kernels, (result.loss,), gradients, result.scale, *inputs)
    else:
        attached = _attach(kernels, (result.loss,), result.gradients[:1], result.scale, x)
    return attached, result.stats, result.bins


def difference(call: LossCall, out: Tensor | None) -> Tensor:
    """g itself: the gradient of the sum."""
    if call.backend == "reference":
        return _reference.difference(call, out)
    if _traced(*call.operands, out):
        x = call.operands.x
        with torch.no_grad():
            wide = x.detach().float() if x.dtype is torch.float16 else x  # whose gradients are stored without a scale
            _, g, *_ = _traced_loss(call._replace(operands=call.operands._replace(x=wide)), (True, False, False))
            return g.to(x.dtype) if out is None else call_named(Tensor.copy_, {"out": out}, g)
    return backends.kernels(call.backend).difference(call, out)
