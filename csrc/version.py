"""The version of a build: that of git's tag (v1.2.3), a development version on the way to the next one after it, and in
a source distribution what that was made as.

FDISTILL_LABEL adds a label, so that wheels of one version can stand side by side: 1.2.3+cu130.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_DESCRIBED = re.compile(r"v(\d+(?:\.\d+)*(?:(?:a|b|rc)\d+)?)-(\d+)-g([0-9a-f]+)")


def version(root: Path = ROOT) -> str:
    found = _of_git(root) or _of_distribution(root) or next_version(root)
    label = os.environ.get("FDISTILL_LABEL", "")
    if not label:
        return found
    if not re.fullmatch(r"[a-z0-9]+(?:\.[a-z0-9]+)*", label):
        raise SystemExit(f"FDISTILL_LABEL must be lower-case letters and digits such as 'cu130', got {label!r}")
    return f"{found}.{label}" if "+" in found else f"{found}+{label}"


def next_version(root: Path = ROOT) -> str:
    """What the sources are on the way to, where git has no tag."""
    text = (root / "fdistill_ops" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^NEXT = "(.+)"$', text, re.MULTILINE)
    assert found is not None, "fdistill_ops/_version.py has no NEXT"
    return found[1]


def _of_git(root: Path) -> str | None:
    """None where this is no checkout of its own, or git is not there."""
    if not (root / ".git").exists():
        return None
    described = _git(root, "describe", "--tags", "--long", "--match", "v[0-9]*")
    if described is None:
        count, commit = _git(root, "rev-list", "--count", "HEAD"), _git(root, "rev-parse", "--short", "HEAD")
        return None if count is None or commit is None else f"{next_version(root)}.dev{count}+g{commit}"
    found = _DESCRIBED.fullmatch(described)
    if found is None:
        raise SystemExit(f"a tag that begins with v must be a version such as v1.2.3, got {described!r}")
    tag, distance, commit = found.groups()
    if distance == "0":
        return tag
    head, digits = re.fullmatch(r"(.*?)(\d+)", tag).groups()  # type: ignore[union-attr]
    return f"{head}{int(digits) + 1}.dev{distance}+g{commit}"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _of_distribution(root: Path) -> str | None:
    try:
        text = (root / "PKG-INFO").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^Version: (\S+)$", text, re.MULTILINE)
    return None if found is None else found[1]
