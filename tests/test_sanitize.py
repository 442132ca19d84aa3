"""What ``make sanitize`` is there for is reported: faults planted in a small library, which is built and run as the
compiled modules are, by tests/sanitize/toolchain.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fdistill_ops import backends

FOLDER = Path(__file__).resolve().parent / "sanitize"
sys.path.insert(0, str(FOLDER))
import calls  # noqa: E402
from toolchain import Missing, Sanitized  # noqa: E402

sys.path.remove(str(FOLDER))

pytestmark = pytest.mark.no_poison
# A call that is right, one that is not, and what is said of it.
FAULTS = {
    "heap overflow": ("asan", "element(8, 7)", "element(8, 8)", "heap-buffer-overflow"),
    "signed overflow": ("asan", "successor(2**31 - 2)", "successor(2**31 - 1)", "signed integer overflow"),
    "shift": ("asan", "power(30)", "power(32)", "shift exponent 32 is too large"),
    "cast": ("asan", "rounded(ctypes.c_double(1e9))", "rounded(ctypes.c_double(1e10))", "outside the range"),
    "leak": ("asan", "allocate(True)", "allocate(False)", "Direct leak of "),
    "data race": ("tsan", "count(False)", "count(True)", "data race"),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Sanitized, Path] | str]]:
    """For each sanitizer the library, or why it does not run here."""
    found: dict[str, tuple[Sanitized, Path] | str] = {}
    for name in {name for name, *_ in FAULTS.values()}:
        try:
            sanitized = Sanitized.find(name, tmp_path_factory.mktemp(name))
        except Missing as reason:
            found[name] = str(reason)
            continue
        found[name] = sanitized, sanitized.library(FOLDER / "planted.cpp")
    yield found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(libraries: dict[str, tuple[Sanitized, Path] | str], fault: str) -> None:
    name, right, wrong, report = FAULTS[fault]
    library = libraries[name]
    if isinstance(library, str):
        pytest.skip(library)
    sanitized, path = library
    leaks = "look = getattr(ctypes.CDLL(None), '__lsan_do_recoverable_leak_check', None); look and look()"
    for call, reported in ((right, False), (wrong, True)):
        sanitized.clear_reports()
        script = f"import ctypes; ctypes.CDLL({str(path)!r}).{call}; {leaks}"
        status = sanitized.run(["-c", script], "run")
        found = sanitized.reports()
        assert len(found) == reported, (call, found, sanitized.log("run").read_text())
        assert report in found[0] if reported else status == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_calls_run_on_the_back_end_that_is_named(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    made: dict[int, str] = {}

    def call(backend: str, seed: int, index: int) -> None:
        made[index] = backends.choose(torch.device("cpu"))

    monkeypatch.setattr(calls, "call", call)
    calls.run("reference", 0, range(3, 9), workers)
    assert made == dict.fromkeys(range(3, 9), "reference")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In one sentence: no compiler, a compiler without the run time, a run time that Python does not start with."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Missing, match=r"^asan: no C\+\+ compiler \(no-such-compiler is not on the PATH\)$"):
        Sanitized.find("asan", tmp_path)
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\ncase $1 in --version) echo some compiler 1.0;; *) echo libtsan.so;; esac\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(Missing, match=r"^tsan: some compiler 1\.0 has no libtsan\.so$"):
        Sanitized.find("tsan", tmp_path)
