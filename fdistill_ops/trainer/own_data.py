"""Images of one's own: a folder of pictures, or a NumPy file. What cannot be used is refused in one line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from . import arrays, pictures
from .arrays import Stored
from .files import reason
from .limits import LARGEST, DataError, Limits, dimensions, some, too_large
from .progress import bar

CHANNELS = (1, 3, 4)  # grey; red, green, blue; and alpha
LEAST = 8  # images of each class


@dataclass(frozen=True)
class Images:
    """Images [N, H, W] or [N, 3, H, W] in [-1, 1], float32, and classes [N] from 0."""

    images: Tensor
    labels: Tensor
    classes: int


def read(path: Path, size: int | None = None, limits: Limits | None = None) -> Images:
    """The images of a folder, a .npy or a .npz file, scaled and cropped to ``size`` x ``size`` if it is given.

    Raises:
        DataError: for what cannot be used or exceeds the limits, before memory is taken for it.
    """
    limits = limits or Limits()
    if path.is_dir():
        images, labels = _folder(path, size, limits)
    elif path.is_file() and path.suffix.lower() in (".npy", ".npz"):
        images, labels = _numpy(path, size, limits)
    else:
        raise DataError(f"{path}: neither a folder of images nor a .npy or .npz file")
    if math.prod(images.shape[1:]) > LARGEST:
        raise too_large(path, images.shape[1:])
    names, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    few = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < LEAST]
    if len(images) < LEAST or (few and len(names) == 1):
        raise DataError(f"{path}: {len(images)} images; at least {LEAST} are needed")
    if few:
        raise DataError(f"{path}: classes of fewer than {LEAST} images: {some(few)}")
    if images.min() == images.max():
        raise DataError(f"{path}: every value of every image is the same")
    return Images(images.squeeze(1), torch.from_numpy(classes.reshape(-1)).long(), len(names))


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    """So that the shorter side is ``size``."""
    scale = size / min(height, width)
    return round(height * scale), round(width * scale)


def _check_scaled(height: int, width: int, size: int | None, limits: Limits) -> None:
    """A line of pixels becomes a large picture: ValueError for one that is too large."""
    if size is not None:
        height, width = _scaled(height, width, size)
        limits.check_pixels(width, height, " when scaled")


def _fitted(image: Tensor, size: int) -> Tensor:
    """[C, H, W] to [C, size, size]: the shorter side is scaled, the middle of the longer one kept."""
    height, width = image.shape[1:]
    shape = _scaled(height, width, size)
    scaled = interpolate(image[None], shape, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (scaled.shape[1] - size) // 2, (scaled.shape[2] - size) // 2
    return scaled[:, top : top + size, left : left + size]


# -------------------------------------------------------------------------------------------------------------- folder


def _folder(path: Path, size: int | None, limits: Limits) -> tuple[Tensor, np.ndarray]:
    """[N, C, H, W], and for each image the sub-folder it is in."""
    files, others = _image_files(path)
    images: list[Tensor] = []
    sizes: Counter[tuple[int, ...]] = Counter()
    unreadable = [f"{file.relative_to(path)} (files of this kind are not read)" for file in others]
    for file in bar("data", files):
        try:
            image = _picture(file, size, limits)
        except Exception as error:  # whatever a damaged file makes a decoder raise
            unreadable.append(f"{file.relative_to(path)} ({reason(error)})")
            continue
        if isinstance(image, tuple):
            sizes[image] += 1
            continue
        sizes[tuple(image.shape[1:])] += 1
        if len(sizes) == 1:  # otherwise none of them is used
            images.append(image)
            limits.check_memory(path, "images", (len(files), *image.shape))
    if unreadable:
        count = len(files) + len(others)
        raise DataError(f"{path}: {len(unreadable)} of {count} images cannot be read: {some(unreadable)}")
    if len(sizes) > 1:
        counts = [f"{dimensions(one)} ({count})" for one, count in sizes.most_common()]
        raise DataError(f"{path}: images of different sizes: {some(counts)}; --image-size N scales and crops them")
    if not images:
        raise too_large(path, *sizes)
    channels = max(len(image) for image in images)  # grey ones among others in colour
    labels = np.array(["" if file.parent == path else file.relative_to(path).parts[0] for file in files])
    return torch.stack([image.expand(channels, -1, -1) for image in images]).mul_(2).sub_(1), labels


def _picture(file: Path, size: int | None, limits: Limits) -> Tensor | tuple[int, int]:
    """[1 or 3, H, W] in [0, 1]; of one that is too large for the networks its height and width alone."""
    with pictures.opened(file, limits) as picture:
        width, height = picture.size
        if size is None and width * height > LARGEST:
            return height, width
        _check_scaled(height, width, size, limits)
        image = pictures.numbers(picture)
    return image if size is None else _fitted(image, size)


def _image_files(path: Path) -> tuple[list[Path], list[Path]]:
    """Every file with a suffix of the formats that are read, in order, and of others that are known; none that is
    hidden or in a hidden folder."""
    read, others = pictures.suffixes()
    visible = sorted(_visible(path))
    known = [file for file in visible if file.suffix.lower() in read | others and file.is_file()]
    files = [file for file in known if file.suffix.lower() in read]
    folders = [file for file in visible if file.is_dir() and file.parent == path]
    if not known:
        raise DataError(f"{path}: no images in this folder")
    empty = [folder.name for folder in folders if not any(folder in file.parents for file in known)]
    if empty:
        raise DataError(f"{path}: sub-folders are classes, and there are no images in {some(empty)}")
    beside = sum(file.parent == path for file in known)
    if folders and beside:
        raise DataError(f"{path}: sub-folders are classes, and {beside} image(s) lie beside them")
    return files, [file for file in known if file.suffix.lower() in others]


def _visible(path: Path) -> Iterator[Path]:
    """What is in a folder, at any depth and through links, but not twice on one way down."""
    pending = [(path, {path.resolve()})]
    while pending:
        folder, above = pending.pop()
        for file in folder.iterdir():
            if file.name.startswith("."):
                continue
            if not file.is_dir():
                yield file
            elif (target := file.resolve()) not in above:
                yield file
                pending.append((file, above | {target}))


# --------------------------------------------------------------------------------------------------------------- NumPy


def _numpy(path: Path, size: int | None, limits: Limits) -> tuple[Tensor, np.ndarray]:
    """[N, C, H, W] and labels [N], all 0 where the file has none."""
    with arrays.stored(path) as found:
        count = _check_images(found["images"], size, limits)
        if "labels" in found:
            _check_labels(found["labels"], count, limits)
        images = _in_range(_numbers(found["images"].read(), path), path)
        labels = found["labels"].read() if "labels" in found else np.zeros(count, dtype=np.int64)
    if size is not None:
        images = torch.stack([_fitted(image, size) for image in images])
    return images, labels.reshape(-1)


def _check_images(images: Stored, size: int | None, limits: Limits) -> int:
    """How many there are; DataError where what the header declares cannot be used."""
    path, shape, dtype = images.path, images.shape, images.dtype
    if len(shape) not in (3, 4):
        raise DataError(f"{path}: an array of shape {dimensions(shape)}; it must be [N, H, W] or [N, C, H, W]")
    if 0 in shape:
        raise DataError(f"{path}: an array of shape {dimensions(shape)} holds no images")
    if len(shape) == 4 and (shape[1] in CHANNELS) == (shape[3] in CHANNELS):
        raise DataError(
            f"{path}: an array of shape {dimensions(shape)}: either the second or the last dimension must be of "
            "1, 3 or 4 channels"
        )
    if dtype.kind != "f" and not (dtype.kind == "u" and dtype.itemsize <= 2):
        raise DataError(f"{path}: images of dtype {dtype}; it must be uint8, uint16 or floating point")
    limits.check_memory(path, "images", shape, max(dtype.itemsize, 4))
    height, width = shape[1:3] if _channels_last(shape) else shape[-2:]
    channels = min(3, math.prod(shape[1:]) // (height * width))  # without alpha
    if size is None:
        if channels * height * width > LARGEST:
            raise too_large(path, (channels, height, width))
        return shape[0]
    limits.check_memory(path, "images", (shape[0], channels, size, size))
    try:
        _check_scaled(height, width, size, limits)
    except ValueError as error:
        raise DataError(f"{path}: images of {error}") from None
    return shape[0]


def _check_labels(labels: Stored, count: int, limits: Limits) -> None:
    path, shape, dtype = labels.path, labels.shape, labels.dtype
    if shape not in ((count,), (count, 1)):
        raise DataError(f"{path}: {count} images, but labels of shape {dimensions(shape)}")
    if dtype.kind not in "biuSU":
        raise DataError(f"{path}: labels of dtype {dtype}; they must be integers or strings")
    limits.check_memory(path, "labels", shape, dtype.itemsize)


def _channels_last(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[3] in CHANNELS


def _numbers(array: np.ndarray, path: Path) -> Tensor:
    """An array as [N, C, H, W], float32; integers divided by their largest value."""
    if array.ndim == 3:
        array = array[:, None]
    elif _channels_last(array.shape):
        array = array.transpose(0, 3, 1, 2)
    if array.dtype.kind == "u":
        largest = np.iinfo(array.dtype).max
        array = array.astype(np.float32)
        array /= largest
        return torch.from_numpy(array)
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    bad = int((~np.isfinite(array)).reshape(len(array), -1).any(1).sum())
    if bad:
        raise DataError(f"{path}: {bad} of {len(array)} images hold values that are not finite")
    return torch.from_numpy(array)


def _in_range(images: Tensor, path: Path) -> Tensor:
    """[0, 1] and [-1, 1] to [-1, 1], in place, without alpha."""
    low, high = float(images.min()), float(images.max())
    if low < -1 or high > 1:
        raise DataError(f"{path}: values from {low:g} to {high:g}; floating-point images are in [0, 1] or in [-1, 1]")
    if low < 0:
        images.add_(1).div_(2)
    return (pictures.on_white(images) if images.shape[1] == 4 else images).mul_(2).sub_(1)
