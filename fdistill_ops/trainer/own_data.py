"""Images of one's own: a folder of pictures, or a NumPy file. What cannot be used is refused in one line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .files import reason

IMAGE_KEYS = ("images", "image", "x", "data", "x_train", "train_images", "arr_0")
LABEL_KEYS = ("labels", "label", "y", "targets", "target", "y_train", "train_labels", "arr_1")
CHANNELS = (1, 3, 4)  # grey; red, green, blue; and alpha
LEAST = 8  # images of each class
LARGEST = 3 * 128 * 128  # numbers in an image: the networks are made of dense layers
SHOWN = 3  # of many names in a message


class DataError(ValueError):
    """What is wrong with somebody's data, as one line, whatever the names in it hold."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True)
class Images:
    """Images [N, H, W] or [N, 3, H, W] in [-1, 1], float32, and classes [N] from 0."""

    images: Tensor
    labels: Tensor
    classes: int


def read(path: Path, size: int | None = None) -> Images:
    """The images of a folder, a .npy or a .npz file, scaled and cropped to ``size`` x ``size`` if it is given."""
    if path.is_dir():
        images, labels = _folder(path, size)
    elif path.is_file() and path.suffix.lower() in (".npy", ".npz"):
        images, labels = _numpy(path, size)
    else:
        raise DataError(f"{path}: neither a folder of images nor a .npy or .npz file")
    if math.prod(images.shape[1:]) > LARGEST:
        raise DataError(
            f"{path}: images of {_dimensions(images.shape[1:])} are too large for the networks here, which take "
            f"{LARGEST:,} numbers; --image-size 32 scales them"
        )
    names, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    few = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < LEAST]
    if len(images) < LEAST or (few and len(names) == 1):
        raise DataError(f"{path}: {len(images)} images; at least {LEAST} are needed")
    if few:
        raise DataError(f"{path}: classes of fewer than {LEAST} images: {_some(few)}")
    if images.min() == images.max():
        raise DataError(f"{path}: every value of every image is the same")
    return Images(images.squeeze(1), torch.from_numpy(classes.reshape(-1)).long(), len(names))


def _fitted(image: Tensor, size: int) -> Tensor:
    """[C, H, W] to [C, size, size]: the shorter side is scaled, the middle of the longer one kept."""
    height, width = image.shape[1:]
    scale = size / min(height, width)
    scaled = interpolate(
        image[None], (round(height * scale), round(width * scale)), mode="bilinear", antialias=True, align_corners=False
    )[0]
    top, left = (scaled.shape[1] - size) // 2, (scaled.shape[2] - size) // 2
    return scaled[:, top : top + size, left : left + size]


def _on_white(image: Tensor) -> Tensor:
    """[..., 4, H, W] in [0, 1], the last channel alpha, blended onto white."""
    colour, alpha = image.split((3, 1), dim=-3)
    return colour * alpha + (1 - alpha)


# -------------------------------------------------------------------------------------------------------------- folder


def _folder(path: Path, size: int | None) -> tuple[Tensor, np.ndarray]:
    """[N, C, H, W], and for each image the sub-folder it is in."""
    files = _image_files(path)
    images: list[Tensor] = []
    sizes: Counter[tuple[int, ...]] = Counter()
    unreadable: list[str] = []
    for file in files:
        try:
            image = _picture(file)
        except Exception as error:  # whatever a damaged file makes a decoder raise
            unreadable.append(f"{file.relative_to(path)} ({reason(error)})")
            continue
        if size is not None:
            image = _fitted(image, size)
        sizes[tuple(image.shape[1:])] += 1
        if len(sizes) == 1:  # otherwise none of them is used
            images.append(image)
    if unreadable:
        raise DataError(f"{path}: {len(unreadable)} of {len(files)} images cannot be read: {_some(unreadable)}")
    if len(sizes) > 1:
        counts = [f"{_dimensions(one)} ({count})" for one, count in sizes.most_common()]
        raise DataError(f"{path}: images of different sizes: {_some(counts)}; --image-size N scales and crops them")
    channels = max(len(image) for image in images)  # grey ones among others in colour
    labels = np.array(["" if file.parent == path else file.relative_to(path).parts[0] for file in files])
    return 2 * torch.stack([image.expand(channels, -1, -1) for image in images]) - 1, labels


