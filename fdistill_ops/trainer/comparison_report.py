"""The report of a comparison: report.md, report.json, and report.html, one file with its plots in it."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import figures
from .config import Config
from .evaluate import LEAST_EXPECTED, LOST, NEIGHBOURS, WITHIN, Row, poor_judge
from .files import to_json, write_text
from .findings import LEVEL, Finding
from .mixtures import FAR, MIXTURES
from .report import WEAK, WEAK_NOTE, markdown, stray_title

Measured = dict[str, Any]

NOTES = f"""\
Means over the seeds ± their standard errors. Each seed has its own split of the data, teacher and random numbers, which
its students share. Distances are measured in the coordinates of points, in the features of a classifier where images
have classes, and in principal components of images of one class.

- Modes lost: of the components of a mixture, or of k-means clusters of the training images' features; a mode is lost
  where the samples have less than {LOST:.0%} of its true mass. There are so many samples that the lightest mode expects
  {LEAST_EXPECTED}, or as many as the settings say (mode_samples), if that is fewer.
- Precision, recall: k-NN manifolds, k = {NEIGHBOURS}. Frechet distance: to the training data; lower is better.
- Near a mode: samples within {WITHIN:g} standard deviations of a component's centre; 98.9% of the mixture's are.
- Far from modes: samples beyond {FAR:g} standard deviations of every centre. Between modes: samples within one of a
  midpoint between neighbouring centres: bridges. Exact: of the mixture itself, in both.
- D_f: the divergence trained with, and the Jensen-Shannon divergence, of the samples from the mixture's exact density,
  both with noise of a component's standard deviation. The samples' density is that of the noisy empirical distribution.
  It can be infinite, for instance by chi-squared where a component has no samples near.
- Weight variance, where the mean weight is 1: batch size / effective sample size - 1, mean over the training's log.
- Gradient variance, of the f-distill loss without the normaliser: total variance over independent batches,
  relative to that of the unweighted gradient from the same random numbers. "Own": in the state in which the run ended;
  "common": all in that in which the first of them, reverse KL's if there is one, ended.
"""
TESTS = f"""\
Paired, one-sided t-tests over the seeds against reverse KL, at the {LEVEL:.0%} level; p-values are corrected by Holm's
method for the divergences of one claim on one data set. Less mode-seeking are those whose h(r) grows with r = p/q.
"""

STRAYS = ("far", "between")
JUDGED = (
    "modes lost",
    "precision",
    "recall",
    "Frechet distance",
    "class as asked",
)  # by the classifier, if any

# Column: where its number comes from, and its format. One that nobody has is left out.
COLUMNS: dict[str, tuple[Callable[[Row], Any], str]] = {
    "modes lost": (lambda row: row.get("modes_lost"), ".2f"),
    "precision": (lambda row: row["precision"], ".3f"),
    "recall": (lambda row: row["recall"], ".3f"),
    "Frechet distance": (lambda row: row["frechet"], ".4f"),
    "near a mode": (lambda row: row.get("high_quality"), ".3f"),
    "far": (lambda row: row.get("far"), ".2%"),
    "between": (lambda row: row.get("between"), ".2%"),
    "own D_f": (lambda row: (row.get("divergences") or {}).get(row.get("divergence")), ".3f"),
    "JS divergence": (lambda row: row.get("jensen_shannon"), ".3f"),
    "class as asked": (lambda row: row.get("agreement"), ".3f"),
    "weight variance": (lambda row: row.get("weight_variance"), ".3f"),
    "gradient variance, own": (lambda row: row.get("gradient_variance"), ".3f"),
    "gradient variance, common": (lambda row: row.get("gradient_variance_common"), ".3f"),
}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and its standard error; no error from one value, or of what is not finite."""
    mean = sum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def cell(values: Sequence[Any], form: str) -> str:
    """Mean ± standard error of the numbers; a dash where one is missing."""
    if not values or any(value is None for value in values):
        return "-"
    mean, error = mean_and_error(values)
    return format(mean, form) + ("" if error is None else f" ± {error:{form}}")


def table(measured: Sequence[Measured]) -> list[dict[str, str]]:
    """Rows of one data set: its held-out data, the teacher, and every divergence."""
    groups: dict[str, list[Row]] = {}
    for one in measured:
        for row in [*one["rows"], *one["results"]]:
            groups.setdefault(row["name"], []).append(row)
    lines = []
    for name, rows in groups.items():
        numbers = {column: cell([get(row) for row in rows], form) for column, (get, form) in COLUMNS.items()}
        if any(row.get("weak") for row in rows):
            numbers |= {column: numbers[column] + WEAK for column in JUDGED if numbers[column] != "-"}
        lines.append({"samples from": name} | numbers)
    used = [column for column in lines[0] if any(line[column] != "-" for line in lines)]
    modes = measured[0]["results"][0]["modes"]
    exact = measured[0]["rows"][0].get("exact", {})
    titles = {column: column for column in used} | {"modes lost": f"modes lost of {modes}"}
    titles |= {name: stray_title(name, exact[name]) for name in STRAYS if name in exact}
    return [{titles[column]: line[column] for column in used} for line in lines]


