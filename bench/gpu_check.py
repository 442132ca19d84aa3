"""Everything that needs a GPU, in under nine minutes and without a network: ``make gpu-check OUT=DIR``.

Builds the compiled modules in place, runs the package's self-check, the tests marked ``gpu``, compute-sanitizer over a
small set of calls, ncu for the DRAM bytes of one large launch where its counters can be read, and the benchmark. Logs,
JSON and plots go to DIR; the last output is a table, and the exit status is not zero if anything failed. A check that
cannot run here says why and counts as skipped.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 510.0  # of nine minutes
NO_TESTS = 5  # pytest's exit status where nothing was selected
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Result:
    """What a check found. ``status``: ok, FAILED or skipped."""

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""


class Skip(Exception):
    """Why a check cannot run here."""


class Failure(Exception):
    """What a check found wrong."""


class Checks:
    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.end = out, time.monotonic() + budget
        self.site = out / "site"  # where the package is imported from
        self.results: list[Result] = []

    def run(self, name: str, check: Callable[[], str]) -> None:
        self.results.append(self.outcome(name, check))

    def run_together(self, checks: dict[str, Callable[[], str]]) -> None:
        with ThreadPoolExecutor(len(checks)) as pool:
            self.results += pool.map(self.outcome, checks, checks.values())

    def outcome(self, name: str, check: Callable[[], str]) -> Result:
        start = time.monotonic()
        try:
            if self.end - start < 5:
                raise Skip("no time left")
            status, note = "ok", check()
        except Skip as reason:
            status, note = "skipped", str(reason)
        except Failure as failure:
            status, note = "FAILED", str(failure)
        print(f"{name}: {status} {note}", flush=True)
        return Result(name, status, round(time.monotonic() - start, 1), note)

    def command(
        self,
        log: str,
        command: list[str],
        limit: float,
        *,
        also_good: tuple[int, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Runs a command in the repository, its output to ``log``. Returns the output."""
        path = os.pathsep.join([str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])])
        variables = os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"} | dict(environment or {})
        limit = max(5.0, min(limit, self.end - time.monotonic()))
        output = self.out / log
        with output.open("w") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=variables,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=limit,
                ).returncode
            except subprocess.TimeoutExpired:
                raise Failure(f"took more than {limit:.0f} s; see {log}") from None
            except OSError as error:
                raise Failure(str(error)) from None
        text = output.read_text(errors="replace")
        if code not in (0, *also_good):
            lines = [line for line in text.splitlines() if line.strip()]
            raise Failure(f"exit status {code}; see {log}: {lines[-1][:160]}")
        return text


def tool(name: str) -> str:
    """The path of a tool of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(name) or shutil.which(name, path=os.path.join(home, "bin"))
    if found is None:
        raise Skip(f"{name} is not installed")
    return found


def versions() -> dict[str, str]:
    import torch

    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for name in ("triton", "numpy", "pytest", "hypothesis"):
        if importlib.util.find_spec(name):
            found[name] = importlib.import_module(name).__version__
    for name, command in (
        ("nvcc", ["nvcc", "--version"]),
        ("driver", ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        ("commit", ["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
    ):
        try:
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
            found[name] = [line for line in lines if line][-1]
        except (OSError, subprocess.CalledProcessError):
            continue
    return found


def check_self(checks: Checks) -> str:
    """Every back end against the formulas in float64; how to see what is off is in the log."""
    text = checks.command("selfcheck.log", [sys.executable, "-m", "fdistill_ops.selfcheck"], 120)
    return text.splitlines()[-1]


def check_tests(checks: Checks, back_end: str) -> str:
    """The tests marked gpu of one back end; what belongs to none goes with cuda. Every file in a process of its own, as
    many at once as half of the processors take."""
    if importlib.util.find_spec("pytest") is None:
        raise Failure("pytest is not installed")
    selected = ["-m", "gpu", "-k", "triton" if back_end == "triton" else "not triton"]

    def run(file: Path) -> tuple[Counter[str], str | None]:
        log = f"pytest-{back_end}-{file.stem}.log"
        command = [sys.executable, "-m", "pytest", "-q", "--durations=5", *selected, str(file)]
        try:
            return counts(checks.command(log, command, 240, also_good=(NO_TESTS,))), None
        except Failure as failure:
            return counts((checks.out / log).read_text(errors="replace")), f"{file.name}: {failure}"

    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        found = list(pool.map(run, sorted((ROOT / "tests").glob("test_*.py"))))
    total = ", ".join(f"{number} {what}" for what, number in sum((part for part, _ in found), Counter()).items())
    failures = [failure for _, failure in found if failure is not None]
    if importlib.util.find_spec("hypothesis") is None:
        total += "; without those that need hypothesis, which is not installed"
    if failures:
        raise Failure(f"{total}; {'; '.join(failures)}")
    return total


def counts(text: str) -> Counter[str]:
    """Passed, failed, ... from pytest's last line."""
    lines = [line for line in text.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1]) if lines else []
    return Counter({what: int(number) for number, what in found})


