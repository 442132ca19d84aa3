"""The CUDA kernels as nvcc compiled them: every kernel for every architecture, without spills, with 128-bit accesses.
And that the module with them still works where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fdistill_ops as fd
from fdistill_ops import _native

pytestmark = pytest.mark.skipif(
    _native.cuda_reason() is not None, reason=f"no CUDA kernels to look at: {_native.cuda_reason()}"
)

DENSE = ("float", "double", "fdistill::bfloat16", "fdistill::float16")
PLAIN = ("float", "fdistill::bfloat16")
STRIDED = ("float", "double")
SMALL = ("f_weights_kernel", "count_kernel", "scale_kernel")


def record() -> dict[str, list[str]]:
    return json.loads(Path(_native.__file__).with_name("_build.json").read_text())["cuda"]


def tool(name: str) -> str:
    """From the CUDA toolkit, or from Triton's package, which brings it."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(name, path=Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    if found is None:
        pytest.skip(f"{name} is neither installed nor in Triton's package")
    return found


def dump(*arguments: str) -> str:
    disassembler = str(Path(tool("nvdisasm")).parent)  # cuobjdump calls it
    environment = os.environ | {"PATH": os.pathsep.join([disassembler, os.environ["PATH"]])}
    command = [tool("cuobjdump"), *arguments, _native.module().__file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def kernels() -> dict[str, dict[str, str]]:
    """For each architecture its kernels, by mangled name, and what they use."""
    found: dict[str, dict[str, str]] = {}
    for part in dump("--dump-resource-usage").split("arch = ")[1:]:
        of_arch = found.setdefault(part.split()[0], {})
        of_arch |= dict(re.findall(r"Function (\S+):\s*\n\s*(.+)", part))
    return found


def names(mangled: str, kind: str, element: str, plain: bool) -> bool:
    """Whether that is the loss kernel of that kind: on_chip or split, Dense, Mixed or Strided, of these elements."""
    code = {"float": "f", "double": "d"}.get(element, element.rpartition("::")[2])
    kernel, access = kind.split()
    return kernel in mangled and access in mangled and code in mangled.split(access)[1] and f"Lb{int(plain)}" in mangled


def test_every_kernel_for_every_architecture() -> None:
    found = kernels()
    assert set(found) == {f"sm_{arch}" for arch in record()["archs"]}
    for arch, of_arch in found.items():
        for small in SMALL:
            assert sum(small in name for name in of_arch) == 1, (arch, small)
        expected = [(scheme, "Dense", element, False) for scheme in ("on_chip", "split") for element in DENSE]
        expected += [(scheme, "Dense", element, True) for scheme in ("on_chip", "split") for element in PLAIN]
        expected += [(scheme, "Strided", element, False) for scheme in ("on_chip", "split") for element in STRIDED]
        expected += [(scheme, "Mixed", "", plain) for scheme in ("on_chip", "split") for plain in (False, True)]
        assert len(of_arch) == len(SMALL) + len(expected)
        for scheme, access, element, plain in expected:
            matching = [name for name in of_arch if names(name, f"{scheme} {access}", element, plain)]
            assert matching, (arch, scheme, access, element, plain)


def test_the_last_architecture_as_ptx() -> None:
    assert f"sm_{record()['archs'][-1]}.ptx" in dump("--list-ptx")


def test_no_spills() -> None:
    for arch, of_arch in kernels().items():
        for name, usage in of_arch.items():
            used = dict(re.findall(r"(\w+):(\d+)", usage))
            assert used["STACK"] == used["LOCAL"] == "0", (arch, name, usage)


@pytest.mark.slow
@pytest.mark.no_poison
def test_vector_accesses() -> None:
    """128-bit loads and stores in every kernel of dense operands: of each operand, and of two groups at once in the
    plain ones; where dtypes are mixed also 64-bit ones, for 16-bit elements."""
    for arch, of_arch in kernels().items():
        vector = [name for name in of_arch if "Dense" in name or "Mixed" in name]
        text = dump("--dump-sass", "--gpu-architecture", arch, "--function", ",".join(vector))
        parts = dict(part.split("\n", 1) for part in text.split("Function : ")[1:])
        assert set(parts) == set(vector)
        for name, code in parts.items():
            for bits in ("128", "64") if "Mixed" in name else ("128",):
                loads, stores = (len(re.findall(rf"\b{kind}\S*\.{bits}\b", code)) for kind in ("LDG", "STG"))
                assert loads >= (6 if "Lb1" in name else 5), (arch, name, bits, loads)
                assert stores >= (2 if "Lb1" in name else 3), (arch, name, bits, stores)
            assert not re.search(r"\b(LDL|STL)\b", code), (arch, name)


def instructions(code: str) -> list[str]:
    """The names of a kernel's instructions."""
    return re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", code)


@pytest.mark.slow
@pytest.mark.no_poison
def test_one_thread_fences_a_cluster() -> None:
    """A barrier that releases would have a fence before it in every thread; here it stands in a branch for one."""
    for arch, of_arch in kernels().items():
        if int(re.sub(r"\D", "", arch)) < 90:
            continue
        clustered = [name for name in of_arch if "on_chip" in name]
        text = dump("--dump-sass", "--gpu-architecture", arch, "--function", ",".join(clustered))
        for part in text.split("Function : ")[1:]:
            found = instructions(part)
            arrivals = [i for i, name in enumerate(found) if name == "UCGABAR_ARV"]
            assert arrivals, (arch, part[:100])
            for i in arrivals:
                assert not found[i - 1].endswith("ERRBAR"), (arch, part[:100])  # which ends a fence


def test_the_module_loads_without_a_gpu() -> None:
    """Importing it makes no CUDA call; where there is no GPU the back end says so."""
    import torch

    assert hasattr(_native.module(), "cuda")
    assert "cuda_skipped" not in fd.build_info()
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "cuda" not in fd.available_backends()
    with pytest.raises(RuntimeError, match=r"'cuda' is not available: PyTorch finds no GPU"):
        fd.set_backend("cuda")
    with pytest.raises(RuntimeError, match="cudaGetDevice"):
        _native.module().cuda.scale_gradient(16, 16, 0, 1, 4, (16, 0, (0,)), None, 0)
