"""A script that shows a finding, with PyTorch and fdistill_ops alone."""

from __future__ import annotations

import inspect
import re

from . import operands
from .compare import Problem
from .execute import Outcome
from .specs import Call, after_lines, arguments_text, call_lines, in_context, operand_lines

_DIFFERS = '''
def off(got, want, allowed):
    """Where got is not want within allowed (anything goes where that is not finite)."""
    while type(got).__name__ == "TwoTensor":
        got = got.a
    got = got.detach().double().reshape(-1)
    want, allowed = torch.tensor(want, dtype=torch.float64), torch.tensor(allowed, dtype=torch.float64)
    good = torch.where(want.isfinite(), (got - want).abs() <= allowed, ~got.isfinite()) | ~allowed.isfinite()
    return [(i, got[i].item(), want[i].item(), allowed[i].item()) for i in (~good).nonzero().flatten().tolist()]
'''


def title(call: Call, outcome: Outcome) -> str:
    problem = outcome.problems[0]
    return f"{call.space}.{call.target}: {problem.kind}: {problem.what}"


def script(call: Call, outcome: Outcome, command: str) -> str:
    """Its text. It exits with 1 where the fault shows, with 0 where it does not, and with a signal for a crash."""
    problem = outcome.problems[0]
    body = _body(call, problem, outcome)
    helpers = _helpers("\n".join(body))
    head = ['"""' + _one_line(title(call, outcome)), "", f"Found by: {command}", '"""', ""]
    text = "\n".join([*helpers, *body])
    imports = ["import sys"]
    imports += ["from decimal import Decimal"] if re.search(r"\bDecimal\(", text) else []
    imports += ["from fractions import Fraction"] if re.search(r"\bFraction\(", text) else []
    constants = [name for name in ("inf", "nan") if re.search(rf"(?<![\w.'\"]){name}\b", text)]
    imports += [f"from math import {', '.join(constants)}"] if constants else []
    imports += ["from typing import Any"] if "Any" in text else []
    imports += ["from collections.abc import Callable, Sequence"] if re.search(r"\b(Callable|Sequence)\[", text) else []
    imports += [""]
    imports += ["import numpy as np"] if "np." in text else []
    imports += ["import torch", "from torch import Tensor", "", "import fdistill_ops as fd"]
    return "\n".join([*head, *imports, *helpers, "", *body]).rstrip() + "\n"


