"""README.md and docs/: the snippets run, and what they name exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from project import pyproject

import fdistill_ops as fd

pytestmark = pytest.mark.no_poison

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def environment() -> dict[str, str]:
    """This process's, with the package that is under test on the path."""
    path = [str(Path(fd.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def run_python(arguments: list[str | Path], folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def only_python(text: str) -> str:
    """The snippets, on the lines that they have on the page; every other line empty. Those that need what a command has
    written are run by the tests of that command."""
    kept = [""] * len(text.split("\n"))
    for block in PYTHON_BLOCK.finditer(text):
        if text[: block.start()].endswith("<!-- loader -->\n"):  # tests/test_trainer_models.py
            continue
        first = text.count("\n", 0, block.start(1))
        lines = block.group(1).split("\n")
        kept[first : first + len(lines)] = lines
    return "\n".join(kept)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path) -> None:
    source = only_python(page.read_text(encoding="utf-8"))
    if page.name == "README.md":
        assert source.strip()
    script = tmp_path / f"{page.stem}.py"
    script.write_text(source, encoding="utf-8")
    run_python(["-W", "error::RuntimeWarning:fdistill_ops", script], tmp_path)


def test_snippets_are_found_on_their_lines() -> None:
    assert only_python("a\n\n```python\nx = 1\n\ny = 2\n```\nb\n```\nno\n```\n").split("\n")[3:6] == [
        "x = 1",
        "",
        "y = 2",
    ]
    assert README.count("```python") == len(PYTHON_BLOCK.findall(README))


def divergence_table() -> dict[str, list[str]]:
    """Aliases by name, as the README has them."""
    rows = re.search(r"^\| name \| aliases \|.*?\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert rows
    cells = [row.strip("|").split("|") for row in rows.group(1).splitlines()]
    return {re.findall(r"`([^`]+)`", row[0])[0]: re.findall(r"`([^`]+)`", row[1]) for row in cells}


def test_divergence_table() -> None:
    table = divergence_table()
    script = "import fdistill_ops as fd; print(*fd.DIVERGENCES)"
    assert list(table) == run_python(["-c", script], ROOT).split()  # here, other tests may have registered more
    for name, aliases in table.items():
        for alias in aliases:
            assert fd.get_divergence(alias) is fd.DIVERGENCES[name]
    with pytest.raises(ValueError, match="unknown") as error:  # the message lists every name and alias
        fd.get_divergence("no such divergence")
    known = str(error.value).split("Known: ")[1]
    for name, aliases in table.items():
        listed = re.search(rf"\b{name}(?: \(([^)]*)\))?(?:,|$)", known)
        assert listed, name
        others = {alias.replace("-", "_") for alias in aliases} - {name}
        assert others == set(re.findall(r"\w+", listed.group(1) or ""))


FORMULAS = {"log": np.log, "sqrt": np.sqrt}


def as_function(formula: str, **values: float) -> np.ndarray:
    """A formula of the table, such as ``r log r - (r+1) log((r+1)/2)``, evaluated."""
    text = formula.strip().replace("^", "**").replace("log r", "log(r)")
    text = re.sub(r"(\d|\br|\)) (?=[a-z(])", r"\1*", text)  # products
    text = re.sub(r"\b(\d)r\b", r"\1*r", text)
    text = re.sub(r"\b([ar]) (?=[(r])", r"\1*", text).replace("a(a", "a*(a")
    return eval(text, {"__builtins__": {}}, FORMULAS | values)


def test_formulas_of_the_divergence_table() -> None:
    r = np.exp(np.linspace(-3, 3, 61))
    a = 0.3
    rows = [
        line.strip("|").split("|")
        for line in README.splitlines()
        if re.match(r"\| `\w+`[^|]*\|[^|]*\|[^|]+\|[^|]+\|$", line)
    ]
    assert len(rows) == len(divergence_table())
    for name_cell, _, f, h in rows:
        name = re.findall(r"`(\w+)`", name_cell)[0]
        divergence = fd.get_divergence(name, a if name == "alpha" else None)
        f = f.split(", its limits")[0]
        for formula, values in ((f, divergence.f(torch.from_numpy(r))), (h, divergence.h(torch.from_numpy(r)))):
            expected = as_function(formula, r=r, a=a) * np.ones_like(r)
            np.testing.assert_allclose(values.numpy(), expected, rtol=1e-9, atol=1e-12, err_msg=f"{name}: {formula}")


def test_function_table_is_complete() -> None:
    section = README.split("## Functions")[1].split("## ")[0]
    named = set(re.findall(r"`(\w+)[`(]", section))
    assert {name for name in fd.__all__ if not name.startswith("_")} - {"Divergence"} <= named
    missing = [name for name in named if not hasattr(fd, name) and name != "help"]
    assert not missing


def test_statistics_fields() -> None:
    from fdistill_ops.stats import FIELDS

    section = README.split("## Statistics")[1].split("## ")[0]
    assert re.findall(r"`(\w+)`", section.split("The fields are")[1]) == list(FIELDS)


@pytest.mark.slow
def test_plot_is_what_the_script_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    drawn = tmp_path / "drawn.png"
    run_python([ROOT / "docs" / "plot_divergences.py", drawn], tmp_path)
    new, committed = imread(drawn), imread(ROOT / "docs" / "divergences.png")
    # Other versions of matplotlib place text and smooth lines a little differently.
    assert abs(new.shape[0] - committed.shape[0]) <= 2
    assert abs(new.shape[1] - committed.shape[1]) <= 2
    height, width = np.minimum(new.shape[:2], committed.shape[:2])
    assert np.abs(new[:height, :width, :3] - committed[:height, :width, :3]).mean() < 0.02


def test_api_page_is_what_the_docstrings_say(tmp_path: Path) -> None:
    target = tmp_path / "api.md"
    run_python([ROOT / "docs" / "write_api.py", target], tmp_path)
    assert target.read_text(encoding="utf-8") == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), (
        "python docs/write_api.py"
    )


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for target in re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for variable in re.findall(r"make [a-z-]+ (\w+)=", README):
        assert re.search(rf"^{variable} *=", makefile, re.MULTILINE), variable


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    scripts = pyproject()["project"]["scripts"]
    for command in re.findall(r"`(fdistill-\w+)`", README):
        assert command in scripts
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from fdistill_ops.trainer.__main__ import parse

    with pytest.raises(SystemExit):
        parse(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    section = README.split("## Trainer")[1].split("## ")[0]
    used = {
        word
        for line in re.findall(r"^    python .*$|`--.*?`", section, re.MULTILINE)
        for word in re.findall(r"--[a-z-]+", line)
    }
    assert used
    assert used <= options


def test_options_of_the_trainer_exist(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from fdistill_ops.trainer.__main__ import main

    text = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    for command in ("compare ", "sample ", "export ", ""):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        lines = re.findall(rf"^    fdistill-train {command}(?!compare|sample|export)(.*)$", text, re.MULTILINE)
        assert lines
        assert set(re.findall(r"--[a-z-]+", " ".join(lines))) <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    for link in links:
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            assert (page.parent / path).exists(), link
            assert not anchor, f"{link}: anchors are not checked"


def test_layout_names_what_exists() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.split("## Where is what")[1].split("## ")[0]
    folders: list[str] = []
    for indent, first in re.findall(r"^    ( *)([\w./]+)", section, re.MULTILINE):
        folders = folders[: len(indent) // 2]
        assert (ROOT / "/".join(folders) / first).exists(), first
        if first.endswith("/"):
            folders.append(first.rstrip("/"))
    mentioned = re.findall(r"\w+\.(?:py|cpp|md)\b", section)
    existing = {path.name for folder in ("fdistill_ops", "csrc", "docs") for path in (ROOT / folder).rglob("*")}
    assert set(mentioned) <= existing


def test_nothing_is_bound_to_one_machine() -> None:
    """No addresses of servers, no options that name one, no home folders."""
    texts = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / ".ci" / "run", *PAGES]
    project = pyproject()["project"]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for url in project["urls"].values():  # the project's own
            text = text.replace(f'"{url}"', "")
        found = re.findall(r"--\S+-(?:url|links)|/home/|~/|https?://\S+", text)
        assert not found, (path.name, found)
