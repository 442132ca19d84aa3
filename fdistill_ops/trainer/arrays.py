"""Arrays in .npy and .npz files: what they declare is checked before memory is taken for it."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np

from .files import reason
from .limits import DataError, some

KEYS = {
    "images": ("images", "image", "x", "data", "x_train", "train_images", "arr_0"),
    "labels": ("labels", "label", "y", "targets", "target", "y_train", "train_labels", "arr_1"),
}
HEADER = 2**16 + 12  # bytes; NumPy would read a header of any length before it looks at it
READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


Open = Callable[[], AbstractContextManager[IO[bytes]]]


@dataclass(frozen=True)
class Stored:
    """An array that is not read yet.

    Attributes:
        shape, dtype: what its header declares; as many bytes are there.
        open: opens it at its header.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    open: Open

    def read(self) -> np.ndarray:
        """The array; DataError where it is damaged."""
        with _refused(self.path), self.open() as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


@contextmanager
def stored(path: Path) -> Iterator[dict[str, Stored]]:
    """The arrays of a file by what they are: images, and labels if it has them.

    Raises:
        DataError: where the file is damaged, holds no images, or Python objects, which only an unpickler can read.
    """
    with _refused(path):
        file = path.open("rb")
    with file:
        with _refused(path):
            start = file.read(6)
            file.seek(0)
            if start == np.lib.format.MAGIC_PREFIX:
                found = {"images": _header(path, partial(_kept_open, file), os.fstat(file.fileno()).st_size)}
            elif start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
                found = _members(path, zipfile.ZipFile(file))
            else:
                raise ValueError("it is no file of NumPy's")
        yield found


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, Stored]:
    """Of an .npz file."""
    members = {part.filename.removesuffix(".npy").lower(): part for part in archive.infolist()}
    found = {}
    for kind, keys in KEYS.items():
        part = next((members[key] for key in keys if key in members), None)
        if part is None:
            continue
        # What NumPy writes. Of other methods zipfile may unpack much more at once than is asked for.
        if part.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{part.filename} is compressed by a method that NumPy does not write")
        found[kind] = _header(path, partial(archive.open, part), part.file_size)
    if "images" not in found:
        names = some(part.filename.removesuffix(".npy") for part in archive.infolist())
        raise DataError(f"{path}: none of its arrays ({names}) is named {', '.join(KEYS['images'])}")
    return found


def _header(path: Path, open_: Open, size: int) -> Stored:
    """What the header declares, which has to be what follows in ``size`` bytes."""
    with open_() as stream:
        head = io.BytesIO(stream.read(HEADER))
    version = np.lib.format.read_magic(head)
    if version not in READERS:
        raise ValueError(f"version {'.'.join(map(str, version))} of the format, which is for arrays of records")
    shape, _, dtype = READERS[version](head)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are not unpickled")
    if dtype.itemsize == 0 or any(length < 0 for length in shape):
        raise ValueError("its header declares no possible array")
    declared, held = math.prod(shape) * dtype.itemsize, size - head.tell()
    if declared != held:
        raise ValueError(f"its header declares {declared:,} bytes, and {held:,} follow")
    return Stored(path, shape, dtype, open_)


@contextmanager
def _kept_open(file: IO[bytes]) -> Iterator[IO[bytes]]:
    file.seek(0)
    yield file


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes NumPy and its decompressor raise
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None
