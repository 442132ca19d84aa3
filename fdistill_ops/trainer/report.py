"""The table of a run, as text, Markdown and JSON."""

from __future__ import annotations

from .config import Config
from .evaluate import NEIGHBOURS, Row
from .figures import WeightCurve
from .files import to_json, write_text

NOTES = """\
Compared with the training images, in the features of a classifier (held-out accuracy {accuracy:.1%}) scaled to unit
variance. Every row has {count} samples per draw, of the held-out images' classes.

- Frechet distance: mean over the draws ± their standard deviation; lower is better. Finite sets of real images are not
  at 0 either: read it against the first row.
- Precision, recall: k-NN manifolds, k = {k}.
- Class as asked: samples in which the classifier sees the class they were asked for (first row: its accuracy).
- Rarest class: samples in which it sees a class over samples asked for of that class, where that is least.
- Samples/s: {device}, {threads} thread(s), batches of {count}. Times differ between two runs with one seed, and nothing
  else does.
"""


def cells(row: Row) -> dict[str, str]:
    """What the table shows of a row, by column."""
    spread = "" if row["frechet_std"] is None else f" ± {row['frechet_std']:.2f}"
    return {
        "samples from": row["name"],
        "evaluations": _or_dash(row["evaluations"], "d"),
        "Frechet distance": f"{row['frechet']:.2f}{spread}",
        "precision": f"{row['precision']:.3f}",
        "recall": f"{row['recall']:.3f}",
        "class as asked": f"{row['agreement']:.1%}",
        "classes": f"{row['classes']}/{len(row['class_counts'])}",
        "rarest class": f"{row['rarest_class']:.2f}",
        "samples/s": _or_dash(row["samples_per_second"], ",.0f"),
    }


def table(rows: list[Row]) -> str:
    """A Markdown table whose columns are aligned in plain text too."""
    shown = [cells(row) for row in rows]
    lines = [list(shown[0]), *(list(line.values()) for line in shown)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |" for line in lines
    )


def write(config: Config, rows: list[Row], curves: list[WeightCurve], seconds: dict[str, float]) -> None:
    """report.md: the table, how to read it, the figures, times, settings; and report.json, the same numbers."""
    notes = NOTES.format(
        accuracy=rows[0]["agreement"],
        count=rows[0]["samples"],
        k=NEIGHBOURS,
        device=config.device,
        threads=config.threads,
    )
    settings = config.settings()
    parts = [
        "# Distillation of a digits teacher",
        table(rows),
        notes.rstrip(),
        "![samples and weights](overview.png)",
        "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()) + ".",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items()) + ".",
    ]
    write_text(config.out / "report.md", "\n\n".join(parts) + "\n")
    weights = {curve.name: curve.by_noise_level() for curve in curves}
    content = {"rows": rows, "weights_by_noise_level": weights, "settings": settings, "seconds": seconds}
    write_text(config.out / "report.json", to_json(content, indent=1) + "\n")


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
