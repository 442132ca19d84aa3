"""The Triton back end (kernels/) for CUDA tensors, NVIDIA and AMD; for CPU tensors where Triton interprets its kernels.

What runs:

- f_weights: one launch, of one program.
- A loss whose samples fit in a program's registers: one launch, which also makes the weights from the logits unless
  those are many.
- A loss of larger samples: one launch, before it one for the weights from logits.
- With a mask and a loss that is a mean over it: PyTorch's sum of the mask first.

Block sizes follow from the number of elements and the dtypes by fixed rules. Operands whose layout takes more than
three dimensions to describe are copied.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from .._call import LossCall, Operands, WeightCall, compute_dtype
from .._validation import has_memory
from ..kernels.loss import N_COUNTERS, chunk_kernel, sample_kernel
from ..kernels.scale import scale_kernel
from ..kernels.summary import FIELDS as SCRATCH_FIELDS
from ..kernels.weights import f_weights_kernel
from ..params import NORMALIZERS, PREDICTIONS, REDUCTIONS, RULES
from ..predictions import rows_like
from ._functions import Functions, Gradients, Results
from ._layout import Strides, plan
from ._shared import histogram_buffers, lasting, mark_changed, opaque, plain, rows_are_dense, scaled

_COMPUTE = {torch.float32: tl.float32, torch.float64: tl.float64}
_PREDICTIONS, _REDUCTIONS = tuple(PREDICTIONS), tuple(REDUCTIONS)
_NORMALIZERS = tuple(map(str, NORMALIZERS))
_MEAN, _SAMPLE = REDUCTIONS["mean"], REDUCTIONS["sample"]
_MEAN_ABS = NORMALIZERS["mean_abs"]
_SCORE_IDENTITY = RULES["score_identity"]

# Block sizes, in elements.
_THREADS = 512  # of a program that holds a sample
_CHUNK_BYTES = 8192  # of an operand, in a program that works on a part of a sample
_PARTS = 512  # chunks of a sample, at most
_INLINE_LOGITS = 4096  # above, the weights get a launch of their own
_INLINE_BINS = 32
_TILE_BINS = 256  # held at once

_REGISTERS = 65536  # of a multiprocessor
_SCALERS = 8  # programs of backward on a multiprocessor: few enough to cost nothing where the factor is 1


class Device(NamedTuple):
    """What the launches depend on."""

    processors: int
    cache_bytes: int
    warp: int
    nvidia: bool


@functools.cache
def device_of(device: torch.device) -> Device:
    if device.type == "cpu":  # interpreted: as on an H100
        return Device(132, 50 << 20, 32, True)
    found = torch.cuda.get_device_properties(device)
    return Device(found.multi_processor_count, found.L2_cache_size, found.warp_size, torch.version.hip is None)


class Program(NamedTuple):
    """Elements and threads of one program; registers of a thread, which NVIDIA's assembler otherwise spills to have
    fewer."""

    block: int
    threads: int
    registers: int = 128

    def options(self, device: Device) -> dict[str, int]:
        options = {"num_warps": max(1, self.threads // device.warp)}
        return options | {"maxnreg": self.registers} if device.nvidia else options

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor has room for, going by the registers of NVIDIA's."""
        return max(1, min(2048, _REGISTERS // self.registers) // self.threads)


def launch(kernel: Any, grid: int, device: torch.device, program: Program, *arguments: Any, **constants: Any) -> None:
    """Every launch goes through here."""
    options = program.options(device_of(device))
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):
            kernel.run(*arguments, grid=(grid,), warmup=False, **constants, **options)
    else:
        kernel.run(*arguments, grid=(grid,), warmup=False, **constants, **options)


_counters: dict[tuple[int, int], Tensor] = {}


def _zeros(n: int, device: torch.device) -> Tensor:
    """n int64 zeros that the kernel leaves as zeros. One buffer for each stream, whose launches follow one another; a
    CUDA graph gets its own, which it clears."""
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream)
    found = _counters.get(key)
    if found is None or found.numel() < n:
        size = max(n, 4096)
        found = _counters[key] = lasting(lambda: torch.zeros(size, dtype=torch.int64, device=device), device)
    return found


# ----------------------------------------------------------------------------------------------------------- weights