def _one_line(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode().replace('"""', "'''").replace("\n", " ")[:600]


def _body(call: Call, problem: Problem, outcome: Outcome) -> list[str]:
    lines = [f"fd.set_backend({call.backend!r})"]
    if call.threads > 1:
        lines.append(f"torch.set_num_threads({call.threads})")
    if call.poison and problem.kind == "value":
        lines.append("import fdistill_ops.testing")
    lines += [f"{name} = {text}" for name, text in operand_lines(call, explicit=True)]
    run = in_context(call, call_lines(call))
    after = after_lines(call) if problem.kind in ("value", "backward", "changed") and call.after.kind else []
    if not after and problem.expression.startswith("loss") and "loss, stats" not in "\n".join(run):
        after = ["loss = result"]
    if problem.kind in ("crash", "hang"):
        return [*lines, *run, *after_lines(call), "print('no crash')"]
    if problem.kind in ("accepted", "type", "unnamed", "refused"):
        return [*lines, *_refusal(call, run, problem, outcome)]
    if problem.kind == "changed":
        return [*lines, *_changes(call, run, problem)]
    lines += [*run, *after]
    if problem.allowed is not None:
        expression = problem.expression.removesuffix(".item()")
        lines += [f"wrong = off({expression}, {problem.want}, {problem.allowed})", "for i, got, want, within in wrong:"]
        lines += ["    print(f'element {i}: got {got!r}, expected {want!r} within {within!r}')"]
        return [*lines, "sys.exit(bool(wrong))"]
    if problem.expression and problem.want is not None:
        lines += [f"got, want = {problem.expression}, {problem.want}", "print(f'got {got}, expected {want}')"]
        return [*lines, "sys.exit(got != want)"]
    shown = [name for name in ("refused", "again", "failed", "unused") if f"{name} =" in "\n".join(after)]
    lines += [f"print({name!r}, repr({name}))" for name in shown]
    return [*lines, f"print({problem.what!r})", "sys.exit(1)"]


def _refusal(call: Call, run: list[str], problem: Problem, outcome: Outcome) -> list[str]:
    """What is raised, beside what should be."""
    should = (
        "no error"
        if problem.kind == "refused"
        else "ValueError, TypeError or RuntimeError that names " + " or ".join(outcome.names)
    )
    lines = ["try:", *(f"    {line}" for line in run), "except Exception as error:"]
    lines += ["    print(f'raised {type(error).__name__}: {error}')"]
    lines.append(f"    print({'expected ' + should!r})")
    wrong = {"accepted": "False", "refused": "True"}.get(problem.kind, "True")
    if problem.kind == "type":
        wrong = "not isinstance(error, (ValueError, TypeError, RuntimeError))"
    if problem.kind == "unnamed":
        words = "|".join(re.escape(name) for name in outcome.names)
        lines.append("    import re")
        wrong = f're.search(r"(?<![\\w.])({words})(?!\\w)", str(error)) is None'
    lines.append(f"    sys.exit({wrong})")
    lines += ["else:", f"    print({'accepted; expected ' + should!r})"]
    lines.append(f"    sys.exit({problem.kind != 'refused'})")
    return lines


def _changes(call: Call, run: list[str], problem: Problem) -> list[str]:
    names = [name for name, spec in call.arguments.items() if type(spec).__name__ == "Tens"]
    lines = ["def same(a, b):", "    a, b = (getattr(v, 'a', v) for v in (a, b))  # of a wrapper, what it wraps"]
    lines += ["    return bool(((a == b) | ((a != a) & (b != b))).all())", "", ""]
    lines.append(f"before = {{{', '.join(f'{name!r}: {name}.clone()' for name in names)}}}")
    if "histogram" in call.arguments:
        lines.append("bins = histogram.bins.clone()")
    lines += ["raised = False", "try:", *(f"    {line}" for line in run), "except Exception as error:"]
    lines += ["    print(f'raised {type(error).__name__}: {error}')", "    raised = True"]
    lines.append("changed = [name for name in before if not same(globals()[name], before[name])]")
    lines += ["if not raised and 'out' in changed:", "    changed.remove('out')"]
    if "histogram" in call.arguments:
        lines += ["if raised and not same(bins, histogram.bins):", "    changed.append('histogram')"]
    lines += [f"print('then:', {problem.what!r})", "print('now changed:', changed)"]
    seen = problem.what.endswith(" has changed")  # what lies around the operands is not looked at here
    return [*lines, "sys.exit(bool(changed))" if seen else "sys.exit(1)"]


def _helpers(text: str) -> list[str]:
    """The source of what the text uses of operands, and of what that uses."""
    available = {
        name: value
        for name, value in vars(operands).items()
        if getattr(value, "__module__", "") == operands.__name__
        and (inspect.isfunction(value) or inspect.isclass(value))
    }
    needed: list[str] = []
    pending = [text]
    while pending:
        source = pending.pop()
        for name, value in available.items():
            used = rf"(?<![\w.]){name}\b" if inspect.isclass(value) else rf"(?<![\w.]){name}\("
            if name not in needed and re.search(used, source):
                needed.append(name)
                pending.append(inspect.getsource(value))
    lines: list[str] = []
    for name in available:
        if name in needed:
            lines += ["", "", *inspect.getsource(available[name]).rstrip().split("\n")]
    if "off(" in text and "wrong = off" in text:
        lines += ["", *_DIFFERS.rstrip().split("\n")]
    return [*lines, ""]


__all__ = ["arguments_text", "script", "title"]
