"""Runs a program of a code base, unchanged, on fdistill_ops:

python -m fdistill_ops.integrations fastgen train.py --config=...
torchrun --nproc-per-node 8 -m fdistill_ops.integrations dmd2 main/train_sd.py ...
python -m fdistill_ops.integrations fastgen -m pytest tests
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from . import causvid, dmd2, fastgen, self_forcing, sid

_MODULES = {module.__name__.rpartition(".")[2]: module for module in (causvid, dmd2, fastgen, self_forcing, sid)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fdistill_ops.integrations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("code_base", choices=_MODULES, help="what to patch")
    parser.add_argument("--loose", action="store_true", help="compare no more than the parameters (strict=False)")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="script or -m module, and its arguments")
    options = parser.parse_args(arguments)
    program = options.program
    if not program or program == ["-m"]:
        parser.error("the program to run is missing: a script, or -m and a module")
    is_module = program[0] == "-m"
    if not is_module:
        sys.path[0] = os.path.dirname(os.path.abspath(program[0]))
    print(_MODULES[options.code_base].patch(strict=not options.loose), file=sys.stderr)
    sys.argv = program[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
