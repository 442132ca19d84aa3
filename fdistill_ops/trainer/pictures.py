"""Files of pictures, by Pillow: of a few formats alone, which it decodes itself, and of a limited size."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .limits import Limits

# Of the others some are given to programs to decode (EPS to ghostscript), whatever the suffix of the file.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
TILE = (0x0142, 0x0143)  # TIFF's tags of its width and height
TURNED = 0x0112  # EXIF's tag of the orientation; 1 is upright


def suffixes() -> tuple[set[str], set[str]]:
    """Of the files that are read, and of those that Pillow would read as something else."""
    from PIL import Image

    kinds = {suffix: kind for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    read = {suffix for suffix, kind in kinds.items() if kind in FORMATS}
    return read, kinds.keys() - read


@contextmanager
def opened(file: Path, limits: Limits) -> Iterator[Any]:
    """A picture of which the header is read, and the size is within the limits.

    Raises:
        ValueError: for another format, or too many pixels; and whatever a damaged file makes the decoder raise.
    """
    from PIL import Image, UnidentifiedImageError

    before = Image.MAX_IMAGE_PIXELS
    Image.init()
    formats = [kind for kind in FORMATS if kind in Image.OPEN]
    try:
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, by which it warns first
        with Image.open(file, formats=formats) as picture, warnings.catch_warnings():
            limits.check_pixels(*picture.size)
            limits.check_pixels(*_tile(picture), " in a tile")
            Image.MAX_IMAGE_PIXELS = limits.pixels  # for what is found only while the picture is decoded
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield picture
    except UnidentifiedImageError:
        raise ValueError(f"its content is none of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"more than {limits.pixels:,} pixels; --max-pixels raises the limit") from None
    finally:
        Image.MAX_IMAGE_PIXELS = before


def numbers(picture: Any) -> Tensor:
    """[1 or 3, H, W] in [0, 1]: turned as its EXIF data says; of a film the first picture."""
    from PIL import ImageOps

    image = picture
    if image.getexif().get(TURNED, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits; some of them Pillow gives in 32
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("pixels of 32 bits have no known range")
        return _channels_first(pixels, 65535)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return on_white(_channels_first(np.asarray(_converted(image, "RGBA")), 255))
    return _channels_first(np.asarray(_converted(image, "L" if image.mode in ("1", "L") else "RGB")), 255)


def on_white(image: Tensor) -> Tensor:
    """[..., 4, H, W] in [0, 1], the last channel alpha, blended onto white, in place."""
    colour, alpha = image.split((3, 1), dim=-3)
    return colour.mul_(alpha).add_(1 - alpha)


def _tile(picture: Any) -> tuple[int, int]:
    """Width and height of a TIFF file's tiles, each of which is decoded as a whole, however small the picture is."""
    if picture.format != "TIFF":
        return 0, 0
    width, height = (int(picture.tag_v2.get(tag, 0)) for tag in TILE)
    return width, height


def _converted(image: Any, mode: str) -> Any:
    return image if image.mode == mode else image.convert(mode)  # which copies


def _channels_first(pixels: np.ndarray, largest: int) -> Tensor:
    """[H, W] or [H, W, C] of integers to [C, H, W] in [0, 1]."""
    values = np.atleast_3d(pixels).transpose(2, 0, 1).astype(np.float32)
    values /= largest
    return torch.from_numpy(values)