def divergence_table(measured: Sequence[Measured]) -> list[dict[str, str]]:
    """True divergences of every student of a mixture: trained with the row's, measured by the column's."""
    names = [result["divergence"] for result in measured[0]["results"]]
    return [
        {"trained with": trained}
        | {
            f"D, {name}": cell(
                [
                    result["divergences"][name]
                    for one in measured
                    for result in one["results"]
                    if result["divergence"] == trained
                ],
                ".3f",
            )
            for name in names
        }
        for trained in names
    ]


def write(out: Path, runs: Sequence[Config], measured: Sequence[Measured], found: Sequence[Finding]) -> None:
    """All three files; the tables and the findings go to stdout too."""
    text = ["# Which divergence covers the modes?", NOTES.rstrip()]
    page = [_paragraphs(part) for part in text]
    for name in dict.fromkeys(one["name"] for one in measured):
        here = [one for one in measured if one["name"] == name]
        tables = [table(here)]
        if here[0]["results"][0].get("divergences"):
            tables.append(divergence_table(here))
        sentences = [finding.sentence for finding in found if finding.data == name]
        warning = poor_judge([row for one in here for row in one["rows"]], here[0]["compared"])
        warning = warning and f"Warning: {warning}. {WEAK_NOTE}"
        parts = [f"## {name}", *filter(None, [warning]), *(markdown(lines) for lines in tables)]
        parts += ["\n".join(f"- {sentence}" for sentence in sentences)] if sentences else []
        print("\n\n".join(parts), end="\n\n")
        text += parts
        page += [
            f"<h2>{html.escape(name)}</h2>",
            *map(_paragraphs, filter(None, [warning])),
            *map(_html_table, tables),
            _html_list(sentences),
            *_plots(here[0]),
        ]
    settings = {config.data: config.settings() for config in runs if config.seed == runs[0].seed}
    text.append(TESTS.rstrip())
    page.append(_paragraphs(TESTS))
    for name, values in settings.items():
        line = f"Settings, {name}: " + ", ".join(f"{key} {value}" for key, value in values.items()) + "."
        text.append(line)
        page.append(_paragraphs(line))
    content = {
        "findings": [vars(finding) | {"sentence": finding.sentence} for finding in found],
        "runs": [{key: value for key, value in one.items() if key not in ("samples", "curves")} for one in measured],
        "settings": settings,
    }
    write_text(out / "report.json", to_json(content, indent=1) + "\n")
    write_text(out / "report.md", "\n\n".join(text) + "\n")
    write_text(out / "report.html", PAGE.format(body="\n".join(page)))


# ----------------------------------------------------------------------------------------------------------------- HTML

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>Which divergence covers the modes?</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ border: 1px solid #ccc; padding: 0.2em 0.6em; text-align: left; }}
img {{ max-width: 100%; }}
</style>
{body}
</html>
"""


def _paragraphs(text: str) -> str:
    """A heading, paragraphs and lists, which is all the Markdown used here."""
    parts = []
    for block in text.strip().split("\n\n"):
        if block.startswith("- "):
            parts.append(_html_list([item.removeprefix("- ") for item in block.split("\n- ")]))
        else:
            tag = "h1" if block.startswith("# ") else "p"
            parts.append(f"<{tag}>{html.escape(block.removeprefix('# '))}</{tag}>")
    return "\n".join(parts)


def _html_table(lines: list[dict[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in lines[0])
    rows = ("".join(f"<td>{html.escape(text)}</td>" for text in line.values()) for line in lines)
    return f"<table><tr>{head}</tr>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


def _html_list(sentences: Sequence[str]) -> str:
    return "<ul>" + "\n".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _plots(one: Measured) -> list[str]:
    """Samples and weights of one seed."""
    mixture = MIXTURES[one["name"]]() if "divergences" in one["results"][0] else None  # a path may be called so
    curves = [figures.WeightCurve(**curve) for curve in one["curves"]]
    plots = []
    for title, draw in (
        ("Samples", lambda file: figures.sets_png(file, one["samples"], mixture)),
        ("Weights", lambda file: figures.weights_png(file, curves)),
    ):
        file = io.BytesIO()
        draw(file)
        source = base64.b64encode(file.getvalue()).decode()
        plots.append(f'<p>{title}, seed {one["seed"]}</p>\n<img alt="{title}" src="data:image/png;base64,{source}">')
    return plots
