"""Builds fdistill_ops._C with ninja: plain C++20, no PyTorch needed, in pip's isolated environment or any other.

Without a C++ compiler the package installs all the same; fdistill_ops.build_info() then says what was missing. Where
nvcc is found the module has the CUDA kernels too, and still loads on machines without a GPU.

Environment: CXX (default: c++, g++ or clang++), CXXFLAGS (appended); FDISTILL_CUDA (auto, 0 or 1: 1 fails without
nvcc), FDISTILL_CUDA_ARCHS ("80 90 100": the compute capabilities to compile for, the last one also as PTX), CUDA_HOME;
FDISTILL_EMULATOR=1 adds fdistill_ops._C_emulated, the CUDA kernels on the CPU, for the tests.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# No fused multiply-adds the source does not write: every instruction set gives the same bits.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-DNDEBUG"]
ISAS = {"plain": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISAS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    # GCC 12 warns about its own header here.
    ISAS["avx512"] = [*ISAS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-Wno-maybe-uninitialized"]
SOURCES = ["bindings.cpp", "cpu/loss.cpp", "cpu/parallel.cpp", "cpu/pool.cpp", "cpu/weights.cpp"]
CUDA_KERNELS = ["strided_f64", "strided_f32", "f32", "bf16", "f16", "f64"]  # the slowest to compile first
CUDA_SOURCES = [*(f"cuda/loss_{name}.cu" for name in CUDA_KERNELS), "cuda/weights.cu", "cuda/loss.cpp"]
CUDA_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80 90 100"
EMULATOR_SOURCES = [*CUDA_SOURCES, *(f"emulator/{name}.cpp" for name in ("emulator", "fiber", "faults", "bindings"))]
EMULATOR_FLAGS = ["-DFDISTILL_EMULATOR", "-O2", "-Wno-unknown-pragmas", "-x", "c++"]
EMULATE = os.environ.get("FDISTILL_EMULATOR") == "1"


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
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    if nvcc is None or sys.platform != "linux":
        reason = "nvcc was not found (CUDA_HOME or PATH) when the package was built"
        if wanted == "1":
            raise SystemExit(f"FDISTILL_CUDA=1: {reason}")
        raise NoCuda(reason)
    archs = cuda_archs()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [nvcc, *targets, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def cuda_archs() -> list[str]:
    archs = os.environ.get("FDISTILL_CUDA_ARCHS", CUDA_ARCHS).replace(",", " ").split()
    if not archs or not all(arch.rstrip("af").isdigit() for arch in archs):
        raise SystemExit(f"FDISTILL_CUDA_ARCHS must be compute capabilities such as {CUDA_ARCHS!r}")
    return archs


def compiler_version(command: list[str], line: int = 0) -> str:
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[line] if result.stdout else " ".join(command)


def ninja_file(compiler: list[str], nvcc: list[str] | None, target: Path, emulator: Path | None) -> str:
    import pybind11

    includes = [ROOT / "csrc" / "include", ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    paths = [f"-I{path}" for path in includes]
    link = ["-shared", "-pthread", "-ldl"] if sys.platform == "linux" else ["-bundle", "-undefined", "dynamic_lookup"]
    lines = [
        f"cxx = {shlex.join(compiler)}",
        f"flags = {shlex.join([*FLAGS, *paths, *shlex.split(os.environ.get('CXXFLAGS', ''))])}",
        "rule compile",
        "  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx $in -o $out {shlex.join(link)}",
        "  description = $out",
    ]

    def build(sources: list[str], prefix: str, rule: str, extra: list[str]) -> list[str]:
        outputs = [prefix + source.replace("/", "_").rpartition(".")[0] + ".o" for source in sources]
        for source, output in zip(sources, outputs, strict=True):
            lines.extend([f"build {output}: {rule} {escape(ROOT / 'csrc' / source)}", f"  extra = {shlex.join(extra)}"])
        return outputs

    objects, rule = [], "link"
    if nvcc is not None:
        lines += [
            f"nvcc = {shlex.join([*nvcc, '-ccbin', compiler[0]])}",
            f"nvcc_flags = {shlex.join([*CUDA_FLAGS, *paths])}",
            "rule compile_cuda",
            "  command = $nvcc $nvcc_flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link_cuda",  # the runtime is part of the module: it needs no CUDA where there is no GPU
            "  command = $nvcc -shared -cudart static $in -o $out -Xcompiler -pthread -ldl",
            "  description = $out",
        ]
        objects += build([*CUDA_SOURCES, "cuda/launch.cpp"], "", "compile_cuda", [])
        rule = "link_cuda"
    objects += build(SOURCES, "", "compile", [] if nvcc is None else ["-DFDISTILL_CUDA"])
    for isa, extra in ISAS.items():
        objects += build(["cpu/kernels.cpp"], f"{isa}_", "compile", [f"-DFD_ISA={isa}", *extra])
    lines.append(f"build {escape(target)}: {rule} {' '.join(objects)}")
    if emulator is not None:
        objects = build(EMULATOR_SOURCES, "emulated_", "compile", EMULATOR_FLAGS)
        lines.append(f"build {escape(emulator)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    """One run of ninja builds every module."""

    def build_extensions(self) -> None:
        target, *others = (Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions)
        record: dict[str, object] = {}
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            compiler = find_compiler()
            record = {"compiler": compiler_version(compiler), "isas": list(ISAS)}
            nvcc = None
            try:
                nvcc = find_nvcc()
                record["cuda"] = {"compiler": compiler_version(nvcc[:1], -1), "archs": cuda_archs()}
            except NoCuda as reason:
                record["cuda_skipped"] = str(reason)
            self.compile(ninja_file(compiler, nvcc, target, *others or [None]))
        except NoCompiler as reason:
            print(f"fdistill_ops: installing without compiled kernels: {reason}", file=sys.stderr)
            for path in (target, *others):
                path.unlink(missing_ok=True)
            record = {"skipped": str(reason)}
        (target.parent / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def compile(self, rules: str) -> None:
        directory = Path(self.build_temp).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "build.ninja").write_text(rules)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(directory)], check=True)

    def get_outputs(self) -> list[str]:
        outputs = [Path(output) for output in super().get_outputs()]
        records = [output.with_name("_build.json") for output in outputs]
        return [str(path) for path in (*outputs, *records) if path.exists()]

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the module, if there is one, and the record of the build beside the sources."""
        package = ROOT / "fdistill_ops"
        if not EMULATE:  # not one of other sources
            for path in package.glob("_C_emulated.*"):
                path.unlink()
        for ext in self.extensions:
            built = Path(self.get_ext_fullpath(ext.name) if not self.inplace else self.build_lib_path(ext))
            for path in (built, built.with_name("_build.json")):
                if path.exists() and path.resolve() != (package / path.name).resolve():
                    shutil.copy2(path, package / path.name)
            if not built.exists():
                (package / built.name).unlink(missing_ok=True)

    def build_lib_path(self, ext: Extension) -> Path:
        return Path(self.build_lib) / self.get_ext_filename(ext.name)


modules = ["fdistill_ops._C", *(["fdistill_ops._C_emulated"] if EMULATE else [])]
setup(ext_modules=[Extension(name, []) for name in modules], cmdclass={"build_ext": NinjaBuild})
