"""Compiles the Triton kernels that calls of the back end launch, for a GPU that need not be there, and prints what was
made of them as JSON: registers spilled, widths of the loads and stores. Run by test_triton_compile.py, in a process of
its own, since kernels are either interpreted or compiled:

    python compile_triton.py sm_90          # one sample size for each kernel, the calls that need the most registers
    python compile_triton.py sm_90 --all    # minutes

With --batches nothing is compiled: it prints which batch sizes Triton would compile another kernel for.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fdistill_ops import get_divergence
from fdistill_ops._call import LossCall, Operands, WeightCall
from fdistill_ops.backends import triton as backend
from fdistill_ops.params import PREDICTIONS, REDUCTIONS, RULES, LossParams, WeightParams

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
SAMPLES = {"latent": (4, 64, 64), "large": (16, 64, 64), "image": (3, 32, 32), "small latent": (8, 32, 32)}
FEW_SAMPLES = ("latent", "large")
FEW_CALLS = (
    "f_distill, statistics",
    "guided, converted, masked",
    "rows",
    "mixed",
    "score identity",
    "backward",
    "32 bins",
    "many bins",
    "many bins, float64",
)


class NoDriver:
    """Stands for the driver of a GPU that is not there: enough to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def inspect_nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    local = re.findall(r"\b(?:STL|LDL)\b", listing)
    return {
        "registers": int(registers),
        "spilled": int(stack) + len(local),
        "wide_loads": len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", listing)),
        "wide_stores": len(re.findall(r"\bSTG\.E(?:\.\w+)*\.128\b", listing)),
    }


def inspect_amd(assembly: str) -> dict[str, Any]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])  # type: ignore[index]

    return {
        "registers": field("vgpr_count"),
        "spilled": field("vgpr_spill_count") + len(re.findall(r"\bscratch_(?:load|store)", assembly)),
        "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        "wide_stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", assembly)),
    }


def calls(shape: tuple[int, ...], dtype: torch.dtype, batch: int = 4) -> dict[str, Any]:
    """Calls of the back end, by name, on tensors of which only shapes, dtypes, strides and alignment matter."""
    x, teacher, fake, uncond, x_t = (torch.empty(batch, *shape, dtype=dtype) for _ in range(5))
    inputs = (x, teacher, fake)
    logits, t, bins = torch.empty(batch, 2), torch.empty(batch), torch.ones(10)
    rows, schedule = torch.empty(batch, shape[0]), torch.empty(batch, dtype=torch.float64)
    mask = torch.empty(batch, *shape, dtype=torch.bool)
    broadcast = torch.empty(batch, 1, *shape[1:], dtype=torch.bool).expand(batch, *shape)
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32

    def loss(rule: str = "distribution_matching", sources: Any = None, **tensors: Any) -> Any:
        operands = Operands(**dict(zip(("x", "teacher", "fake"), inputs, strict=True)) | tensors)
        prediction = PREDICTIONS["v" if "x_t" in tensors else "x0"]
        identity = rule == "score_identity"
        params = LossParams(prediction=prediction, need_stats=True, rule=RULES[rule])
        needs = (True, identity, identity)

        def call(**numbers: Any) -> Any:
            weights = None if sources is None else weighting(*sources)
            return serve.loss(LossCall(operands, params._replace(**numbers), "triton", weights), needs)

        return call

    def weighting(logits: Any, t: Any, bins: Any) -> WeightCall:
        return WeightCall(logits, t, bins, get_divergence("js"), WeightParams())

    serve = backend.backend
    total = LossCall(Operands(*inputs), LossParams(reduction=REDUCTIONS["sum"]), "triton")
    f_distill, sample = loss(sources=(logits[:, 0], None, None)), REDUCTIONS["sample"]
    broadcast_mask = loss(mask=broadcast)
    return {
        "f_distill": lambda: f_distill(need_stats=False),
        "f_distill, statistics": loss(sources=(logits, t, bins)),
        "matching": loss(),
        "difference": lambda: serve.difference(total, None),
        "guided": loss(teacher_uncond=uncond, guidance_scale=schedule),
        "converted": loss(x_t=x_t, alpha=schedule, sigma=schedule),
        "guided, converted, masked": loss(
            teacher_uncond=uncond, x_t=x_t, alpha=schedule, sigma=schedule, weight=schedule, mask=mask
        ),
        "broadcast mask": lambda: broadcast_mask(reduction=sample),
        "rows": loss(weight=rows, x_t=x_t, alpha=rows, sigma=schedule),
        "mixed": loss(teacher=teacher.to(other), fake=fake.to(other)),
        "score identity": loss("score_identity", weight=schedule),
        "32 bins": loss(sources=(logits, t, torch.ones(32))),
        "many bins": lambda: serve.f_weights(weighting(logits, t, torch.ones(1000))),
        "many bins, float64": lambda: serve.f_weights(weighting(logits.double(), t, torch.ones(1000))),
        "backward": lambda: serve.scale_gradient(x, torch.ones(batch), torch.ones(()), False),
        "backward by sample": lambda: [
            serve.scale_gradient(x, torch.ones(batch), upstream, False)
            for upstream in (torch.ones(()).expand(batch), torch.ones(batch), torch.ones(2 * batch + 1)[1::2])
        ],
    }


