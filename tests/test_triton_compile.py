"""The Triton kernels compiled for GPUs that are not there: no register is spilled at the block sizes in use, and the
main path loads and stores 128 bits at a time."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
SCRIPT = Path(__file__).with_name("compile_triton.py")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDE = ("float32", "bfloat16", "float16", "float64")


@cache
def compiled(target: str, *options: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, SCRIPT, target, *options], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str) -> None:
    kernels = Counter(entry["kernel"] for entry in compiled(target))
    assert set(kernels) == {"f_weights_kernel", "sample_kernel", "chunk_kernel", "scale_kernel"}
    assert kernels["sample_kernel"] >= 6 and kernels["chunk_kernel"] >= 20
    assert {entry["dtype"] for entry in compiled(target)} == set(WIDE)


@pytest.mark.parametrize("target", TARGETS)
def test_no_register_is_spilled(target: str) -> None:
    assert [entry for entry in compiled(target) if entry["spilled"]] == []


@pytest.mark.parametrize("target", TARGETS)
def test_loads_and_stores_are_wide(target: str) -> None:
    """Those of every dtype; but coefficients within samples, and what a mask or another dtype needs beside."""
    narrow = [
        entry
        for entry in compiled(target)
        if entry["kernel"] != "f_weights_kernel" and not (entry["wide_loads"] and entry["wide_stores"])
    ]
    assert narrow == []


def test_one_kernel_for_every_batch_size() -> None:
    """What is specialised to a value or to an alignment is so for any number of samples and, in backward, for any
    incoming gradient: after warm-up, which has a sum over samples, nothing is compiled for a weighted one."""
    served = compiled("sm_90", "--batches")
    assert {name: found for name, found in served.items() if len(found) > 1} == {}
    assert {name.rpartition(": ")[2] for name in served} >= {"sample_kernel", "chunk_kernel", "scale_kernel"}
