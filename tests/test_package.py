"""The wheel, with a C++ compiler and without one: what it holds, and that it works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from project import pyproject

pytestmark = [pytest.mark.slow, pytest.mark.no_poison]

ROOT = Path(__file__).resolve().parent.parent
NO_COMPILER = "no-such-c++-compiler"
BUILT = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")


def build(folder: Path, **environment: str) -> Path:
    """A wheel from a copy of the sources, without the CUDA kernels (tests/test_cuda_build.py), unpacked. Returns the
    folder it was unpacked to."""
    source = folder / "source"
    for name in ("csrc", "fdistill_ops", "kernels", "bench"):
        shutil.copytree(ROOT / name, source / name, ignore=BUILT)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    environment = os.environ | {"FDISTILL_CUDA": "0"} | environment
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("fdistill_ops-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def run(package: Path, script: str) -> dict[str, object]:
    """What the script prints as JSON, run with the unpacked wheel before everything else on the path. Without site
    (-S), whose hook for an editable installation would find that one's compiled module."""
    path = os.pathsep.join([str(package), *filter(None, sys.path)])
    chosen = ("FDISTILL_BACKEND", "TRITON_INTERPRET")
    environment = {key: value for key, value in os.environ.items() if key not in chosen} | {"PYTHONPATH": path}
    arguments = [sys.executable, "-S", "-c", script]
    result = subprocess.run(arguments, cwd=package, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def files(package: Path) -> set[str]:
    return {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}


def modules() -> set[str]:
    """Every Python file of the package in the source tree, as the wheel names it."""
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fdistill_ops").rglob("*.py")}
    return own | {
        f"fdistill_ops/{path.parent.name}/{path.name}"
        for path in (*ROOT.glob("kernels/*.py"), *ROOT.glob("bench/*.py"))
    }


def check_contents(package: Path) -> set[str]:
    """What both wheels hold. Returns what remains of the package's files."""
    found = files(package)
    assert {path.split("/")[0] for path in found if ".dist-info/" not in path} == {"fdistill_ops"}
    assert any(path.endswith(".dist-info/licenses/LICENSE") for path in found)
    inside = {path for path in found if path.startswith("fdistill_ops/")}
    expected = modules() | {"fdistill_ops/py.typed", "fdistill_ops/_build.json"}
    assert expected <= inside
    return inside - expected


@pytest.fixture(scope="module")
def plain_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where there is no compiler."""
    return build(tmp_path_factory.mktemp("plain"), CXX=NO_COMPILER)


@pytest.fixture(scope="module")
def compiled_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, command)):
        pytest.skip("no C++ compiler")
    # Whether the kernels are right is tested elsewhere, on the ones that are installed; this is the packaging alone.
    return build(tmp_path_factory.mktemp("compiled"), CXXFLAGS="-O0")


def test_every_package_is_listed() -> None:
    setuptools = pyproject()["tool"]["setuptools"]
    folders = {Path(path).parent.as_posix().replace("/", ".") for path in modules()}
    assert folders <= set(setuptools["packages"])


def test_contents_without_a_compiler(plain_wheel: Path) -> None:
    assert check_contents(plain_wheel) == set()


def test_import_without_a_compiler(plain_wheel: Path) -> None:
    script = """
import json, warnings
import torch
import fdistill_ops as fd
x = torch.randn(2, 3, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        fd.f_distill_loss(x, torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2)).backward()
        fd.f_weights(torch.zeros(2))
try:
    fd.set_backend("cpu")
    refused = None
except RuntimeError as error:
    refused = str(error)
print(json.dumps({
    "file": fd.__file__,
    "info": fd.build_info(),
    "warnings": [[w.category.__name__, str(w.message)] for w in caught],
    "refused": refused,
    "finite": bool(x.grad.isfinite().all()),
}))
"""
    result = run(plain_wheel, script)
    assert Path(str(result["file"])).is_relative_to(plain_wheel)
    info = result["info"]
    assert isinstance(info, dict)
    assert info["compiled"] is False
    assert NO_COMPILER in info["reason"]
    assert info["backends"] == ["reference"]
    (warning,) = result["warnings"]
    assert warning[0] == "RuntimeWarning"
    assert info["reason"] in warning[1]
    assert info["reason"] in str(result["refused"])
    assert result["finite"]


def test_contents_with_a_compiler(compiled_wheel: Path) -> None:
    (extension,) = check_contents(compiled_wheel)
    assert extension.startswith("fdistill_ops/_C.")
    assert extension.endswith((".so", ".pyd"))
    record = json.loads((compiled_wheel / "fdistill_ops" / "_build.json").read_text(encoding="utf-8"))
    assert record["compiler"]
    assert "plain" in record["isas"]


def test_import_with_a_compiler(compiled_wheel: Path) -> None:
    script = """
import json
import torch
import fdistill_ops as fd
fd.set_backend("cpu")
x = torch.randn(2, 3)
fd.distribution_matching_loss(x, torch.ones(2, 3), torch.zeros(2, 3))
print(json.dumps({"file": fd.__file__, "info": fd.build_info()}))
"""
    result = run(compiled_wheel, script)
    assert Path(str(result["file"])).is_relative_to(compiled_wheel)
    info = result["info"]
    assert isinstance(info, dict)
    assert info["compiled"] is True
    assert info["reason"] is None
    assert {"reference", "cpu"} <= set(info["backends"])