def batches(target: GPUTarget) -> dict[str, list[list[int]]]:
    """For each call and kernel the batch sizes 1 to 33, those together that one compiled kernel serves."""
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    current: tuple[str, int] = ("", 0)

    def record(kernel: Any, grid: int, device: torch.device, program: Any, *rest: Any, **constants: Any) -> None:
        *_, bind = kernel.device_caches[0]
        _, specialization, options = bind(*rest, **constants, **program.options(backend.device_of(device)), debug=False)
        call, batch = current
        found[f"{call}: {kernel.fn.__name__}"][f"{specialization} {options}"].append(batch)

    stand_in(target, record)
    for shape in (*SAMPLES.values(), (3, 5, 5), (3, 33, 163)):
        for batch in (1, 2, 3, 16, 33):
            for name, call in calls(shape, torch.float32, batch).items():
                current = (f"{name} {shape}", batch)
                call()
    return {name: list(kernels.values()) for name, kernels in found.items()}


def stand_in(target: GPUTarget, launch: Any) -> None:
    """Has the back end take this GPU for the one it runs on, and launch by this function."""
    driver.set_active(NoDriver(target))
    backend.launch = launch
    backend.device_of = lambda _: backend.Device(132, 50 << 20, target.warp_size, target.backend == "cuda")


def main(target: GPUTarget, everything: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    current: dict[str, str] = {}

    def compile_only(kernel: Any, grid: int, device: torch.device, program: Any, *rest: Any, **constants: Any) -> None:
        options = program.options(backend.device_of(device))
        compiled = kernel.warmup(*rest, grid=(grid,), **constants, **options)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        is_nvidia = target.backend == "cuda"
        facts = inspect_nvidia(compiled.asm["cubin"]) if is_nvidia else inspect_amd(compiled.asm["amdgcn"])
        found.append(current | {"kernel": kernel.fn.__name__, "block": program.block} | facts)

    stand_in(target, compile_only)
    for dtype_name, dtype in DTYPES.items():
        for sample, shape in SAMPLES.items():
            for name, call in calls(shape, dtype).items():
                if everything or (sample in FEW_SAMPLES and name in FEW_CALLS):
                    current = {"call": name, "dtype": dtype_name, "sample": sample}
                    call()
    return found


if __name__ == "__main__":
    target = TARGETS[sys.argv[1]]
    print(json.dumps(batches(target) if "--batches" in sys.argv else main(target, "--all" in sys.argv), indent=1))
