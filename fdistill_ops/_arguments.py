"""Types of command-line arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch


def integer(low: int, high: int) -> Callable[[str], int]:
    """An argument's type: an integer from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer from {low} to {high}, got {text!r}")
        return value

    return parse


def number(low: float = -math.inf, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """An argument's type: a finite number, from low (``above``: from more than low) to high."""
    what = "finite number" if math.isinf(low) else f"number {'above' if above else 'from'} {low:g}"
    what += "" if math.isinf(high) else f" to {high:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (above and value == low):
            raise argparse.ArgumentTypeError(f"must be a {what}, got {text!r}")
        return value

    return parse


def device_name(text: str) -> str:
    """An argument's type: a device that is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"{text!r} is not there: PyTorch sees {count} CUDA device(s)")
    return text
