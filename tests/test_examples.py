"""Every script in examples/ runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_readme import ROOT, run_python

pytestmark = [pytest.mark.slow, pytest.mark.no_poison]

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_example(script: Path, tmp_path: Path) -> None:
    output = run_python(["-W", "error::RuntimeWarning:fdistill_ops", script], tmp_path)
    assert output.strip()
    assert list(tmp_path.iterdir()) == []
    assert script.read_text(encoding="utf-8").startswith('"""')


def test_there_are_examples() -> None:
    assert EXAMPLES
