"""Runs a program of a code base, unchanged, on fdistill_ops:

python -m fdistill_ops.integrations fastgen train.py --config=...
torchrun --nproc-per-node 8 -m fdistill_ops.integrations dmd2 main/train_sd.py ...
python -m fdistill_ops.integrations fastgen -m pytest tests
python -m fdistill_ops.integrations fastgen --check

What is refused ends in one sentence and status 1, a wrong command line in status 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from . import causvid, dmd2, fastgen, fastvideo, self_forcing, sid
from ._patching import Patch, Refused

_CODE_BASES = (causvid, dmd2, fastgen, fastvideo, self_forcing, sid)
_MODULES = {module.__name__.rpartition(".")[2]: module for module in _CODE_BASES}
_NAME = "python -m fdistill_ops.integrations"


def main(arguments: Sequence[str] | None = None) -> None:
    ours, program = _split(sys.argv[1:] if arguments is None else list(arguments))
    parser = argparse.ArgumentParser(
        prog=_NAME,
        usage=f"{_NAME} [-h] [--loose] [--check] code_base [-m] program ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The program, a script or -m and a module, and its arguments come last.",
    )
    parser.add_argument("code_base", choices=_MODULES, help="what to patch")
    parser.add_argument("--loose", action="store_true", help="compare no more than the parameters (strict=False)")
    parser.add_argument("--check", action="store_true", help="say what would be patched, and run nothing")
    options = parser.parse_args(ours)
    is_module = program[:1] == ["-m"]
    if program == ["-m"] or not (program or options.check):
        parser.error("the program to run is missing: a script, or -m and a module")
    if program and not is_module:
        if not os.path.exists(program[0]):
            parser.error(f"there is no {program[0]}")
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = os.path.dirname(os.path.abspath(program[0]))
    module = _MODULES[options.code_base]
    try:
        if options.check:
            sys.exit(_check(module._PATCH, not options.loose))
        patched = module.patch(strict=not options.loose)
    except Refused as error:
        _stop(str(error))
    except ImportError as error:
        _stop(f"{error}{_where(error)}")
    print(patched, file=sys.stderr)
    sys.argv = program[is_module:]
    if is_module:
        if not _exists(sys.argv[0]):
            module.unpatch()
            _stop(f"there is no module {sys.argv[0]}")
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments, and the program with its: what follows the code base and the options after it."""
    seen = False
    for index, argument in enumerate(arguments):
        if argument == "--" and seen:
            return arguments[:index], arguments[index + 1 :]
        if argument.startswith("-m") and seen:
            attached = [argument[2:]] if argument[2:] else []
            return arguments[:index], ["-m", *attached, *arguments[index + 1 :]]
        if not argument.startswith("-"):
            if seen:
                return arguments[:index], arguments[index:]
            seen = True
    return arguments, []


def _check(patch: Patch, strict: bool) -> int:
    """Prints what is found of every function. Returns the exit status."""
    findings = patch.check(strict)
    print(patch.project)
    for finding in findings:
        known = f"known from {finding.versions}" if finding.versions else "has the parameters that are expected"
        verdict = known + (", would be replaced" if finding.replaced else "")
        if finding.left_out:
            verdict = f"left out: {finding.left_out}"
        if finding.refusal:
            verdict = f"refused: {finding.refusal}"
        print(f"  {finding.function}: {verdict}")
    refused = any(finding.refusal for finding in findings)
    print("would be refused: nothing would be patched" if refused else "would be patched")
    return int(refused)


def _where(error: ImportError) -> str:
    """Where an import inside a code base failed."""
    frames: Any = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    last = frames[-1]
    inside = os.path.dirname(last.filename) != os.path.dirname(os.path.abspath(__file__))
    return f" (imported in {last.filename}, line {last.lineno})" if inside else ""


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _stop(message: str) -> NoReturn:
    print(f"{_NAME}: error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
