"""The rows of fdistill_ops/integrations/_known.py for a function, from a clone of its code base: every fingerprint the
function has had, with the first and the last commit that changed its file while it had it.

    python tests/upstream_fingerprints.py CLONE FILE NAME [REVISION]

CLONE is a folder with a clone, bare or not; FILE the path of the module in it; NAME "function" or "Class.method".
"""

from __future__ import annotations

import subprocess
import sys

from fdistill_ops.integrations._fingerprint import fingerprint_in


def git(clone: str, *arguments: str) -> str:
    return subprocess.run(["git", "-C", clone, *arguments], check=True, capture_output=True, text=True).stdout


def rows(clone: str, file: str, name: str, revision: str = "HEAD") -> list[tuple[str, str, str]]:
    """(fingerprint or what is wrong, first commit, last commit), the oldest first."""
    found: list[tuple[str, str, str]] = []
    for commit in git(clone, "log", "--reverse", "--format=%h", revision, "--", file).split():
        try:
            print_ = fingerprint_in(git(clone, "show", f"{commit}:{file}"), name) or f"no {name}"
        except subprocess.CalledProcessError:
            print_ = "no such file"
        except SyntaxError:
            print_ = "not Python"
        first = found.pop()[1] if found and found[-1][0] == print_ else commit
        found.append((print_, first, commit))
    return found


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    for print_, first, last in rows(*sys.argv[1:]):
        print(f"{print_}  {first}..{last}")
