"""The plumbing of ``make gpu-check`` without a GPU: its tools are stubs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
NCU = """\
"0","on_chip","dram__bytes_read.sum","Mbyte","201.5"
"0","on_chip","dram__bytes_write.sum","Mbyte","67.1"
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with an interpreter and tools that print what they are told to."""
    module = load()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"python": "3 passed in 0.1s", "compute-sanitizer": "no errors", "ncu": NCU}.items():
        stub(tools / name, text)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stub")
    monkeypatch.setattr(module.sys, "executable", str(tools / "python"))
    monkeypatch.setattr(module.sys, "argv", ["gpu_check.py", str(tmp_path / "out")])
    return module


def stub(path: Path, text: str, status: int = 0, seconds: int = 0) -> None:
    path.write_text(f"#!/bin/sh\nsleep {seconds}\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    path.chmod(0o755)


def summary(folder: Path) -> dict[str, dict[str, str]]:
    checks = json.loads((folder / "out" / "summary.json").read_text())["checks"]
    return {entry["name"]: entry for entry in checks}


def test_everything_passes(check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main() == 0
    found = summary(tmp_path)
    names = ["build", "self-check", "cuda is there", "triton is there", "tests of cuda", "tests of triton"]
    names += ["memcheck", "racecheck", "initcheck", "synccheck", "DRAM", "benchmark"]
    assert list(found) == names
    assert {name: entry["status"] for name, entry in found.items() if entry["status"] != "ok"} in (
        {},
        {"benchmark": "skipped"},
    )
    files = len(list((ROOT / "tests").glob("test_*.py")))
    assert found["tests of cuda"]["note"] == f"{3 * files} passed"
    assert found["DRAM"]["note"].startswith("4.00 tensors")
    table = capsys.readouterr().out.rstrip().splitlines()[-len(names) :]
    assert [line.split("  ")[0] for line in table] == names
    assert (tmp_path / "out" / "summary.txt").read_text().rstrip().splitlines()[-len(names) :] == table
    for log in ("build", "pytest-triton-test_gpu", "memcheck", "racecheck", "ncu"):
        assert (tmp_path / "out" / f"{log}.log").read_text().startswith("$ ")


@pytest.mark.parametrize(
    ("tool", "text", "status", "name", "outcome", "note"),
    [
        ("compute-sanitizer", "ERROR SUMMARY: 3 errors", 9, "racecheck", "FAILED", "racecheck.log: ERROR SUMMARY"),
        ("python", "3 of 9 calls are off; 1.0 s", 1, "self-check", "FAILED", "selfcheck.log: 3 of 9 calls are off"),
        ("python", "1 failed, 2 passed in 0.1s", 1, "tests of cuda", "FAILED", "test_gpu.py: exit status 1"),
        ("ncu", "==ERROR== ERR_NVGPUCTRPERM", 1, "DRAM", "skipped", "counters"),
        ("ncu", "==ERROR== ERR_NVGPUCTRPERM", 0, "DRAM", "skipped", "counters"),
        ("ncu", NCU.replace("201.5", "301.5"), 0, "DRAM", "FAILED", "more than 4"),
        ("ncu", "nothing", 0, "DRAM", "FAILED", "measured nothing"),
    ],
)
def test_one_check_fails(
    check: ModuleType, tmp_path: Path, tool: str, text: str, status: int, name: str, outcome: str, note: str
) -> None:
    stub(tmp_path / "tools" / tool, text, status)
    assert check.main() == int(outcome == "FAILED")
    found = summary(tmp_path)
    assert found[name]["status"] == outcome
    assert note in found[name]["note"]


@pytest.mark.slow
def test_it_ends_in_time(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that hangs is ended at its limit; those for which no time is left are skipped, and say so."""
    monkeypatch.setattr(check, "BUDGET_S", 6.0)
    stub(tmp_path / "tools" / "compute-sanitizer", "", seconds=60)
    assert check.main() == 1
    found = summary(tmp_path)
    assert found["memcheck"]["status"] == "FAILED"
    assert "took more than" in found["memcheck"]["note"]
    assert found["benchmark"]["note"] == "no time left"


def test_a_missing_tool_is_skipped(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "tools") + os.pathsep + "/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "tools" / "compute-sanitizer").unlink()
    assert check.main() == 0
    assert summary(tmp_path)["memcheck"]["note"] == "compute-sanitizer is not installed"


def test_a_build_that_fails_costs_what_it_builds(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is linked, so that the rest can be imported."""
    python = tmp_path / "tools" / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *compile_kernels*) exit 1;; esac\necho "3 passed in 0.1s"\n')
    assert check.main() == 1
    found = summary(tmp_path)
    assert {name for name, entry in found.items() if entry["status"] == "FAILED"} == {"build"}
    assert (tmp_path / "out" / "site" / "fdistill_ops" / "kernels").is_dir()


@pytest.mark.parametrize(("module", "name"), [("matplotlib", "benchmark"), ("hypothesis", "tests of triton")])
def test_a_module_that_is_not_installed(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    """Costs the plots, or the tests that use it, alone."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *more: None if wanted == module else find(wanted))
    assert check.main() == 0
    found = summary(tmp_path)
    assert found[name]["status"] == "ok"
    assert f"{module}, which is not" in found[name]["note"] or f"{module} is not installed" in found[name]["note"]
    assert "--plot" not in (tmp_path / "out" / "bench.log").read_text() or module != "matplotlib"


@pytest.mark.slow
def test_without_hypothesis_the_other_tests_run(tmp_path: Path) -> None:
    """The files that use it are skipped."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\nfind = importlib.util.find_spec\nsys.modules['hypothesis'] = None\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'hypothesis' else find(name, *more)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-S", "-c", "import sitecustomize, pytest; raise SystemExit(pytest.console_main())"]
    files = ["test_gpu.py", "test_weights.py", "test_properties.py", "test_testing_strategies.py"]
    result = subprocess.run(
        [*command, "-q", "--collect-only", "-p", "no:randomly", *(f"tests/{file}" for file in files)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert all((file in result.stdout) == (file in files[:2]) for file in files), result.stdout[-2000:]


def test_without_a_gpu(check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main() == 1
    assert summary(tmp_path)["build"]["note"] == "PyTorch finds no GPU"


def test_the_package_is_imported_as_if_it_were_installed(tmp_path: Path) -> None:
    load().link_package(tmp_path / "fdistill_ops")
    script = "import fdistill_ops.bench, fdistill_ops._native; print(*map(str, fdistill_ops.bench.__path__))"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    result = subprocess.run(
        [sys.executable, "-P", "-S", "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == [str(tmp_path / "fdistill_ops" / "bench")], result.stderr