class _Weights(NamedTuple):
    """The arguments of the kernels that make weights from logits."""

    source: tuple[Tensor, Strides, Tensor | None, int]
    bins: Tensor | None
    new_bins: Tensor | None
    heads: int
    numbers: tuple[float, ...]
    constants: dict[str, Any]

    @property
    def batch(self) -> int:
        return self.source[0].shape[0]

    @property
    def n_bins(self) -> int:
        return 0 if self.bins is None else self.bins.numel()

    def histogram(self, programs: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """As so many programs take it."""
        if self.bins is None or self.new_bins is None:
            return None
        scratch = torch.empty(programs * self.n_bins, dtype=torch.float64, device=self.bins.device)
        return self.bins, self.new_bins, scratch

    @property
    def fit_beside_a_sample(self) -> bool:
        return self.batch * self.heads <= _INLINE_LOGITS and self.n_bins <= _INLINE_BINS


_TIME_DTYPES = frozenset(
    (
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    )
)


# ------------------------------------------------------------------------------------------------------------ losses


Operand = tuple[Tensor, Strides] | None  # as the kernels take one (kernels/memory.py)


class _Operands(NamedTuple):
    """The inputs and targets of a loss kernel (kernels/loss.py), and where their elements lie."""

    inputs: tuple[Operand, ...]
    rows: tuple[Operand, ...]  # those of the inputs that are coefficients
    targets: tuple[Operand, ...]
    inner: tuple[int, int]

    @property
    def rows_within_samples(self) -> bool:
        """Whether a coefficient differs within a sample."""
        return any(rows is not None and len(rows[1]) > 1 for rows in self.rows)


def _laid_out(
    elementwise: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    scalars: Sequence[Tensor | None],
    targets: Sequence[Tensor | None],
    leader: Tensor,
) -> _Operands | None:
    """``elementwise``: x, teacher, fake, uncond, x_t, mask; ``rows``: weight, alpha, sigma; ``scalars``: guidance,
    normalizer. None where the layout takes too many dimensions."""
    tensors = (*targets, *elementwise, *rows)
    layout = plan(leader.shape, leader.stride(), tuple([t if t is None else t.stride() for t in tensors]), len(rows))
    if layout is None:
        return None
    pairs = zip(tensors, layout.strides, strict=True)
    found: list[Operand] = [None if t is None or strides is None else (t, strides) for t, strides in pairs]
    written, read = tuple(found[: len(targets)]), tuple(found[len(targets) :])
    single = [t if t is None else (t, (t.stride(0) if t.ndim else 0,)) for t in scalars]
    return _Operands((*read, *single), read[len(elementwise) :], written, layout.inner)


def _operands(
    x: Tensor,
    elementwise: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    scalars: Sequence[Tensor | None],
    targets: Sequence[Tensor | None],
) -> _Operands:
    leader = next((tensor for tensor in targets if tensor is not None), x)
    found = _laid_out(elementwise, rows, scalars, targets, leader)
    if found is None:  # copies of what is not contiguous; then of coefficients too
        elementwise = [tensor if tensor is None else tensor.contiguous() for tensor in elementwise]
        targets = [t if t is None or t.is_contiguous() else torch.empty_like(t, memory_format=_DENSE) for t in targets]
        leader = x.contiguous()
        found = _laid_out(elementwise, rows, scalars, targets, leader)
    if found is None:
        rows = [tensor if tensor is None else rows_like(tensor, x).expand_as(x).contiguous() for tensor in rows]
        found = _laid_out(elementwise, rows, scalars, targets, leader)
    assert found is not None
    return found


_DENSE = torch.contiguous_format


def _sample_program(N: int, dtype: torch.dtype, heavy: bool, rows: bool) -> Program | None:
    """The program that holds a whole sample; None where its registers would not do. ``heavy``: it holds more than x,
    teacher and fake; ``rows``: coefficients for every element."""
    block = max(32, triton.next_power_of_2(N))
    limit = 16384 if dtype is torch.float32 else 4096
    limit = limit // 8 if rows else limit // 2 if heavy else limit
    if block > limit:
        return None
    threads = min(_THREADS, max(128, block // (4 if rows else 16)))
    return Program(block, threads, 128 if threads > 256 or dtype is torch.float32 else 255)


def _chunk_program(itemsize: int, dtype: torch.dtype, heavy: bool, rows: bool) -> Program:
    """The program that works on a part of a sample."""
    block = _CHUNK_BYTES // max(itemsize, 2 if dtype is torch.float32 else 8)
    return Program(block // 2 if heavy else block, 256, 168 if rows else 128)


# ------------------------------------------------------------------------------------------------------ the back end


class Triton(Functions):
    name = "triton"

    def weight_arguments(self, call: WeightCall) -> tuple[_Weights, Tensor | None]:
        logits, t, params = plain(call.logits, "logits"), call.t, call.params
        if t is not None:
            t = plain(t, "t")
            if t.dtype not in _TIME_DTYPES:
                t = t.double()
        bins, new_bins = histogram_buffers(call.bins)
        n_bins = 0 if bins is None else bins.numel()
        heads, head_stride = (logits.shape[1], logits.stride(1)) if logits.ndim == 2 else (1, 1)
        constants = {
            "KIND": params.kind,
            "WEIGHT_ZERO": params.zero_nonfinite,
            "NORMALIZE": params.normalize,
            "BINS": 1 if bins is None else min(_TILE_BINS, max(16, triton.next_power_of_2(n_bins))),
        }
        numbers = (params.low, params.high, params.min_t, params.max_t, params.ema_rate, params.eps, params.a)
        source = (logits, (logits.stride(0), head_stride), t, 0 if t is None else t.stride(0))
        return _Weights(source, bins, new_bins, heads, numbers, constants), new_bins

    def compute_weights(self, arguments: _Weights, weights: Tensor, ratio_stats: Tensor) -> None:
        w = arguments
        program = Program(min(512, 8192 // w.constants["BINS"]), 256, 255)
        launch(
            f_weights_kernel,
            1,
            weights.device,
            program,
            w.source,
            w.histogram(1),
            ratio_stats,
            weights,
            w.batch,
            w.heads,
            w.n_bins,
            *w.numbers,
            **w.constants,
            ROWS=program.block,
        )

    def compute_loss(
        self, call: LossCall, gradients: Gradients, results: Results, weight_arguments: _Weights | None
    ) -> None:
        params, score_identity = call.params, call.params.rule == _SCORE_IDENTITY
        named = call.operands.named()
        operands = Operands(*(v if v is None else plain(v, name) for name, v in named.items()))  # type: ignore[arg-type]
        x, teacher, fake, weight, uncond, guidance, mask, x_t, alpha, sigma, normalizer = operands
        dtype, device = results.loss.dtype, x.device
        B, N = x.shape[0], math.prod(x.shape[1:])
        measures = params.normalizer == _MEAN_ABS
        elementwise = [
            x if measures or score_identity else None,
            teacher,
            fake,
            uncond,
            x_t if measures else None,
            None if mask is None else mask.view(torch.uint8),
        ]

        def laid_out(weight: Tensor | None) -> _Operands:
            rows = [None if row is None or row.numel() == 0 else row for row in (weight, alpha, sigma)]
            return _operands(x, elementwise, rows, [guidance, normalizer], gradients)

        found = laid_out(weight)
        rows = found.rows_within_samples
        heavy = score_identity or uncond is not None or x_t is not None or rows
        program = _sample_program(N, dtype, heavy, rows)
        inline, ratio_stats = weight_arguments, None
        if inline is not None:
            ratio_stats = torch.empty(3, dtype=torch.float64, device=device)
            if program is None or not inline.fit_beside_a_sample:
                logits = inline.source[0]
                weight = torch.empty(logits.shape[:1], dtype=compute_dtype(logits), device=device)
                self.compute_weights(inline, weight, ratio_stats)
                inline, found = None, laid_out(weight)

        count = None
        if mask is not None and params.reduction == _MEAN:
            count = mask.sum()
        elif mask is not None and params.reduction == _SAMPLE and program is None:
            count = mask.sum(tuple(range(1, mask.ndim))) if mask.ndim <= 64 else mask.flatten(1).sum(1)
        weight_rows, n_weight_rows = None, B
        if params.need_stats and weight is not None:
            weight_rows, n_weight_rows = weight.contiguous(), weight.numel()
        arguments = (
            found.inputs,
            found.targets,
            results,
            count,
            weight_rows,
            n_weight_rows,
            ratio_stats,
            B,
            N,
            *found.inner,
            params.eps,
            params.guidance_scale,
            params.identity_alpha,
        )
        constants = {
            "C": _COMPUTE[dtype],
            "PREDICTION": _PREDICTIONS[params.prediction],
            "NORM": _NORMALIZERS[params.normalizer],
            "REDUCTION": _REDUCTIONS[params.reduction],
            "ZERO": params.zero_nonfinite,
            "IDENTITY": score_identity,
        }
        if program is not None:
            _launch_whole(program, device, B, arguments, inline, constants)
        else:
            half = results.scale is not None
            program = _chunk_program(x.itemsize, dtype, heavy, rows)
            read_twice = teacher.itemsize + (0 if uncond is None else uncond.itemsize)
            read_twice *= 2 if half or score_identity else 1
            _launch_parts(program, device, B, N, arguments, constants, read_twice, turns=2 if measures or half else 1)
        for target, written in zip(gradients, found.targets, strict=True):
            if target is not None and written is not None and written[0] is not target:
                target.copy_(written[0])

    def scale_gradient(self, gradient: Tensor, scale: Tensor | None, upstream: Tensor, keep: bool) -> Tensor:
        """In place unless the graph is kept: one launch, which reads the factor on the device and touches nothing else
        where that is 1."""
        if gradient.dtype is not torch.float16:
            scale = None
        if keep or opaque(upstream) or upstream.is_neg() or not has_memory(upstream) or not rows_are_dense(gradient):
            factor = upstream if scale is None else upstream * scale
            product = scaled(gradient, factor)
            return product if keep or opaque(factor) else gradient.copy_(product)
        if gradient.numel() == 0:
            return gradient
        B = gradient.shape[0]
        N = gradient.numel() // B
        by_sample = upstream.ndim == 1 or scale is not None or N % 16 != 0  # compiled for N divisible by 16, or not
        if not by_sample:
            B, N = 1, gradient.numel()
        program = Program(_CHUNK_BYTES // gradient.itemsize, 256)
        chunks = triton.cdiv(N, program.block)
        device = gradient.device
        launch(
            scale_kernel,
            min(B * chunks, _SCALERS * device_of(device).processors),
            device,
            program,
            gradient,
            upstream,
            upstream.stride(0) if upstream.ndim else 0,
            scale,
            N,
            chunks,
            B * chunks,
            C=_COMPUTE[upstream.dtype],
            BLOCK=program.block,
        )
        mark_changed(gradient)
        return gradient

    def empty_cache(self) -> int:
        _counters.clear()
        return 0


# ---------------------------------------------------------------------------------------------------------- launches


def _launch_whole(
    program: Program,
    device: torch.device,
    B: int,
    arguments: tuple[Any, ...],
    weights: _Weights | None,
    constants: dict[str, Any],
) -> None:
    """A program for each sample, as far as programs run at once; the weights are made there, unless None."""
    grid = max(1, min(B, device_of(device).processors * (2048 // program.threads)))
    samples = torch.empty(SCRATCH_FIELDS * B, dtype=torch.float64, device=device)
    w = weights
    launch(
        sample_kernel,
        grid,
        device,
        program,
        *arguments,
        samples,
        _zeros(1, device),
        *_NO_WEIGHTS if w is None else (w.source, w.histogram(grid), w.heads, w.n_bins, *w.numbers),
        **constants,
        **_NO_WEIGHT_CONSTANTS if w is None else w.constants,
        ROWS=128,
        BLOCK=program.block,
    )


_NO_WEIGHTS = (None, None, 1, 0, *(0.0,) * 7)
_NO_WEIGHT_CONSTANTS = {"KIND": 0, "NORMALIZE": False, "BINS": 1, "WEIGHT_ZERO": False}


def _launch_parts(
    program: Program,
    device: torch.device,
    B: int,
    N: int,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    read_twice: int,
    turns: int,
) -> None:
    """Several programs for each sample, in groups of samples of which what is read twice stays in the cache.
    ``read_twice``: bytes of an element; ``turns``: how often each part is worked on."""
    steps = triton.cdiv(triton.cdiv(N, program.block), _PARTS)
    chunks = triton.cdiv(N, program.block * steps)
    group, groups = _grouped(B, N * read_twice, chunks, program, device_of(device))
    scratch = torch.empty(B * (SCRATCH_FIELDS + chunks * 7), dtype=torch.float64, device=device)
    samples, measured, finished = scratch.split([B * SCRATCH_FIELDS, B * chunks * 2, B * chunks * 5])
    launch(
        chunk_kernel,
        max(1, turns * B * chunks),  # an empty batch has a loss too
        device,
        program,
        *arguments,
        samples,
        measured,
        finished,
        _zeros(N_COUNTERS + 2 * B, device),
        chunks,
        steps,
        group,
        groups,
        **constants,
        PARTS=_PARTS,
        BLOCK=program.block,
    )


def _grouped(B: int, bytes_read_twice: int, chunks: int, program: Program, device: Device) -> tuple[int, int]:
    """Samples of a group, and groups: of as even sizes as can be, so many samples that what is read twice of them takes
    an eighth of the cache, but no fewer than the programs that run at once take: those would wait for each other."""
    needed = triton.cdiv(device.processors * program.resident, max(1, chunks))
    kept = max(1, device.cache_bytes // max(1, 8 * bytes_read_twice))
    groups = max(1, min(triton.cdiv(B, kept), B // needed))
    group = max(1, triton.cdiv(B, groups))
    return group, max(1, triton.cdiv(B, group))


backend = Triton()
