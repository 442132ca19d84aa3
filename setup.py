"""Builds fdistill_ops._C with ninja: plain C++20, no PyTorch needed, in pip's isolated environment or any other.

Without a C++ compiler the package installs all the same; fdistill_ops.build_info() then says what was missing.

Environment: CXX (default: c++, g++ or clang++), CXXFLAGS (appended).
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


def compiler_version(command: list[str]) -> str:
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return result.stdout.splitlines()[0] if result.stdout else " ".join(command)


def ninja_file(compiler: list[str], target: Path) -> str:
    import pybind11

    includes = [ROOT / "csrc" / "include", ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = [*FLAGS, *(f"-I{path}" for path in includes), *shlex.split(os.environ.get("CXXFLAGS", ""))]
    link = ["-shared", "-pthread", "-ldl"] if sys.platform == "linux" else ["-bundle", "-undefined", "dynamic_lookup"]
    lines = [
        f"cxx = {shlex.join(compiler)}",
        f"flags = {shlex.join(flags)}",
        "rule compile",
        "  command = $cxx $flags $extra -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx $in -o $out {shlex.join(link)}",
        "  description = $out",
    ]
    units = [(source, source.replace("/", "_").removesuffix(".cpp") + ".o", []) for source in SOURCES]
    units += [("cpu/kernels.cpp", f"kernels_{isa}.o", [f"-DFD_ISA={isa}", *extra]) for isa, extra in ISAS.items()]
    for source, output, extra in units:
        lines += [f"build {output}: compile {escape(ROOT / 'csrc' / source)}", f"  extra = {shlex.join(extra)}"]
    lines.append(f"build {escape(target)}: link {' '.join(output for _, output, _ in units)}")
    return "\n".join(lines) + "\n"


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        record: dict[str, object] = {}
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            compiler = find_compiler()
            self.compile(compiler, target)
            record = {"compiler": compiler_version(compiler), "isas": list(ISAS)}
        except NoCompiler as reason:
            print(f"fdistill_ops: installing without compiled kernels: {reason}", file=sys.stderr)
            target.unlink(missing_ok=True)
            record = {"skipped": str(reason)}
        (target.parent / "_build.json").write_text(json.dumps(record, indent=1) + "\n")

    def compile(self, compiler: list[str], target: Path) -> None:
        directory = Path(self.build_temp).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "build.ninja").write_text(ninja_file(compiler, target))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(directory)], check=True)

    def get_outputs(self) -> list[str]:
        outputs = [Path(output) for output in super().get_outputs()]
        records = [output.with_name("_build.json") for output in outputs]
        return [str(path) for path in (*outputs, *records) if path.exists()]

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the module, if there is one, and the record of the build beside the sources."""
        package = ROOT / "fdistill_ops"
        for ext in self.extensions:
            built = Path(self.get_ext_fullpath(ext.name) if not self.inplace else self.build_lib_path(ext))
            for path in (built, built.with_name("_build.json")):
                if path.exists() and path.resolve() != (package / path.name).resolve():
                    shutil.copy2(path, package / path.name)
            if not built.exists():
                (package / built.name).unlink(missing_ok=True)

    def build_lib_path(self, ext: Extension) -> Path:
        return Path(self.build_lib) / self.get_ext_filename(ext.name)


setup(ext_modules=[Extension("fdistill_ops._C", [])], cmdclass={"build_ext": NinjaBuild})
