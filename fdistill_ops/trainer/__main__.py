"""The command line: ``python -m fdistill_ops.trainer``, or ``fdistill-train``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import fdistill_ops as fd

from .._arguments import device_name, integer
from .config import QUICK, Config
from .files import say
from .run import run
from .training import TrainingError

EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}  # module: distribution


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 for a run that failed; 2 for wrong arguments (raised by argparse); 130 for an interruption."""
    threads = torch.get_num_threads()
    try:
        config = parse(argv)
        torch.set_num_threads(config.threads)
        run(config)
    except KeyboardInterrupt:
        say("\nfdistill-train: interrupted; every file in the output folder is whole")
        return 130
    except (TrainingError, OSError) as error:
        say(f"fdistill-train: error: {error}")
        return 1
    finally:
        torch.set_num_threads(threads)
    return 0


def parse(argv: Sequence[str] | None) -> Config:
    """The configuration. Whatever is wrong ends the process with one line and status 2, before anything is trained."""
    default = Config()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="fdistill-train",
        description="Trains a small EDM teacher on scikit-learn's handwritten digits, distils it into one-step "
        "students with the f-distill loss, and writes a report: table, sample grids, weights over time.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=default.out, help="output folder (default: %(default)s)")
    add("--cache", type=Path, help="folder for what is trained before the distillation (default: OUT/cache)")
    names = ",".join(default.divergences)
    add("--divergences", type=_divergences, default=default.divergences, help=f"a student for each (default: {names})")
    add("--teacher-steps", type=integer(1, 10**9), help=f"(default: {default.teacher_steps})")
    add("--distill-steps", type=integer(1, 10**9), help=f"updates of each student (default: {default.distill_steps})")
    add("--batch-size", type=integer(1, 2**16), default=default.batch_size, help="(default: %(default)s)")
    add("--seed", type=integer(0, 2**32), default=default.seed, help="(default: %(default)s)")
    add("--threads", type=integer(1, 1024), default=default.threads, help="of the CPU (default: %(default)s)")
    add("--device", type=device_name, default=device, help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--quick", action="store_true", help="a run of a few seconds, to see that everything works")
    arguments = parser.parse_args(argv)

    missing = [name for module, name in EXTRA.items() if importlib.util.find_spec(module) is None]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}; pip install 'fdistill_ops[trainer]' brings what is missing")
    try:
        fd.f_weights(torch.zeros(1, device=arguments.device))
    except (RuntimeError, ValueError) as error:  # no back end for that device, or an override that does not fit
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    arguments.cache = arguments.cache or arguments.out / "cache"
    for option in ("out", "cache"):
        folder: Path = getattr(arguments, option)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"argument --{option}: cannot write to {folder}: {error.strerror}")
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return Config(**(QUICK if given.pop("quick") else {}) | given)


def _divergences(text: str) -> tuple[str, ...]:
    """Names, as they were spelled, of divergences that differ."""
    found: dict[str, str] = {}
    for name in (part.strip() for part in text.split(",")):
        try:
            divergence = repr(fd.get_divergence(name))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if divergence in found:
            raise argparse.ArgumentTypeError(f"{found[divergence]!r} and {name!r} are the same divergence")
        found[divergence] = name
    return tuple(found.values())


if __name__ == "__main__":
    sys.exit(main())
