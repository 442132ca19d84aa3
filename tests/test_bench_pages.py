"""Plots and pages."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_cases import STEADY, example, record_of, scaled
from fdistill_ops.bench import __main__ as command_line
from fdistill_ops.bench import docs, plots
from fdistill_ops.bench.cases import SHAPES, Case
from fdistill_ops.bench.figures import DOUBTS
from fdistill_ops.bench.record import Overhead, Record

from fdistill_ops._colours import LINES, OKABE_ITO

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.no_poison


def texts(figure: Any) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures that are saved, by the names of the files."""
    pytest.importorskip("matplotlib")
    found: dict[str, Any] = {}
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (found.update({path.name: figure}), save(figure, path)))
    return found


def test_plots(drawn: dict[str, Any], tmp_path: Path) -> None:
    """Each says where it was measured, and has one legend."""
    from matplotlib.image import imread

    record = example()
    written = plots.plot(record, tmp_path / "figures")
    assert [path.name for path in written] == ["roofline.png", "batch.png", "ratios.png"]
    assert sorted(written) == sorted((tmp_path / "figures").iterdir())
    for path in written:
        assert imread(path).std() > 0.05
        said = texts(drawn[path.name])
        assert any(
            "a, 4 cores, 1 KiB of cache, avx; torch 2.x, Python 3.y; commit abc; 2026-01-31" in text for text in said
        )
        assert any("1 thread" in text for text in said)
        assert [len(axes.get_legend_handles_labels()[0]) > 0 for axes in drawn[path.name].axes] == [True]
        assert len(drawn[path.name].legends) == 1
        assert not any(axes.get_legend() for axes in drawn[path.name].axes)
        assert not any("!" in text for text in said)
    assert any("lower is better" in text for text in texts(drawn["batch.png"]))
    assert any("higher is better" in text for text in texts(drawn["roofline.png"]))
    assert plots.plot(record_of({"cpu": []}), tmp_path / "none") == []


def test_longer_bars_are_faster(drawn: dict[str, Any], tmp_path: Path) -> None:
    """All from 0, on a linear axis."""
    plots.plot(record_of({"cpu": [1e-3] * 9, "eager": [4e-3] * 9, "compile": [2e-3] * 9, "copy": [5e-4] * 9}), tmp_path)
    (axes,) = drawn["ratios.png"].axes
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(0.0, 4.0), (0.0, 2.0)]
    assert axes.get_yscale() == "linear"
    assert "times as fast as\neager PyTorch\n(longer is better)" in texts(drawn["ratios.png"])
    assert {"4", "2", "8"} <= set(texts(drawn["ratios.png"]))
    from matplotlib.colors import to_hex

    colours = {to_hex(bar.get_facecolor()).upper() for bar in axes.patches}
    assert colours == {OKABE_ITO["blue"], OKABE_ITO["green"]}


