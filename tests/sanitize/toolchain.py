"""The package built with a sanitizer, beside the working installation, and Python run with it.

Python and PyTorch are not instrumented; the modules of csrc/ are, and the sanitizer's run time, which has to come first
in the process, is preloaded.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "sanitize"
# Names and lines for the reports, as fast to compile as it goes: the kernels are large.
FLAGS = ("-O1", "-g1", "-fno-omit-frame-pointer")
REPORT = re.compile(r"(ERROR|WARNING|FATAL): (?!Leak)\w+Sanitizer|Sanitizer: CHECK failed|: runtime error: ")
LEAK = re.compile(r"(Direct|Indirect) leak of ")


class Missing(Exception):
    """What a machine lacks for a sanitizer, in one sentence."""


@dataclass(frozen=True)
class Sanitizer:
    name: str
    title: str
    flags: tuple[str, ...]  # of the compiler and the linker
    runtime: str  # preloaded, as the compiler names it
    options: dict[str, dict[str, object]]  # by environment variable
    environment: dict[str, str] = field(default_factory=dict)
    emulator_flags: tuple[str, ...] = ()


SANITIZERS = {
    "asan": Sanitizer(
        "asan",
        "AddressSanitizer, UndefinedBehaviorSanitizer",
        # Divisions of floats by zero are the arithmetic that is wanted here, not an error.
        ("-fsanitize=address,undefined,float-cast-overflow",),
        "libasan.so",
        {
            # Leaks are looked for by calls.py, before Python ends: what it and PyTorch keep to the end is no leak.
            "ASAN_OPTIONS": {"leak_check_at_exit": 0, "detect_stack_use_after_return": 1, "exitcode": 99},
            "UBSAN_OPTIONS": {"print_stacktrace": 1},
        },
        # So that tuples of arguments are checked too, and what Python refers to is found when leaks are looked for.
        {"PYTHONMALLOC": "malloc"},
        # Frames of a GPU's threads stay on the fibers' stacks: what would find one used after its return maps and
        # clears megabytes for every fiber, thousands of which live for microseconds.
        emulator_flags=("--param=asan-use-after-return=0",),
    ),
    "tsan": Sanitizer(
        "tsan",
        "ThreadSanitizer",
        ("-fsanitize=thread",),
        "libtsan.so",
        {
            # Calls of memcpy, say, from PyTorch, whose own threads wait for each other unseen: it is not instrumented.
            "TSAN_OPTIONS": {"ignore_noninstrumented_modules": 1, "exitcode": 99, "history_size": 4},
        },
        # The threads of a GPU are fibers of one thread, and are to look like it. They would otherwise mix up the calls
        # that it keeps track of; the sanitizer's own fibers take a millisecond each to make.
        emulator_flags=("--param=tsan-instrument-func-entry-exit=0",),
    ),
}


def compile_kernels():
    sys.path.insert(0, str(ROOT / "csrc"))
    try:
        import compile_kernels
    finally:
        sys.path.pop(0)
    return compile_kernels


@dataclass(frozen=True)
class Sanitized:
    """A sanitizer that runs here."""

    sanitizer: Sanitizer
    compiler: tuple[str, ...]
    preload: tuple[Path, ...]
    launcher: tuple[str, ...]  # put before a command
    folder: Path  # what is built, and where reports go

    @classmethod
    def find(cls, name: str, folder: Path | None = None) -> Sanitized:
        """Raises Missing where the compiler or the machine lacks something."""
        sanitizer, kernels = SANITIZERS[name], compile_kernels()
        if sys.platform != "linux":
            raise Missing(f"{name}: run times are preloaded, which is done on Linux alone, and this is {sys.platform}")
        try:
            compiler = tuple(kernels.find_compiler())
        except kernels.NoCompiler as reason:
            raise Missing(f"{name}: {reason}".removesuffix(" when the package was built")) from None
        # The C++ library too: run times look for it at their start, and Python does not bring it.
        preload = tuple(find_library(compiler, library) for library in (sanitizer.runtime, "libstdc++.so.6"))
        for library, wanted in zip(preload, (sanitizer.runtime, "libstdc++.so.6"), strict=True):
            if library is None:
                raise Missing(f"{name}: {kernels.compiler_version(list(compiler))} has no {wanted}")
        folder = BUILD / name if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        for launcher in ((), ("setarch", "-R")):  # some run times cannot live with addresses chosen at random
            found = cls(sanitizer, compiler, preload, launcher, folder)
            if launcher and not shutil.which(launcher[0]):
                continue
            status = found.run(["-c", "pass"], "start")
            said = [*found.reports(), *found.log("start").read_text().splitlines(), f"exit status {status}"]
            found.clear_reports()
            if status == 0:
                return found
        raise Missing(f"{name}: Python does not start with {sanitizer.runtime}: {said[0]}")

    # ---------------------------------------------------------------------------------------------------------- build

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """The build of csrc/compile_kernels.py with this sanitizer."""
        kernels = compile_kernels()
        wanted = {
            "CXX": " ".join([*self.compiler, *self.sanitizer.flags]),
            "CXXFLAGS": " ".join([os.environ.get("CXXFLAGS", ""), *FLAGS]),
            "FDISTILL_CUDA": "0",
        }
        before, flags = {name: os.environ.get(name) for name in wanted}, kernels.EMULATOR_FLAGS
        os.environ |= wanted
        kernels.EMULATOR_FLAGS = [*self.sanitizer.emulator_flags, *FLAGS, *(f for f in flags if f != "-O2")]
        try:
            yield
        finally:
            kernels.EMULATOR_FLAGS = flags
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def build(self) -> None:
        """The package: a copy of its Python with instrumented modules."""
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        modules = self.folder / "modules"
        with self.compiling():
            targets = [modules / f"{name}{suffix}" for name in ("_C", "_C_emulated")]
            compile_kernels().build(targets, self.folder / f"objects{suffix}", "0+sanitized")
        package = self.folder / "fdistill_ops"
        shutil.rmtree(package, ignore_errors=True)
        built = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
        shutil.copytree(ROOT / "fdistill_ops", package, ignore=built)
        for name in ("kernels", "bench"):
            shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
        shutil.copytree(modules, package, dirs_exist_ok=True)

    def library(self, source: Path) -> Path:
        """A library of one file, built likewise."""
        path = self.folder / f"{source.stem}.so"
        command = [*self.compiler, *self.sanitizer.flags, *FLAGS, "-shared", "-fPIC", "-pthread", str(source)]
        subprocess.run([*command, "-o", str(path)], check=True)
        return path

    # ------------------------------------------------------------------------------------------------------------ run

    def environment(self) -> dict[str, str]:
        environment = dict(os.environ)
        environment |= {
            "LD_PRELOAD": " ".join(map(str, self.preload)),
            "PYTHONPATH": str(self.folder),
            "PYTHONSAFEPATH": "1",  # not the working directory's fdistill_ops first
            "FDISTILL_SANITIZED": str(self.folder),
        } | self.sanitizer.environment
        for name, options in self.sanitizer.options.items():
            # In files, so that those of processes of a test's own count. (GCC's UndefinedBehaviorSanitizer writes to
            # stderr all the same, beside AddressSanitizer.)
            path = self.reports_folder / name.partition("_")[0].lower()
            together = {"halt_on_error": 0, "log_path": path, **options}
            environment[name] = ":".join(f"{key}={value}" for key, value in together.items())
        return environment

    def run(self, arguments: Sequence[str], what: str) -> int:
        """Python, with those arguments; its exit status. What it prints goes to the log of that name."""
        self.reports_folder.mkdir(parents=True, exist_ok=True)
        command = [*self.launcher, sys.executable, *arguments]
        with self.log(what).open("w") as log:
            return subprocess.run(
                command, env=self.environment(), cwd=ROOT, check=False, stdout=log, stderr=log
            ).returncode

    @property
    def reports_folder(self) -> Path:
        return self.folder / "reports"

    def log(self, what: str) -> Path:
        return self.folder / f"{what.replace(' ', '-')}.log"

    def reports(self) -> list[str]:
        """The first line of every report since they were cleared, whichever process made it. Of leaks only those of
        memory that our code allocated: the libraries around it keep some, and forget some, for as long as they live."""
        own = (str(self.folder), str(ROOT / "csrc"), str(ROOT / "tests"))
        found = []
        for path in sorted([*self.reports_folder.glob("*"), *self.folder.glob("*.log")]):
            text = path.read_text(errors="replace")
            named = [line for line in text.splitlines() if REPORT.search(line)]
            for part in text.split("\n\n"):
                if LEAK.match(part) and any(place in part for place in own):
                    named.append(part.partition("\n")[0])
            unknown = not named and "LeakSanitizer" not in text and path.suffix != ".log"
            found += text.splitlines()[:1] if unknown else named
        return found

    def clear_reports(self) -> None:
        shutil.rmtree(self.reports_folder, ignore_errors=True)
        for path in self.folder.glob("*.log"):
            path.unlink()


def find_library(compiler: Sequence[str], name: str) -> Path | None:
    command = [*compiler, f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return path.resolve() if path.is_absolute() and path.exists() else None


if __name__ == "__main__":
    Sanitized.find(sys.argv[1]).build()
