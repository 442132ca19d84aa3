"""No module of the package needs one that needs it, not even within a function."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import fdistill_ops as fd

PACKAGE = Path(fd.__file__).parent


def imported(path: Path, modules: set[str]) -> set[str]:
    """The package's own modules that a file imports, wherever in it."""
    name = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])]) if node.level else ""
            base = base or node.module or ""
            parts = {f"{base}.{alias.name}" for alias in node.names}
            found |= parts & modules or {base}
            found |= {base} if not parts <= modules else set()
    return (found & modules) - {name}


def graph() -> dict[str, set[str]]:
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
        paths[name.removesuffix(".__init__")] = path
    modules = set(paths)
    return {name: imported(path, modules) for name, path in paths.items()}


def test_no_circle() -> None:
    modules = graph()
    assert "fdistill_ops._call" in modules["fdistill_ops.backends"]
    assert "fdistill_ops._torch" in modules["fdistill_ops._ops"]
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
