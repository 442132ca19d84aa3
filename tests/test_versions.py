"""What binds the package to versions: PyTorch's private names in one file, Triton's version, the version of a build."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fdistill_ops import _torch, backends

pytestmark = pytest.mark.no_poison
ROOT = Path(__file__).resolve().parent.parent
needs_sources = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not a source tree")
PRIVATE = {name for name in dir(torch.Tensor) if re.match(r"_[a-z]", name)}


def private_names(path: Path) -> list[str]:
    """PyTorch's private names in a file: torch._x, torch.x._y, imports of such modules or names, Tensor._x."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            names = [text] if re.match(r"(torch|Tensor|forward_ad|graph|_pytree)\.[\w.]+$", text) else []
            names += [text] if node.attr in PRIVATE and not text.startswith(("self.", "cls.")) else []
        else:
            continue
        found += [f"{path.name}:{node.lineno}: {name}" for name in names if re.search(r"\._[a-z]", name)]
    return found


@needs_sources
def test_private_names_are_in_one_file() -> None:
    paths = [path for folder in ("fdistill_ops", "kernels", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert private_names(ROOT / "fdistill_ops" / "_torch.py")
    assert [name for path in paths if path.name != "_torch.py" for name in private_names(path)] == []


def test_names_are_pytorchs_own() -> None:
    """Nothing stands between a call and them."""
    assert _torch.dispatch_modes is torch._C._len_torch_dispatch_stack
    assert _torch.functorch_level is torch._C._functorch.peek_interpreter_stack
    assert _torch.from_dlpack is torch._C._from_dlpack
    if _torch.KNOWS_KEPT_GRAPHS:
        assert _torch.keep_graph is torch._C._autograd._get_current_graph_task_keep_graph
    assert hasattr(torch.autograd.forward_ad, _torch.DUAL_LEVEL)
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        assert hasattr(mode, _torch.TAKES_REAL_ONES)


def test_what_a_pytorch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.library, "register_fake")
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.4 or newer.*has no torch\.library\.register_fake"):
        _torch._needed("library.register_fake")


def test_graphs_count_as_kept_where_pytorch_does_not_say() -> None:
    """Run in a process of its own, whose PyTorch has lost the name: a second backward still has its gradient."""
    script = """
import torch
if hasattr(torch._C._autograd, "_get_current_graph_task_keep_graph"):
    del torch._C._autograd._get_current_graph_task_keep_graph
import fdistill_ops as fd
from fdistill_ops import _torch
assert not _torch.KNOWS_KEPT_GRAPHS
x = torch.randn(2, 3, requires_grad=True)
loss = fd.distribution_matching_loss(x, torch.ones(2, 3), torch.zeros(2, 3))
first, = torch.autograd.grad(loss, x, retain_graph=True)
second, = torch.autograd.grad(loss, x)
assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("version", "served"), [("3.0.0", False), ("3.3.1+git0d4682f0", False), ("3.4.0", True), ("3.10.0", True)]
)
def test_an_old_triton_is_told_by_its_version(monkeypatch: pytest.MonkeyPatch, version: str, served: bool) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_triton_version", lambda: version)
    reason = backends._why_not("triton")
    if served:
        assert reason is None or "newer" not in reason
        return
    assert reason is not None
    assert "need Triton 3.4 or newer" in reason and f"Triton {version} is installed" in reason
    assert "triton" not in backends.available_backends() and "reference" in backends.available_backends()
    with pytest.raises(RuntimeError, match=r"need Triton 3\.4 or newer"):
        backends.set_backend("triton")


# ---------------------------------------------------------------------------------------------- the version of a build


@pytest.fixture
def version_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not (ROOT / "csrc").exists():
        pytest.skip("not a source tree")
    monkeypatch.syspath_prepend(str(ROOT / "csrc"))
    monkeypatch.delenv("FDISTILL_LABEL", raising=False)
    return importlib.import_module("version")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "fdistill_ops").mkdir()
    (tmp_path / "fdistill_ops" / "_version.py").write_text('NEXT = "0.1.0"\n')
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_version_follows_the_tags(version_module: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert version_module.version(tree) == "0.1.0"  # no checkout
    git(tree, "init", "-q")
    git(tree, "commit", "-q", "--allow-empty", "-m", "first")
    assert re.fullmatch(r"0\.1\.0\.dev1\+g[0-9a-f]+", version_module.version(tree))
    git(tree, "tag", "v0.2.0")
    assert version_module.version(tree) == "0.2.0"
    monkeypatch.setenv("FDISTILL_LABEL", "cu130")
    assert version_module.version(tree) == "0.2.0+cu130"
    git(tree, "commit", "-q", "--allow-empty", "-m", "second")
    assert re.fullmatch(r"0\.2\.1\.dev1\+g[0-9a-f]+\.cu130", version_module.version(tree))
    monkeypatch.setenv("FDISTILL_LABEL", "CU 130")
    with pytest.raises(SystemExit, match=r"FDISTILL_LABEL must be .* got 'CU 130'"):
        version_module.version(tree)
    monkeypatch.delenv("FDISTILL_LABEL")
    git(tree, "tag", "v1-final")
    with pytest.raises(SystemExit, match=r"must be a version such as v1\.2\.3, got 'v1-final"):
        version_module.version(tree)


def test_version_of_a_source_distribution(version_module: ModuleType, tree: Path) -> None:
    """Also where that was unpacked within another project's checkout."""
    git(tree, "init", "-q")
    git(tree, "commit", "-q", "--allow-empty", "-m", "another project")
    git(tree, "tag", "v9.9")
    inside = tree / "unpacked"
    (inside / "fdistill_ops").mkdir(parents=True)
    (inside / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: fdistill_ops\nVersion: 0.3.1\n")
    assert version_module.version(inside) == "0.3.1"


@needs_sources
def test_version_without_a_build() -> None:
    from fdistill_ops import _version

    assert re.fullmatch(r"\d+\.\d+\.\d+", _version.NEXT)
    assert _version.__version__
