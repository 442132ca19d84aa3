"""The command line: ``python -m fdistill_ops.trainer``, or ``fdistill-train``."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import fdistill_ops as fd

from .._arguments import device_name, integer
from . import ranks
from .config import QUICK, Config
from .files import say
from .interruption import Interrupted, raised
from .run import run
from .training import TrainingError

PRECISIONS = ("float32", "bfloat16", "float16")
EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}  # module: distribution


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 for a run that failed; 2 for wrong arguments (raised by argparse); 130 after Ctrl-C, 143 after
    SIGTERM."""
    threads = torch.get_num_threads()
    rank = f"rank {os.environ['RANK']}: " if ranks.requested() > 1 else ""
    try:
        with raised():
            config = parse(argv)
            torch.set_num_threads(config.threads)
            with ranks.joined(config.device):
                run(config)
    except Interrupted as signal:
        say(f"\nfdistill-train: {rank}{signal.name}: every file is whole; the same command goes on from here")
        return signal.status
    except (TrainingError, OSError) as error:
        say(f"fdistill-train: {rank}error: {error}")
        return 1
    except RuntimeError as error:
        if not rank:
            raise
        say(f"fdistill-train: {rank}error, perhaps since another rank has ended: {error}")
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
    add("--student-steps", type=integer(1, 64), default=1, help="of the student's sampler (default: %(default)s)")
    add("--guidance", type=_scale, default=1.0, help="the teacher's guidance scale; 1 is none (default: %(default)s)")
    add("--width", type=integer(8, 2**16), help=f"hidden units of the networks (default: {default.width})")
    add("--depth", type=integer(1, 1024), help=f"blocks of the networks (default: {default.depth})")
    add("--precision", choices=PRECISIONS, default=default.precision, help="of the networks (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile of the distillation's losses")
    add("--cuda-graph", action="store_true", help="capture the student's update in a CUDA graph")
    every = default.checkpoint_every
    add(
        "--checkpoint-every",
        type=integer(1, 10**9),
        default=every,
        help="steps between checkpoints (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=integer(1, 2**16),
        default=default.batch_size,
        help="of all ranks together (default: %(default)s)",
    )
    add("--seed", type=integer(0, 2**32), default=default.seed, help="(default: %(default)s)")
    add("--threads", type=integer(1, 1024), default=default.threads, help="of the CPU (default: %(default)s)")
    add("--device", type=device_name, default=device, help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--quick", action="store_true", help="a run of a few seconds, to see that everything works")
    arguments = parser.parse_args(argv)
    arguments.device = ranks.own_device(arguments.device)
    if arguments.batch_size % ranks.requested():
        allowed = f"a multiple of the number of ranks, {ranks.requested()}"
        parser.error(f"argument --batch-size: must be {allowed}, got {arguments.batch_size}")
    if arguments.cuda_graph and not arguments.device.startswith("cuda"):
        parser.error(f"argument --cuda-graph: needs --device cuda, got {arguments.device}")
    if arguments.cuda_graph and ranks.requested() > 1:
        parser.error("argument --cuda-graph: only with one rank")
    if arguments.cuda_graph and arguments.precision == "float16":
        parser.error("argument --cuda-graph: not with --precision float16, whose GradScaler may leave out an update")

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


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0, got {text!r}")
    return value


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
