"""Writes docs/api.md: the public names with signatures, from the docstrings. Takes the path to write to, if another."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fdistill_ops as fd

HEAD = """# Public names

Written from the docstrings by `python docs/write_api.py`; a test compares the two. `import fdistill_ops as fd`.
"""
SECTIONS = {
    "Losses": (
        *("f_distill_loss", "distribution_matching_loss", "score_difference", "f_score_difference", "ScoreDifference"),
        *("score_identity_loss", "FDistillLoss", "LossStats", "gan_generator_loss", "gan_discriminator_loss"),
    ),
    "Weights": ("f_weights", "RatioHistogram"),
    "Divergences": ("Divergence", "DIVERGENCES", "get_divergence", "register_divergence"),
    "Predictions": ("to_x0",),
}
REST = "Back ends and the build"


def sections() -> dict[str, list[str]]:
    """The names of every section: those above, and what ``fd.__all__`` has besides."""
    named = {name for names in SECTIONS.values() for name in names}
    rest = [name for name in fd.__all__ if name not in named and not isinstance(getattr(fd, name), types.ModuleType)]
    return {**{title: list(names) for title, names in SECTIONS.items()}, REST: sorted(rest)}


def markdown(docstring: str) -> str:
    """A docstring's roles and code blocks as Markdown has them; its sections become lists."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", docstring)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    lines: list[str] = []
    indent = 0  # of the items of the section that the line stands in
    items = in_code = False
    for line in text.splitlines():
        stripped = line.strip()
        depth = len(line) - len(line.lstrip())
        if in_code and stripped and depth < 4:
            in_code = False
        if in_code:
            lines.append(line)
            continue
        if stripped.endswith("::"):
            in_code = True
            lines.append(line[:-1])
            continue
        if section := re.fullmatch(r"(Args|Returns|Raises|Attributes|Example|Examples):", stripped):
            indent, items = depth + 4, section[1] != "Returns"
            lines += [f"**{section[1]}**", ""]
        elif indent and depth >= indent and not items:
            lines.append(stripped)
        elif indent and depth == indent and stripped:
            item = re.match(r"([\w, *.]+?): (.*)", stripped)
            lines.append(f"- `{item[1]}`: {item[2]}" if item else f"- {stripped}")
        elif indent and depth > indent:
            lines.append(f"  {stripped}")
        else:
            indent = indent if not stripped or depth else 0
            lines.append(stripped)
    return "\n".join(lines)


def signature(name: str, value: Any) -> str:
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    plain = found.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    text = f"{name}{plain}"
    if len(text) <= 110:
        return text
    inner = str(plain)[1:-1]
    return f"{name}(\n    " + re.sub(r", (?=[\w*]+(?:=|,|$))", ",\n    ", inner) + ",\n)"


def members(value: type) -> list[str]:
    """The documented methods and properties of a class of ours."""
    found = []
    for name, member in vars(value).items():
        is_property = isinstance(member, property)
        own = member.__doc__ if is_property or inspect.isroutine(member) else None  # not an inherited one
        if own and not name.startswith("_"):
            found += [
                f"#### `{name if is_property else signature(name, member)}`",
                "",
                markdown(inspect.cleandoc(own)),
                "",
            ]
    return found


def page() -> str:
    lines = [HEAD]
    for title, names in sections().items():
        lines += [f"## {title}", ""]
        for name in names:
            value = getattr(fd, name)
            documented = inspect.isroutine(value) or isinstance(value, type)
            lines += [f"### {name}", ""]
            if documented:
                is_tuple = isinstance(value, type) and issubclass(value, tuple)
                lines += ["```", name if is_tuple else signature(name, value), "```", ""]
                lines += [markdown(inspect.getdoc(value) or ""), ""]
                if isinstance(value, type):
                    lines += members(value)
            elif isinstance(value, Mapping):
                lines += [f"What is registered, by name; read-only: {', '.join(f'`{key}`' for key in value)}.", ""]
            else:
                lines += [f"A {type(value).__name__}.", ""]
    for name in ("integrations", "reference", "testing"):
        lines += [f"## fd.{name}", "", markdown(inspect.getdoc(getattr(fd, name)) or ""), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("api.md")
    target.write_text(page(), encoding="utf-8")