def check_sanitizer(checks: Checks, name: str) -> str:
    command = [tool("compute-sanitizer"), "--tool", name, "--error-exitcode", "9"]
    script = [sys.executable, str(ROOT / "bench" / "gpu_calls.py")]
    checks.command(f"{name}.log", [*command, *script], 200, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return "no errors"


def check_dram(checks: Checks) -> str:
    """DRAM bytes of one f_distill_loss over 64 MiB tensors, in units of one tensor."""
    metrics = "dram__bytes_read.sum,dram__bytes_write.sum"
    command = [tool("ncu"), "--metrics", metrics, "--csv", "-k", "regex:on_chip|split"]
    try:
        text = checks.command("ncu.log", [*command, sys.executable, "bench/gpu_calls.py", "--large"], 60)
    finally:
        if "ERR_NVGPUCTRPERM" in (checks.out / "ncu.log").read_text(errors="replace"):
            raise Skip("this machine does not let its counters be read")
    moved = dram_bytes(text)
    if not moved:
        raise Failure("ncu measured nothing; see ncu.log")
    tensors = moved[-1] / (64 << 20)
    (checks.out / "dram.json").write_text(json.dumps({"bytes": moved, "tensors": tensors}, indent=1) + "\n")
    if tensors > 4.4:
        raise Failure(f"{tensors:.2f} tensors through DRAM, more than 4")
    return f"{tensors:.2f} tensors through DRAM"


def dram_bytes(text: str) -> list[float]:
    """Bytes of each launch, from ncu's CSV: two rows for each, read and written."""
    unit = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    row = re.compile(r'"dram__bytes_(?:read|write)\.sum","(\w+)","([\d.,]+)"')
    values = [unit[name] * float(value.replace(",", "")) for name, value in row.findall(text)]
    return [sum(pair) for pair in zip(values[::2], values[1::2], strict=False)]


def check_benchmark(checks: Checks) -> str:
    if not (ROOT / "bench" / "__main__.py").exists():
        raise Skip("there is no bench/__main__.py")
    output = ["--json", str(checks.out / "bench.json")]
    plots = importlib.util.find_spec("matplotlib") is not None
    if plots:
        output += ["--plot", str(checks.out)]
    checks.command("bench.log", [sys.executable, "-m", "fdistill_ops.bench", "--quick", *output], 150)
    return "bench.json" if plots else "bench.json; no plots, as matplotlib is not installed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder for logs, JSON and plots")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    checks = Checks(out, BUDGET_S)

    checks.run("build", lambda: build(checks))
    checks.run("self-check", lambda: check_self(checks))
    for back_end in ("cuda", "triton"):
        checks.run(f"{back_end} is there", functools.partial(present, checks, back_end))
    together: dict[str, Callable[[], str]] = {
        f"tests of {back_end}": functools.partial(check_tests, checks, back_end) for back_end in ("cuda", "triton")
    }
    together |= {name: functools.partial(check_sanitizer, checks, name) for name in SANITIZERS}
    checks.run_together(together)
    checks.run("DRAM", lambda: check_dram(checks))
    checks.run("benchmark", lambda: check_benchmark(checks))

    found = versions()
    summary = {"versions": found, "checks": [asdict(result) for result in checks.results]}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    table = "\n".join([*(f"{name}: {value}" for name, value in found.items()), "", *rows(checks.results)])
    (out / "summary.txt").write_text(table + "\n")
    print(f"\n{table}")
    return int(any(result.status == "FAILED" for result in checks.results))


def build(checks: Checks) -> str:
    try:
        compute = ".".join(map(str, capability()))
        environment = {"FDISTILL_CUDA": "1", "FDISTILL_CUDA_ARCHS": compute.replace(".", "")}
        checks.command("build.log", [sys.executable, "csrc/compile_kernels.py"], 180, environment=environment)
    finally:  # what needs no build runs all the same
        link_package(checks.site / "fdistill_ops")
    return f"for compute capability {compute}"


def link_package(package: Path) -> None:
    """The package as an installation lays it out, with kernels/ and bench/ in it, of links into the repository."""
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (*(ROOT / "fdistill_ops").iterdir(), ROOT / "kernels", ROOT / "bench"):
        (package / entry.name).symlink_to(entry)


def capability() -> tuple[int, int]:
    import torch

    if not torch.cuda.is_available():
        raise Failure("PyTorch finds no GPU")
    return torch.cuda.get_device_capability()


def present(checks: Checks, back_end: str) -> str:
    script = f"import fdistill_ops as fd; fd.set_backend({back_end!r}); print(fd.build_info())"
    checks.command(f"{back_end}.log", [sys.executable, "-c", script], 60)
    return ""


def rows(results: list[Result]) -> list[str]:
    width = max(len(result.name) for result in results)
    return [f"{r.name:<{width}}  {r.status:<7}  {r.seconds:6.1f} s  {r.note}".rstrip() for r in results]


if __name__ == "__main__":
    sys.exit(main())
