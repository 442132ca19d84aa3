"""The table of a run, as text, Markdown and JSON."""

from __future__ import annotations

from .config import Config
from .data import Data
from .evaluate import LOST, NEIGHBOURS, SPEED, WITHIN, Row, poor_judge
from .figures import WeightCurve
from .files import to_json, write_text
from .mixtures import FAR

NOTES = """\
Compared with the training {kind}, {features}. Every row has {count} samples per draw, of the
{compared}' classes.{trained}

- Frechet distance: mean over the draws ± their standard deviation; lower is better. Finite sets of real {kind} are not
  at 0 either: read it against the first row.
- Precision, recall: k-NN manifolds, k = {k}.
{special}
- Samples/s: {device}, {threads} thread(s), batches of up to {speed}. Times differ between two runs with one seed, and
  nothing else does.
"""
CLASSES = """\
- Class as asked: samples in which the classifier sees the class they were asked for (first row: its accuracy).
- Rarest class: samples in which it sees a class over samples asked for of that class, where that is least."""
MODES = """\
- Modes: {modes}. One is covered where the samples have at least {lost:.0%} of its true mass."""
POINTS = """
- Near a mode: samples within {within:g} standard deviations of the nearest centre.
- Far from modes: samples beyond {far:g} standard deviations of every centre. Between modes: samples within one standard
  deviation of a midpoint between neighbouring centres: bridges. Exact: of the mixture itself, in both.
- JS divergence: of the samples from the mixture, both with noise of a mode's standard deviation."""

TRAINED = (
    " Nothing is held out (--hold-out 0): the first row, and the accuracy of the classifier if there is one, "
    "are measured on what was trained on."
)
WEAK = " (weak)"
WEAK_NOTE = "Where it says (weak), the figure is weak evidence: it depends on a classifier that is often wrong."


def features_of(data: Data) -> str:
    """The space of features, as a phrase."""
    if data.mixture is not None:
        return "in their coordinates"
    return "in the features of a classifier" if data.classes > 1 else "in their principal components"


def modes_of(data: Data) -> str:
    """The modes, as a phrase."""
    return "k-means clusters of the training images' features" if data.mixture is None else "components of the mixture"


def stray_title(name: str, exact: float) -> str:
    """The column of a share that ``Mixture.strays`` names."""
    return f"{'far from' if name == 'far' else name} modes (exact {exact:.2%})"


def cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """What the table shows of a row, by column; a column is there if any row has it."""
    digits = 2 if "agreement" in row else 4  # features of unit variance; coordinates, principal components
    spread = "" if row["frechet_std"] is None else f" ± {row['frechet_std']:.{digits}f}"
    weak = WEAK if row.get("weak") else ""
    columns = {
        "samples from": row["name"],
        "evaluations": _or_dash(row["evaluations"], "d"),
        "Frechet distance": f"{row['frechet']:.{digits}f}{spread}{weak}",
        "precision": f"{row['precision']:.3f}{weak}",
        "recall": f"{row['recall']:.3f}{weak}",
    }
    if "agreement" in rows[0]:
        columns |= {
            "class as asked": f"{row['agreement']:.1%}{weak}",
            "classes": f"{row['classes']}/{len(row['class_counts'])}{weak}",
            "rarest class": f"{row['rarest_class']:.2f}{weak}",
        }
    if "modes" in rows[-1]:
        columns["modes"] = f"{row['modes_covered']}/{row['modes']}" if "modes" in row else "-"
    for name, exact in rows[0].get("exact", {}).items():
        columns[stray_title(name, exact)] = _or_dash(row.get(name), ".2%")
    if "jensen_shannon" in rows[-1]:
        columns["near a mode"] = _or_dash(row.get("high_quality"), ".1%")
        columns["JS divergence"] = _or_dash(row.get("jensen_shannon"), ".3f")
    return columns | {"samples/s": _or_dash(row["samples_per_second"], ",.0f")}


def table(rows: list[Row]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    return markdown([cells(row, rows) for row in rows])


def markdown(shown: list[dict[str, str]]) -> str:
    """A table of rows of one set of columns."""
    lines = [list(shown[0]), *(list(line.values()) for line in shown)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def write(config: Config, data: Data, rows: list[Row], curves: list[WeightCurve], seconds: dict[str, float]) -> None:
    """report.md: the table, how to read it, the figures, times, settings; and report.json, the same numbers."""
    if data.classes > 1:
        accuracy = f"accuracy {rows[0]['judge_accuracy']:.1%} on the {data.compared}"
        features = f"in the features of a classifier ({accuracy}) scaled to unit variance"
        special = CLASSES
    else:
        features = features_of(data)
        special = MODES.format(modes=modes_of(data), lost=LOST)
        special += "" if data.mixture is None else POINTS.format(within=WITHIN, far=FAR)
    notes = NOTES.format(
        kind=data.kind,
        compared=data.compared,
        trained="" if data.holds_out else TRAINED,
        speed=SPEED,
        features=features,
        special=special,
        count=rows[0]["samples"],
        k=NEIGHBOURS,
        device=config.device,
        threads=config.threads,
    )
    settings, warning = config.settings(), poor_judge(rows, data.compared)
    warnings = [warning] if warning else []
    parts = [
        f"# Distillation of a teacher of {data.name}",
        *(f"**Warning: {warning}.** {WEAK_NOTE}" for warning in warnings),
        table(rows),
        notes.rstrip(),
        "![samples and weights](overview.png)",
        "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()) + ".",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
    ]
    write_text(config.out / "report.md", "\n\n".join(parts) + "\n")
    weights = {curve.name: curve.levels for curve in curves}
    content = {"rows": rows, "weights_by_noise_level": weights, "settings": settings, "seconds": seconds}
    content["warnings"] = warnings
    write_text(config.out / "report.json", to_json(content, indent=1) + "\n")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