def test_worthless_figures_are_hollow_and_marked(drawn: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib.colors import to_hex

    record = example()
    for result in record.results:
        result.load = 3.0 if result.contender == "cpu" else 0.5
    plots.plot(record, tmp_path)
    (cpu, compiled) = drawn["ratios.png"].axes[0].patches
    assert (to_hex(cpu.get_facecolor()), to_hex(compiled.get_facecolor()).upper()) == ("#ffffff", OKABE_ITO["green"])
    for figure in drawn.values():
        assert any(text.endswith("!l") for text in texts(figure))
        assert f"! worthless; l: {DOUBTS['load']}" in texts(figure)


def test_intervals_are_drawn(drawn: dict[str, Any], tmp_path: Path) -> None:
    from matplotlib.collections import LineCollection

    record = record_of({"cpu": STEADY, "eager": scaled(2.0), "copy": scaled(0.5)}, Case("f_distill", (8, 32), "1 KiB"))
    plots.plot(record, tmp_path)
    (axes,) = drawn["roofline.png"].axes
    ends = [lines.get_segments()[0][:, 1] for lines in axes.collections if isinstance(lines, LineCollection)]
    rates = [4000 / seconds for seconds in (1.01, 0.99)]
    assert any(np.allclose(end, rates) for end in ends)


def test_there_is_one_palette() -> None:
    """Okabe and Ito's, also in the trainer's figures."""
    assert set(plots.COLOURS.values()) <= set(OKABE_ITO.values())
    assert set(LINES) < set(OKABE_ITO.values())
    for path in (*ROOT.glob("fdistill_ops/**/*.py"), *ROOT.glob("bench/*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"[\"'](C\d|tab:\w+)[\"']|f\"C\{", text), path


def test_pages_show_what_the_record_has() -> None:
    record = Record.read(ROOT / docs.RECORD)
    for name in docs.PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        assert docs.render(page, record) == page, f"{name}: python -m fdistill_ops.bench.docs --render"
        assert page.count("<!-- figures:") == page.count("<!-- end of figures -->") > 0
    assert all(result.error is None for result in record.results)


def test_figures_of_the_pages() -> None:
    record = example()
    page = "a\n<!-- figures: float32 -->\nold\n<!-- end of figures -->\nb\n"
    for result in record.results:
        result.case = replace(result.case, threads=2)
    rendered = docs.render(page, record)
    assert "| cifar10 | 1.000 | 0.7000 | 0.3000 | 4.000 | 2.000 | 0.5000 | 4.00 | 2.00 | 50% |" in rendered.splitlines()
    assert rendered.startswith("a\n<!-- figures: float32 -->\n| shape | ours |")
    assert rendered.endswith("|\n<!-- end of figures -->\nb\n")
    assert "batch" not in rendered
    assert docs.render(rendered, record) == rendered
    with pytest.raises(KeyError):
        docs.render(page.replace("float32", "no-such-table"), record)


def test_summary() -> None:
    """Ten lines, without what is worthless."""
    record = record_of({"cpu": [1e-3] * 9, "eager": [4e-3] * 9, "copy": [5e-4] * 9})
    other = Case("f_distill", SHAPES["sd15"], "sd15")
    record.results += record_of({"cpu": [1e-3] * 9, "eager": [3e-3] * 9, "copy": [1e-3, 3e-4] * 5}, other).results
    for result in record.results:
        result.case = replace(result.case, threads=2)
    lines = docs.TABLES["summary"](record).splitlines()
    assert len(lines) == 10
    assert lines[0] == (
        "- float32, all cores: 3.0 to 4.0 times as fast as eager PyTorch, at 50% of the speed of a copy."
    )
    assert lines[1] == "- bfloat16, all cores: not measured."


def test_pages_are_not_written_from_wrong_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(arguments: Any, record: Record) -> int:
        record.results += record_of({"cpu": []}, cpu="wrong result: value").results
        return 0

    monkeypatch.setattr(docs, "measure_all", measured)
    monkeypatch.setattr(docs, "RECORD", tmp_path / "record.json")
    with pytest.raises(SystemExit) as error:
        docs.measure_pages()
    assert error.value.code == 1
    assert "f_distill cifar10 float32, cpu: wrong result: value" in capsys.readouterr().err


def test_budget() -> None:
    """1.15 copies, and below 64 MiB a tensor the host overhead."""
    record = record_of({"cpu": [1e-3] * 9, "copy": [5e-4] * 9}, Case("f_distill", (256, 3, 32, 32), "cifar10"))
    big = Case("f_distill", (8, 1 << 21), "64 MiB")
    record.results += record_of({"cpu": [5e-3] * 9, "copy": [5e-3] * 9}, big).results
    for result in record.results:
        result.case = replace(result.case, threads=2)
    assert "| cifar10 |" in docs.TABLES["budget"](record).splitlines()  # without the overhead
    record.overhead = [Overhead("f_distill", "cpu", "cpu", [30e-6] * 9, [20e-6] * 9)]
    lines = docs.TABLES["budget"](record).splitlines()
    assert lines[2:] == [f"| cifar10 | {1e-3 / (50e-6 + 1.15 * 5e-4):.2f} |", f"| 64 MiB | {1 / 1.15:.2f} |"]
    assert docs.TABLES["large"](record).splitlines()[2:] == ["| 64 MiB | 5.000 | 5.000 | 100% |"]


def test_commands_of_the_pages_parse() -> None:
    for name in docs.PAGES:
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            found = re.match(r"    fdistill-bench( .*)?$", line)
            if found:
                command_line.parse(["--device", "cpu", *(found[1] or "").split()])
    for options in docs.RUNS:
        assert command_line.parse(["--device", "cpu", *options.split()]).cases
