"""python -m tests.fuzz: draws calls until the time or the number is used up, and writes a script for each finding."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument(
        "--backends", default="cpu,reference", help="cpu, reference, cuda-emulated, triton (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, help="for how long, all back ends together (default: 60)")
    parser.add_argument("--calls", type=int, help="how many calls for each back end, in place of the time")
    parser.add_argument("--first", type=int, default=0, help="number of the first call (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same calls (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/fuzz"), help="where the scripts go (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=float, default=20.0, help="seconds after which a call hangs (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where anything was found."""
    options = parse(arguments)
    names = [name for name in options.backends.replace(",", " ").split() if name]
    if "triton" in names:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    from .campaign import Campaign

    campaign = Campaign(names, options.seed, options.out, options.limit)
    campaign.run(options.seconds, options.calls, options.first)
    print(campaign.summary())
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())