def _image_files(path: Path) -> list[Path]:
    """Every file with a suffix that Pillow reads, in order; none that is hidden or in a hidden folder."""
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    visible = sorted(_visible(path))
    files = [file for file in visible if file.suffix.lower() in suffixes and file.is_file()]
    folders = [file for file in visible if file.is_dir() and file.parent == path]
    if not files:
        raise DataError(f"{path}: no images in this folder")
    empty = [folder.name for folder in folders if not any(folder in file.parents for file in files)]
    if empty:
        raise DataError(f"{path}: sub-folders are classes, and there are no images in {_some(empty)}")
    beside = sum(file.parent == path for file in files)
    if folders and beside:
        raise DataError(f"{path}: sub-folders are classes, and {beside} image(s) lie beside them")
    return files


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


def _picture(file: Path) -> Tensor:
    """[1 or 3, H, W] in [0, 1]: turned as its EXIF data says; of a film the first picture."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode.startswith("I"):  # 16 bits; some of them Pillow gives in 32
            pixels = np.asarray(image)
            if pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError("pixels of 32 bits have no known range")
            return torch.from_numpy(pixels.astype(np.float32) / 65535)[None]
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            return _on_white(_channels_first(np.asarray(image.convert("RGBA"))))
        return _channels_first(np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB")))


def _channels_first(pixels: np.ndarray) -> Tensor:
    """[H, W] or [H, W, C] of bytes to [C, H, W] in [0, 1]."""
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).astype(np.float32) / 255)


# --------------------------------------------------------------------------------------------------------------- NumPy


def _numpy(path: Path, size: int | None) -> tuple[Tensor, np.ndarray]:
    """[N, C, H, W] and labels [N], all 0 where the file has none."""
    arrays = _arrays(path)
    images = _in_range(_numbers(arrays["images"], path), path)
    labels = arrays.get("labels", np.zeros(len(images), dtype=np.int64))
    if labels.shape not in ((len(images),), (len(images), 1)):
        raise DataError(f"{path}: {len(images)} images, but labels of shape {_dimensions(labels.shape)}")
    if labels.dtype.kind not in "biuSU":
        raise DataError(f"{path}: labels of dtype {labels.dtype}; they must be integers or strings")
    if size is not None:
        images = torch.stack([_fitted(image, size) for image in images])
    return images, labels.reshape(-1)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by what they are: images, and labels if it has them."""
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"images": loaded}
        with loaded:
            names = {name.lower(): name for name in loaded.files}
            found = {}
            for kind, keys in (("images", IMAGE_KEYS), ("labels", LABEL_KEYS)):
                name = next((names[key] for key in keys if key in names), None)
                if name is not None:
                    found[kind] = loaded[name]
    except Exception as error:  # whatever a damaged file makes NumPy and its decompressor raise
        raise DataError(f"{path}: cannot be read: {reason(error)}") from None
    if "images" not in found:
        raise DataError(f"{path}: none of its arrays ({', '.join(names.values())}) is named {', '.join(IMAGE_KEYS)}")
    return found


def _numbers(array: np.ndarray, path: Path) -> Tensor:
    """An array as [N, C, H, W], float32; integers divided by their largest value."""
    if array.ndim not in (3, 4):
        raise DataError(f"{path}: an array of shape {_dimensions(array.shape)}; it must be [N, H, W] or [N, C, H, W]")
    if 0 in array.shape:
        raise DataError(f"{path}: an array of shape {_dimensions(array.shape)} holds no images")
    if array.ndim == 3:
        array = array[:, None]
    elif (array.shape[1] in CHANNELS) == (array.shape[3] in CHANNELS):
        raise DataError(
            f"{path}: an array of shape {_dimensions(array.shape)}: either the second or the last dimension must be of "
            "1, 3 or 4 channels"
        )
    elif array.shape[3] in CHANNELS:
        array = array.transpose(0, 3, 1, 2)
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return torch.from_numpy(array.astype(np.float32) / np.iinfo(array.dtype).max)
    if array.dtype.kind != "f":
        raise DataError(f"{path}: images of dtype {array.dtype}; it must be uint8, uint16 or floating point")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    bad = int((~np.isfinite(array)).reshape(len(array), -1).any(1).sum())
    if bad:
        raise DataError(f"{path}: {bad} of {len(array)} images hold values that are not finite")
    return torch.from_numpy(array)


def _in_range(images: Tensor, path: Path) -> Tensor:
    """[0, 1] and [-1, 1] to [-1, 1], without alpha."""
    low, high = float(images.min()), float(images.max())
    if low < -1 or high > 1:
        raise DataError(f"{path}: values from {low:g} to {high:g}; floating-point images are in [0, 1] or in [-1, 1]")
    if low < 0:
        images = (images + 1) / 2
    return 2 * (_on_white(images) if images.shape[1] == 4 else images) - 1


# ------------------------------------------------------------------------------------------------------------ messages


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _dimensions(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "no dimensions"
