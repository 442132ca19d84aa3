"""Compiles csrc/ with ninja: plain C++20 and, where nvcc is found, CUDA. Nothing of PyTorch is included or linked.

``setup.py`` calls this. By itself, ``python csrc/compile_kernels.py`` builds the modules into fdistill_ops/ where
neither setuptools nor pip is to be had; pybind11's headers are then taken from PyTorch if need be, and without ninja
every file is compiled anew.

Environment: CXX (default: c++, g++ or clang++), CXXFLAGS (appended); FDISTILL_CUDA (auto, 0 or 1: 1 fails without
nvcc), FDISTILL_CUDA_ARCHS ("80 90 100": the compute capabilities to compile for, the last one also as PTX), CUDA_HOME
(without it nvcc is looked for on the PATH and in /usr/local/cuda);
FDISTILL_EMULATOR=1 adds fdistill_ops._C_emulated, the CUDA kernels on the CPU, for the tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

CSRC = Path(__file__).resolve().parent
# No fused multiply-adds the source does not write: every instruction set gives the same bits.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNDEBUG"]
ISAS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    # GCC 12 warns about its own header here.
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-maybe-uninitialized"]
SOURCES = ["bindings.cpp", "cpu/loss.cpp", "cpu/parallel.cpp", "cpu/pool.cpp", "cpu/scale.cpp", "cpu/weights.cpp"]
CUDA_KERNELS = ["strided_f64", "strided_f32", "mixed", "f32", "bf16", "f16", "f64"]  # the slowest to compile first
CUDA_SOURCES = [*(f"cuda/loss_{name}.cu" for name in CUDA_KERNELS), "cuda/weights.cu", "cuda/loss.cpp"]
CUDA_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80 90 100"
CUDA_HOME = "/usr/local/cuda"  # where it usually is, on the PATH or not
EMULATOR_SOURCES = [*CUDA_SOURCES, *(f"emulator/{name}.cpp" for name in ("emulator", "fiber", "faults", "bindings"))]
EMULATOR_FLAGS = ["-DFDISTILL_EMULATOR", "-O2", "-Wno-unknown-pragmas", "-x", "c++"]
EMULATE = os.environ.get("FDISTILL_EMULATOR") == "1"
MODULES = ["_C", *(["_C_emulated"] if EMULATE else [])]


class NoCompiler(Exception):
    """Why the compiled module is left out."""


def find_compiler() -> list[str]:
    wanted = os.environ.get("CXX")
    candidates = [shlex.split(wanted)] if wanted else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    names = " or ".join(command[0] for command in candidates)
    raise NoCompiler(f"no C++ compiler ({names} is not on the PATH) when the package was built")


class NoCuda(Exception):
    """Why the compiled module has no CUDA kernels."""


def find_nvcc() -> list[str]:
    """nvcc with the architectures to compile for."""
    wanted = os.environ.get("FDISTILL_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FDISTILL_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        raise NoCuda("FDISTILL_CUDA=0 when the package was built")
    home = os.environ.get("CUDA_HOME")
    nvcc = None if home else shutil.which("nvcc")
    nvcc = nvcc or shutil.which("nvcc", path=str(Path(home or CUDA_HOME, "bin")))
    if nvcc is None or sys.platform != "linux":
        give_up(f"nvcc was not found (CUDA_HOME, PATH or {CUDA_HOME}) when the package was built")
    archs = cuda_archs(nvcc)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [nvcc, *targets, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def give_up(reason: str) -> NoReturn:
    if os.environ.get("FDISTILL_CUDA") == "1":
        raise SystemExit(f"FDISTILL_CUDA=1: {reason}")
    raise NoCuda(reason)


def cuda_archs(nvcc: str) -> list[str]:
    """The compute capabilities asked for, or those of the default ones that this nvcc knows."""
    wanted = os.environ.get("FDISTILL_CUDA_ARCHS")
    if wanted is not None:
        archs = wanted.replace(",", " ").split()
        if not archs or not all(arch.rstrip("af").isdigit() for arch in archs):
            raise SystemExit(f"FDISTILL_CUDA_ARCHS must be compute capabilities such as {CUDA_ARCHS!r}, got {wanted!r}")
        return archs
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    archs = [arch for arch in CUDA_ARCHS.split() if f"compute_{arch}" in known]
    if not archs:
        give_up(f"nvcc ({nvcc}) knows none of the compute capabilities {CUDA_ARCHS}")
    return archs


def compiler_version(command: list[str], line: int = 0) -> str:
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[line] if result.stdout else " ".join(command)


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        torch = importlib.util.find_spec("torch")
        if torch is None or torch.origin is None:
            raise
        return str(Path(torch.origin).parent / "include")  # PyTorch brings the headers
    return pybind11.get_include()


@dataclass(frozen=True)
class Step:
    """A command that makes one file of others. Compilations write a depfile beside it."""

    output: Path
    inputs: list[Path]
    command: list[str]
    compiles: bool


def steps(
    compiler: list[str], nvcc: list[str] | None, directory: Path, target: Path, emulator: Path | None
) -> list[Step]:
    includes = [CSRC / "include", CSRC, pybind11_include(), sysconfig.get_paths()["include"]]
    paths = [f"-I{path}" for path in includes]
    flags = [*FLAGS, *paths, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    found: list[Step] = []

    def compile_all(sources: list[str], prefix: str, command: list[str]) -> list[Path]:
        outputs = []
        for source in sources:
            output = directory / (prefix + source.replace("/", "_").rpartition(".")[0] + ".o")
            source_path = CSRC / source
            full = [*command, "-MD", "-MF", f"{output}.d", "-c", str(source_path), "-o", str(output)]
            found.append(Step(output, [source_path], full, True))
            outputs.append(output)
        return outputs

    def link(objects: list[Path], output: Path, command: list[str], libraries: list[str]) -> None:
        full = [*command, *map(str, objects), "-o", str(output), *libraries]
        found.append(Step(output, objects, full, False))

    linux = sys.platform == "linux"
    shared = [*compiler, *(["-shared"] if linux else ["-bundle", "-undefined", "dynamic_lookup"])]
    objects, linker, with_cuda = [], (shared, ["-pthread", "-ldl"] if linux else []), []
    if nvcc is not None:
        host = next(part for part in reversed(compiler) if not part.startswith("-"))  # behind ccache, say
        nvcc = [*nvcc, "-ccbin", host]
        objects += compile_all([*CUDA_SOURCES, "cuda/launch.cpp"], "", [*nvcc, *CUDA_FLAGS, *paths])
        # The runtime becomes part of the module, which needs no CUDA where there is no GPU.
        linker = ([*nvcc, "-shared", "-cudart", "static"], ["-Xcompiler", "-pthread", "-ldl"])
        with_cuda = ["-DFDISTILL_CUDA"]
    objects += compile_all(SOURCES, "", [*compiler, *flags, *with_cuda])
    for isa, extra in ISAS.items():
        objects += compile_all(["cpu/kernels.cpp"], f"{isa}_", [*compiler, *flags, f"-DFD_ISA={isa}", *extra])
    link(objects, target, *linker)
    if emulator is not None:
        objects = compile_all(EMULATOR_SOURCES, "emulated_", [*compiler, *flags, *EMULATOR_FLAGS])
        link(objects, emulator, shared, ["-pthread"])
    return found


def ninja_file(todo: list[Step]) -> str:
    lines = [
        "rule compile",
        "  command = $line",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        "  command = $line",
        "  description = $out",
    ]
    for step in todo:
        rule = "compile" if step.compiles else "link"
        lines.append(f"build {escape(step.output)}: {rule} {' '.join(map(escape, step.inputs))}")
        lines.append(f"  line = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def run(todo: list[Step], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("ninja") or shutil.which("ninja"):
        (directory / "build.ninja").write_text(ninja_file(todo))
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        subprocess.run([*ninja, "-C", str(directory)], check=True)
        return
    for compiles in (True, False):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = [step.command for step in todo if step.compiles == compiles]
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build(targets: list[Path], directory: Path, version: str) -> None:
    """Builds MODULES as those files, and writes beside them what was built or why not, as _build.json."""
    target, *others = targets
    record: dict[str, object] = {"version": version}
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        compiler = find_compiler()
        record |= {"compiler": compiler_version(compiler), "isas": list(ISAS)}
        nvcc = None
        try:
            nvcc = find_nvcc()
            record["cuda"] = {"compiler": compiler_version(nvcc[:1], -1), "archs": cuda_archs(nvcc[0])}
        except NoCuda as reason:
            record["cuda_skipped"] = str(reason)
        run(steps(compiler, nvcc, directory, target, *others or [None]), directory)
    except NoCompiler as reason:
        print(f"fdistill_ops: installing without compiled kernels: {reason}", file=sys.stderr)
        for path in targets:
            path.unlink(missing_ok=True)
        record = {"version": version, "skipped": str(reason)}
    (target.parent / "_build.json").write_text(json.dumps(record, indent=1) + "\n")


def remove_stale_emulator(package: Path) -> None:
    """Of other sources than the modules that are built without it."""
    if not EMULATE:
        for path in package.glob("_C_emulated.*"):
            path.unlink()


def main() -> None:
    from version import version

    package = CSRC.parent / "fdistill_ops"
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    remove_stale_emulator(package)
    build([package / f"{name}{suffix}" for name in MODULES], CSRC.parent / "build" / f"in-place{suffix}", version())


if __name__ == "__main__":
    main()
