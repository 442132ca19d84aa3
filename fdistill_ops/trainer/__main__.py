"""The command line: ``python -m fdistill_ops.trainer``, or ``fdistill-train``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fdistill_ops as fd

from .._arguments import device_name, integer, number
from . import data, models, ranks
from .compare import Comparison, compare
from .config import Config, defaults, shown
from .files import reason, say
from .interruption import Interrupted, raised
from .limits import DataError
from .lock import held
from .mixtures import MIXTURES
from .networks import MissingPackage
from .run import run
from .training import TrainingError

PRECISIONS = ("float32", "bfloat16", "float16")
COMPARED = ("js", "forward_kl", "reverse_kl", "jeffreys")
EXTRA = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}  # module: distribution

FINISHED = {"sample": models.sample, "export": models.export}  # what is done with a finished run


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0; 1 for a run that failed; 2 for wrong arguments (raised by argparse); 130 after Ctrl-C, 143 after
    SIGTERM."""
    threads = torch.get_num_threads()
    rank = f"rank {os.environ['RANK']}: " if ranks.requested() > 1 else ""
    try:
        with raised():
            arguments = list(sys.argv[1:] if argv is None else argv)
            if arguments[:1] and arguments[0] in FINISHED:
                FINISHED[arguments[0]](arguments[1:])()
                return 0
            wanted = parse(argv)
            if isinstance(wanted, Comparison):
                torch.set_num_threads(wanted.runs[0].threads)
                with held(wanted.out):
                    compare(wanted)
            else:
                torch.set_num_threads(wanted.threads)
                with ranks.joined(wanted.device), held(wanted.out):
                    run(wanted)
    except Interrupted as signal:
        say(f"\nfdistill-train: {rank}{signal.name}: every file is whole; the same command goes on from here")
        return signal.status
    except (TrainingError, DataError, MissingPackage, OSError) as error:
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


