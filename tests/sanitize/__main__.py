"""The compiled modules under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer: on random
calls and on the numeric tests. ``make sanitize``.

    python tests/sanitize [asan] [tsan] [--calls 1000] [--quick]

Builds instrumented modules in build/sanitize, beside the working installation, which stays as it is. Ends with status 1
where there is a report or a test fails. A sanitizer that the machine lacks is left out, with a sentence that says why.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from toolchain import SANITIZERS, Missing, Sanitized

FOLDER = Path(__file__).resolve().parent
TESTS = ("losses", "weights", "properties", "layouts", "cpu_backend", "cuda_backend", "cuda_emulator", "autograd")
# Tests that are left out, and why.
NOT = {
    "test_memory": "measures the memory of the process, most of which is the sanitizer's",
    "test_more_elements_than_an_int32_counts": "gigabytes, and as many more of what the sanitizer keeps beside them",
    "test_the_interpreter_runs_during_a_kernel": "compares times",
    "test_large_batch": "of 70,000 samples; others run the same code",
    "test_every_instruction_set_gives_the_same_bits[shape2": "of 120,000 elements; likewise",
    "test_large_batches_are_what_their_parts_are": "of millions of elements; likewise",
    "test_float16_gradient_survives_the_mean": "of a million elements; likewise",
}
# With --quick, a part of the random calls of a back end: those of an emulator take half a second each.
QUICK_CALLS = {"cpu": 1.0, "cuda-emulated": 0.1}
# With --quick: half of its time, for what other tests and the random calls run too.
NOT_QUICK = {
    "test_two_python_threads_at_once and cuda-emulated": "a hundred seconds",
    "test_the_order_of_the_blocks_changes_nothing and shape1": "samples of 60,000 elements",
    "test_a_mixture_has_the_bits_of_its_numbers_in_float32 and shape2": "of 300,000",
    "test_weights_of_large_batches and 1024": "1,025 are among them",
}
NOT_WITH = {
    "asan": {},
    "tsan": {"test_threads_belong_to_the_process": "they are threads of our own there, see csrc/cpu/parallel.cpp"},
}


def runs(name: str, calls: int, quick: bool) -> dict[str, list[str]]:
    """What is run, and the arguments of Python. Two Python threads call at once where races are looked for."""
    workers = "2" if name == "tsan" else "1"
    # Captured by Python alone: reports on stderr are to go to the log.
    options = ["-q", "--durations=20", "--capture=sys", "-W", "ignore", "-p", "no:cacheprovider"]
    options += ["--quick"] if quick else []
    pytest = ["-m", "pytest", *options, *(f"tests/test_{test}.py" for test in TESTS)]
    left_out = " or ".join(f"({words})" for words in [*NOT, *NOT_WITH[name], *(NOT_QUICK if quick else ())])
    tests = {"cpu": "([cpu or test_cpu_backend)", "cuda-emulated": "(cuda-emulated or test_cuda_)"}
    counts = {b: max(1, round(calls * share)) if quick else calls for b, share in QUICK_CALLS.items()}
    script = str(FOLDER / "calls.py")
    drawn = {f"calls of {b}": [script, b, f"--calls={counts[b]}", f"--workers={workers}"] for b in tests}
    return drawn | {f"tests of {b}": [*pytest, "-k", f"{named} and not ({left_out})"] for b, named in tests.items()}


def check(name: str, calls: int, quick: bool) -> bool:
    """Whether a sanitizer that runs here has nothing to say."""
    try:
        sanitized = Sanitized.find(name)
    except Missing as reason:
        print(f"skipped {reason}", flush=True)
        return True
    print(f"{name}: {SANITIZERS[name].title}", flush=True)
    start = time.monotonic()
    log = sanitized.folder / "build.txt"
    with log.open("w") as file:  # in a process of its own, for what the compiler says
        command = [sys.executable, FOLDER / "toolchain.py", name]
        if subprocess.run(command, check=False, stdout=file, stderr=file).returncode:
            print(f"{log.read_text(errors='replace')[-8000:]}\n  the build failed", flush=True)
            return False
    print(f"  built in {time.monotonic() - start:.0f} s", flush=True)

    def run(what: str, arguments: Sequence[str]) -> bool:
        start = time.monotonic()
        status = sanitized.run(arguments, what)
        text = sanitized.log(what).read_text(errors="replace").rstrip()
        print(f"  {what}, {time.monotonic() - start:.0f} s: {text.rpartition(chr(10))[2]}", flush=True)
        if status:
            print(f"{text[-8000:]}\n  exit status {status}; all of it: {sanitized.log(what)}", flush=True)
        return status == 0

    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(lambda item: run(*item), runs(name, calls, quick).items()))
    reports = sanitized.reports()
    print(f"  reports: {len(reports)}", *reports[:40], sep="\n    ", flush=True)
    if reports:
        print(f"  in full: {sanitized.folder}/*.log and {sanitized.reports_folder}", flush=True)
    return all(passed) and not reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("sanitizers", nargs="*", choices=[*SANITIZERS, []], help="those to run: all by default")
    parser.add_argument("--calls", type=int, default=1000, help="random calls of each back end")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="of the tests those of make test, of the emulator's random calls a tenth",
    )
    arguments = parser.parse_args()
    names = arguments.sanitizers or list(SANITIZERS)
    sys.exit(0 if all([check(name, arguments.calls, arguments.quick) for name in names]) else 1)


if __name__ == "__main__":
    main()
