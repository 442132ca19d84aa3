"""How the build runs its commands, with ninja and without, on commands that cost nothing."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
pytestmark = pytest.mark.skipif(not CSRC.exists(), reason="not a source tree")


@pytest.fixture
def compile_kernels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_kernels", CSRC / "compile_kernels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["compile_kernels"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("with_ninja", [True, False])
def test_commands_run_in_order(
    compile_kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_ninja: bool
) -> None:
    if not with_ninja:
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ninja" else find(name))
        monkeypatch.setattr(shutil, "which", lambda name: None)
    source, middle, result = tmp_path / "a $b c", tmp_path / "middle", tmp_path / "result"
    source.write_text("text")
    copy = [sys.executable, "-c", "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"]
    todo = [
        compile_kernels.Step(result, [middle], [*copy, str(middle), str(result)], False),
        compile_kernels.Step(middle, [source], [*copy, str(source), str(middle)], True),
    ]
    compile_kernels.run(todo, tmp_path / "build")
    assert result.read_text() == "text"


def test_what_is_asked_for_is_checked(compile_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDISTILL_CUDA", "yes")
    with pytest.raises(SystemExit, match="FDISTILL_CUDA must be auto, 0 or 1, got 'yes'"):
        compile_kernels.find_nvcc()
    monkeypatch.setenv("FDISTILL_CUDA", "0")
    with pytest.raises(compile_kernels.NoCuda, match="FDISTILL_CUDA=0"):
        compile_kernels.find_nvcc()
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    monkeypatch.setenv("FDISTILL_CUDA", "1")
    with pytest.raises(SystemExit, match="nvcc was not found"):
        compile_kernels.find_nvcc()
    monkeypatch.setenv("FDISTILL_CUDA", "auto")
    with pytest.raises(compile_kernels.NoCuda, match="nvcc was not found"):
        compile_kernels.find_nvcc()


def test_nvcc_is_found_where_it_usually_is(
    compile_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Off the PATH too; but CUDA_HOME, where it is given, is the only place."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("FDISTILL_CUDA", "1")
    monkeypatch.setenv("FDISTILL_CUDA_ARCHS", "90")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(compile_kernels, "CUDA_HOME", str(tmp_path))
    assert compile_kernels.find_nvcc()[0] == str(nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(SystemExit, match="nvcc was not found"):
        compile_kernels.find_nvcc()


def test_architectures(compile_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those asked for as they are; of the default ones those that nvcc knows."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'compute_75\\ncompute_80\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("FDISTILL_CUDA_ARCHS", raising=False)
    assert compile_kernels.cuda_archs(str(nvcc)) == ["80", "90"]
    nvcc.write_text("#!/bin/sh\necho compute_60\n")
    with pytest.raises(compile_kernels.NoCuda, match="knows none of the compute capabilities 80 90 100"):
        compile_kernels.cuda_archs(str(nvcc))
    monkeypatch.setenv("FDISTILL_CUDA_ARCHS", "86, 120a")
    assert compile_kernels.cuda_archs(str(nvcc)) == ["86", "120a"]
    monkeypatch.setenv("FDISTILL_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match=r"FDISTILL_CUDA_ARCHS must be .* got 'hopper'"):
        compile_kernels.cuda_archs(str(nvcc))


def test_users_do_not_wait_for_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the tests' own: built where they ask for it, and nowhere else."""

    def module() -> ModuleType:
        spec = importlib.util.spec_from_file_location("compile_kernels_again", CSRC / "compile_kernels.py")
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "compile_kernels_again", found)
        spec.loader.exec_module(found)
        return found

    monkeypatch.delenv("FDISTILL_EMULATOR", raising=False)
    plain = module()
    assert plain.MODULES == ["_C"]
    steps = plain.steps(["c++"], None, Path("objects"), Path("_C.so"), None)
    assert steps and not [step for step in steps if "emulat" in " ".join(step.command)]
    monkeypatch.setenv("FDISTILL_EMULATOR", "1")
    assert module().MODULES == ["_C", "_C_emulated"]
