"""The source distribution: its tests are collected, and its metadata says who and where."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from project import pyproject

pytestmark = [pytest.mark.slow, pytest.mark.no_poison]

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / ".git").exists():
    pytest.skip("not a checkout", allow_module_level=True)


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    for name in tracked():
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    script = "import setuptools.build_meta as backend, sys; print(backend.build_sdist(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    return root


def test_everything_but_habits_of_the_checkout_is_in_it(unpacked: Path) -> None:
    inside = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    missing = {name for name in tracked() if name not in inside and (ROOT / name).exists()}
    assert all(name.startswith((".git", "bench/results/")) or name == "MANIFEST.in" for name in missing), missing
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]


def test_its_tests_are_collected(unpacked: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_metadata(unpacked: Path) -> None:
    fields = email.message_from_string((unpacked / "PKG-INFO").read_text(encoding="utf-8"))
    assert fields["Author"]
    project = pyproject()["project"]
    repository = project["urls"]["Repository"]
    assert f"Repository, {repository}" in fields.get_all("Project-URL", [])
    assert "Typing :: Typed" in fields.get_all("Classifier", [])
    assert fields["Description-Content-Type"] == "text/markdown"
    text = re.sub(r"```.*?```", "", fields.get_payload(), flags=re.DOTALL)
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    assert any(picture for picture, _ in links)
    for picture, link in links:
        prefix = f"{repository}/{'raw' if picture else 'blob'}/main/"
        assert link.startswith(prefix), link
        assert (ROOT / link.removeprefix(prefix)).exists(), link