def parse(argv: Sequence[str] | None) -> Config | Comparison:
    """What to do. Whatever is wrong ends the process with one line and status 2, before anything is trained."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["compare"]:
        return _comparison(argv[1:])
    parser = argparse.ArgumentParser(
        prog="fdistill-train",
        description="Trains a small EDM teacher, distils it into one-step students with the f-distill loss, and writes "
        "a report: table, sample grids, weights over time.",
        epilog="fdistill-train compare --help: the comparison of divergences over data sets and seeds; sample --help "
        "and export --help: samples and weights of a finished run.",
    )
    what = f"{', '.join(data.NAMES)}, a folder of images, or a .npy or .npz file (default: %(default)s)"
    parser.add_argument("--data", type=_data, default=Config.data, help=what)
    parser.add_argument("--out", type=Path, help="output folder (default: runs/NAME, after the data)")
    _add_options(parser, Config.divergences)
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or Path("runs") / data.name_of(arguments.data)
    _check(parser, arguments, [arguments.data])
    return _config(arguments)


def _comparison(argv: Sequence[str]) -> Comparison:
    parser = argparse.ArgumentParser(
        prog="fdistill-train compare",
        description="Trains a teacher for every data set and seed, distils each by every divergence, and writes a "
        "report: modes covered, distances, variances, with standard errors and tests over the seeds.",
    )
    what = f"comma-separated: {', '.join(data.NAMES)}, or paths (default: all by name)"
    parser.add_argument("--data", type=_data_sets, default=data.NAMES, help=what)
    parser.add_argument("--seeds", type=integer(1, 1000), help="their number (default: 3; with --quick 1)")
    parser.add_argument("--jobs", type=integer(1, 1024), default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="output folder (default: %(default)s)")
    _add_options(parser, COMPARED)
    arguments = parser.parse_args(argv)
    if ranks.requested() > 1:
        parser.error("compare runs without torchrun; --jobs is how many processes it starts")
    _check(parser, arguments, arguments.data)
    names, seeds, jobs = arguments.data, arguments.seeds or (1 if arguments.quick else 3), arguments.jobs
    del arguments.seeds, arguments.jobs
    runs = []
    for seed in range(arguments.seed, arguments.seed + seeds):
        for name in names:
            runs.append(_config(argparse.Namespace(**vars(arguments) | {"data": name, "seed": seed})))
    return Comparison(tuple(runs), jobs, arguments.out)


def _add_options(parser: argparse.ArgumentParser, divergences: tuple[str, ...]) -> None:
    """Those of a run and of a comparison."""
    default = Config()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--image-size", type=integer(4, 128), help="scales and crops images from a path to N x N pixels")
    most = "of {}; what has more is refused before it is read (default: %(default)s)"
    add("--max-pixels", type=integer(1, 2**40), default=default.max_pixels, help=most.format("a picture from a path"))
    add("--max-mib", type=integer(1, 2**30), default=default.max_mib, help=most.format("all images from a path in MiB"))
    add("--cache", type=Path, help="folder for what is trained (default: OUT/cache)")
    names = ",".join(divergences)
    add("--divergences", type=_divergences, default=divergences, help=f"a student for each (default: {names})")
    tuned: dict[str, tuple[Callable[[str], Any], str]] = {
        "classifier_steps": (integer(1, 10**9), "of what judges images with classes "),
        "teacher_steps": (integer(1, 10**9), ""),
        "distill_steps": (integer(1, 10**9), "updates of each student "),
        "width": (integer(8, 2**16), "hidden units of an MLP; a quarter of it are the channels of a U-Net "),
        "depth": (integer(1, 1024), "blocks of an MLP; a quarter of it are the layers of a U-Net at each size "),
        "batch_size": (integer(1, 2**16), "of all ranks together "),
        "teacher_lr": (number(0, above=True), "learning rate of the teacher "),
        "student_lr": (number(0, above=True), "of the student "),
        "fake_lr": (number(0, above=True), "of the fake score "),
        "discriminator_lr": (number(0, above=True), ""),
        "ema": (number(0, 1), "rate of the moving averages of parameters; 0 is none "),
        "gan_weight": (number(0), "of the GAN loss in the student's loss "),
        "fake_updates": (integer(1, 1000), "updates of fake score and discriminator per update of the student "),
        "distill_sigma_min": (number(0, above=True), "least noise level at which student and teacher are compared "),
        "distill_sigma_max": (number(0, above=True), "largest one "),
    }
    for name, (kind, text) in tuned.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=f"{text}(default: {shown(name)})")
    add("--student-steps", type=integer(1, 64), default=1, help="of the student's sampler (default: %(default)s)")
    add("--guidance", type=number(0), default=1.0, help="of the teacher; 1 is none (default: %(default)s)")
    held_out = "share of the images that is only compared with, 0 or from 0.05 (default: %(default)s)"
    add("--hold-out", type=number(0, 0.9), default=default.hold_out, help=held_out)
    add("--flip", action="store_true", help="trains on the mirror images of images too")
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
    add("--seed", type=integer(0, 2**32), default=default.seed, help="(default: %(default)s)")
    add("--threads", type=integer(1, 1024), default=default.threads, help="of the CPU (default: %(default)s)")
    add("--device", type=device_name, default=device, help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--quick", action="store_true", help="few steps, to see that everything works")


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """What a parser cannot see in one argument alone; makes the folders."""
    if 0 < arguments.hold_out < 0.05:
        parser.error(f"argument --hold-out: must be 0 or a number from 0.05 to 0.9, got {arguments.hold_out:g}")
    for name in names:
        settings = defaults(name, arguments.quick)
        if name in MIXTURES and (arguments.flip or arguments.hold_out != Config.hold_out):
            option = "flip" if arguments.flip else "hold-out"
            parser.error(f"argument --{option}: only for images, and {name} is points, drawn anew to be compared with")
        noise = [
            getattr(arguments, key) or settings.get(key, getattr(Config, key))
            for key in ("distill_sigma_min", "distill_sigma_max")
        ]
        if noise[0] >= noise[1]:
            allowed = f"less than --distill-sigma-max, {noise[1]:g}"
            parser.error(f"argument --distill-sigma-min: must be {allowed}, got {noise[0]:g}")
        batch_size = arguments.batch_size or settings.get("batch_size", Config.batch_size)
        if batch_size % ranks.requested():
            allowed = f"a multiple of the number of ranks, {ranks.requested()}"
            parser.error(f"argument --batch-size: must be {allowed}, got {batch_size}")
        if batch_size < arguments.student_steps:
            steps = arguments.student_steps
            parser.error(f"argument --batch-size: must be at least --student-steps, {steps}, got {batch_size}")
    arguments.device = ranks.own_device(arguments.device)
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
        parser.error(f"argument --device: {reason(error)}")
    arguments.cache = arguments.cache or arguments.out / "cache"
    for option in ("out", "cache"):
        folder: Path = getattr(arguments, option)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"argument --{option}: cannot write to {folder}: {error.strerror}")


def _config(arguments: argparse.Namespace) -> Config:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    return Config(**defaults(arguments.data, given.pop("quick")) | given)


def _data(text: str) -> str:
    """A name, or a path where something is."""
    if text not in data.NAMES and not (text and Path(text).exists()):
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(data.NAMES)} or a path; {text!r} is not there")
    return text


def _data_sets(text: str) -> tuple[str, ...]:
    """Names and paths, each once."""
    names = tuple(_data(part.strip()) for part in text.split(","))
    called = [data.name_of(name) for name in names]
    twice = sorted({name for name in called if called.count(name) > 1})
    if twice:
        raise argparse.ArgumentTypeError(f"two data sets are called {twice[0]!r}")
    return names


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
