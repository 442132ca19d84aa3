"""What is refused of somebody's data, before memory is taken for it: the limits, and the error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SHOWN = 3  # of many names in a message
LARGEST = 3 * 128 * 128  # numbers in an image: the networks are made of dense layers
MIB = 2**20


class DataError(ValueError):
    """What is wrong with somebody's data, as one line, whatever the names in it hold."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True)
class Limits:
    """How much is read of what a file says that it holds. A picture of 2^25 pixels takes up to about 1 GiB while it is
    decoded.

    Attributes:
        pixels: of a picture.
        mib: MiB of all images together, as numbers of 32 bits, or of as many as the file has.
    """

    pixels: int = 2**25
    mib: int = 1024

    def check_pixels(self, width: int, height: int, when: str = "") -> None:
        """ValueError where a picture has too many."""
        if width * height > self.pixels:
            found = f"{width} x {height} = {width * height:,} pixels{when}"
            raise ValueError(f"{found}, more than {self.pixels:,}; --max-pixels raises the limit")

    def check_memory(self, path: Path, what: str, shape: Sequence[int], itemsize: int = 4) -> None:
        """DataError where an array of a shape takes too much."""
        needed = math.prod(shape) * itemsize
        if needed > self.mib * MIB:
            raise DataError(
                f"{path}: {what} of {dimensions(shape)} take {-(-needed // MIB):,} MiB, more than {self.mib:,}; "
                "--max-mib raises the limit"
            )


def too_large(path: Path, shape: Iterable[int]) -> DataError:
    return DataError(
        f"{path}: images of {dimensions(shape)} are too large for the networks here, which take {LARGEST:,} numbers; "
        "--image-size 32 scales them"
    )


def some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def dimensions(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "no dimensions"
