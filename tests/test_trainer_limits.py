"""What the trainer refuses of somebody's data, before it takes memory for it."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import environment, need_extra

from fdistill_ops.trainer.__main__ import main, parse
from fdistill_ops.trainer.compare import Comparison
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import load
from fdistill_ops.trainer.limits import DataError, Limits
from fdistill_ops.trainer.own_data import read
from fdistill_ops.trainer.pictures import FORMATS

need_extra()

from PIL import EpsImagePlugin, Image  # noqa: E402

SUFFIX = {"JPEG": ".jpg"} | {kind: f".{kind.lower()}" for kind in FORMATS if kind != "JPEG"}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
EIGHT = np.random.default_rng(0).integers(0, 256, (8, 12, 10, 3), dtype=np.uint8)


def fill(folder: Path, kind: str = "PNG", mode: str = "RGB", pictures: np.ndarray = EIGHT) -> Path:
    folder.mkdir(exist_ok=True)
    for index, pixels in enumerate(pictures):
        Image.fromarray(pixels).convert(mode).save(folder / f"{index}{SUFFIX[kind]}", format=kind)
    return folder


def refusal(path: Path, size: int | None = None, **limits: int) -> str:
    with pytest.raises(DataError) as error:
        read(path, size, Limits(**limits))
    return str(error.value).removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------ files made by hand


def zeros(count: int) -> bytes:
    """As many million zeros, compressed by a thousand: each million on its own, so that it takes no time."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    million = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    return count * million + b"\x03\x00"


def stream(count: int) -> bytes:
    """The same as zlib has it; the sum at its end is wrong."""
    return b"\x78\x9c" + zeros(count) + bytes(4)


def png(width: int, height: int, content: bytes, bits: int = 8, more: bytes = b"") -> bytes:
    """In grey."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def gif(frames: int, end: bytes = b"\x3b", size: tuple[int, int] = (4, 4)) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\x02\x05\x84\x8f\xa9\xcb\x05\x00"
    return screen + frames * frame + end


def tiff(tile: int, content: bytes) -> bytes:
    """4 x 4 pixels, in a tile of ``tile`` each way."""
    start = 8 + 2 + 12 * 10 + 4
    tags = {256: 4, 257: 4, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: start, 325: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + content


def header(shape: tuple[int, ...], descr: str = "|u1", length: int | None = None) -> bytes:
    """Of an .npy file; in version 2.0 of the format where a length is declared."""
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    start = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) if length is None else b"\x93NUMPY\x02\0"
    return start + (text if length is None else struct.pack("<I", length))


def npz(packed: bytes, size: int, checksum: int = 0, name: bytes = b"images.npy") -> bytes:
    """A zip file of one member, which claims to have ``size`` bytes."""
    common = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, checksum, len(packed), size, len(name), 0)
    local = b"PK\x03\x04" + common + name + packed
    central = b"PK\x01\x02" + struct.pack("<H", 20) + common + bytes(14) + name
    return local + central + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)


def deflated(content: bytes, more: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush(zlib.Z_FULL_FLUSH) + more


# ------------------------------------------------------------------------------------------------------------- memory

SMALL, LARGE = header((10, 10, 10)), header((3200, 1000, 1000))
LIES = SMALL + bytes(1000)
PIXELS = "more than 33,554,432; --max-pixels raises the limit"
# Small files that unpack to gigabytes, and what is said of them.
BOMBS: dict[str, tuple[bytes, str]] = {
    "one bit.png": (png(13_000, 13_000, stream(22), bits=1), f"(13000 x 13000 = 169,000,000 pixels, {PIXELS})"),
    "line.png": (png(3 * 10**7, 1, stream(4), bits=1), f"(240000000 x 8 = 1,920,000,000 pixels when scaled, {PIXELS})"),
    "text.png": (png(4, 4, b"", more=chunk(b"zTXt", b"a\0\0" + stream(1000))), "1 of 1 images cannot be read"),
    "profile.png": (png(4, 4, b"", more=chunk(b"iCCP", b"a\0\0" + stream(1000))), "1 of 1 images cannot be read"),
    "frame.gif": (gif(1, size=(60_000, 60_000)), f"(60000 x 60000 = 3,600,000,000 pixels, {PIXELS})"),
    "tile.tiff": (tiff(40_000, stream(1600)), f"(40000 x 40000 = 1,600,000,000 pixels in a tile, {PIXELS})"),
    "frames.gif": (gif(300_000), "1 images; at least 8 are needed"),
    "declares.npy": (LARGE, "cannot be read: its header declares 3,200,000,000 bytes, and 0 follow"),
    "declares.npz": (
        npz(deflated(LARGE, zeros(3200)), len(LARGE) + 3_200_000_000),
        "images of 3200 x 1000 x 1000 take 12,208 MiB, more than 1,024; --max-mib raises the limit",
    ),
    "header.npz": (npz(deflated(header((), length=3 * 10**9), zeros(3000)), 3 * 10**9), "cannot be read: EOF"),
    "lies.npz": (npz(deflated(SMALL, zeros(3000)), len(LIES)), "cannot be read: Bad CRC-32 for file 'images.npy'"),
    "lies well.npz": (
        npz(deflated(SMALL, zeros(3000)), len(LIES), zlib.crc32(LIES)),
        "read",  # as much of it as is declared
    ),
}
READING = """
import json, resource, sys
from pathlib import Path
import torch
from PIL import Image
from fdistill_ops.trainer.own_data import read

def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # MiB

Image.init()
torch.set_num_threads(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, 2 * (pages * resource.getpagesize() + 2**28,))
results = {}
for path in map(Path, sys.argv[1:]):
    before = memory()
    try:
        read(path, 8)
        message = "read"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    results[path.name] = message, memory() - before
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """What is said of each, and how many MiB it took, in a process that has 256 MiB to take."""
    folder = tmp_path_factory.mktemp("bombs")
    paths = []
    for name, (content, _) in BOMBS.items():
        path = folder / name
        if path.suffix not in (".npy", ".npz"):  # a picture, in a folder of its own
            path.mkdir()
            (path / f"0{path.suffix}").write_bytes(content)
        else:
            path.write_bytes(content)
        paths.append(path)
    command = [sys.executable, "-c", READING, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="how much memory is taken is not told here")
@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_unpack_to_gigabytes(name: str, bombs: dict[str, tuple[str, float]]) -> None:
    message, taken = bombs[name]
    content, expected = BOMBS[name]
    assert len(content) < 10**7
    assert message == expected == "read" or (message.startswith("DataError: ") and expected in message)
    assert taken < 32, f"{taken} MiB"


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format(kind: str, tmp_path: Path) -> None:
    """Whatever the suffix; half a file is refused."""
    images = read(fill(tmp_path / "whole", kind)).images
    assert images.shape == (8, 3, 12, 10)
    if kind not in ("GIF", "JPEG", "WEBP"):  # which lose colours
        expected = torch.from_numpy(EIGHT.transpose(0, 3, 1, 2).copy()) / 127.5 - 1
        torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    for path in list((tmp_path / "whole").iterdir()):
        path.rename(path.with_suffix(".png"))
    assert torch.equal(read(tmp_path / "whole").images, images)
    path = tmp_path / "whole" / "3.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert refusal(tmp_path / "whole").startswith("1 of 8 images cannot be read: 3.png (")


@pytest.mark.parametrize("suffix", [".png", ".eps", ".ps", ".tiff"])
def test_no_program_decodes_a_picture(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, programs, called = fill(tmp_path / "folder"), tmp_path / "programs", tmp_path / "called"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\necho 10.0; touch {called}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    assert EpsImagePlugin.has_ghostscript() and called.exists(), "Pillow would find it"
    called.unlink()
    (folder / f"page{suffix}").write_bytes(EPS)
    for size in (None, 8):
        found = refusal(folder, size)
        assert found.startswith("1 of 9 images cannot be read: page") and not called.exists()
        assert ("its content is none of BMP, " in found) == (suffix in (".png", ".tiff"))
        assert ("files of this kind are not read" in found) == (suffix in (".eps", ".ps"))


@pytest.mark.parametrize(("kind", "suffix"), [("ICO", ".ico"), ("TGA", ".tga"), ("PCX", ".pcx"), ("SGI", ".sgi")])
def test_formats_that_are_not_read(kind: str, suffix: str, tmp_path: Path) -> None:
    """By their suffix and by their content; none of them is passed over in silence."""
    fill(tmp_path)
    Image.fromarray(EIGHT[0]).save(tmp_path / f"other{suffix}", format=kind)
    assert refusal(tmp_path) == f"1 of 9 images cannot be read: other{suffix} (files of this kind are not read)"
    (tmp_path / f"other{suffix}").rename(tmp_path / "other.png")
    assert refusal(tmp_path).endswith(f"other.png (its content is none of {', '.join(FORMATS)})")


def test_a_folder_of_other_formats_alone(tmp_path: Path) -> None:
    (tmp_path / "page.eps").write_bytes(EPS)
    assert refusal(tmp_path) == "1 of 1 images cannot be read: page.eps (files of this kind are not read)"


def test_of_a_film_the_first_picture_alone(tmp_path: Path) -> None:
    """What comes after it is not looked at."""
    fill(tmp_path, "GIF", pictures=EIGHT[:, :4, :4])
    frames = {"one": gif(1), "many": gif(1000), "damaged": gif(1, end=b"\x2c something else")}
    for name, content in frames.items():
        (tmp_path / f"{name}.gif").write_bytes(content)
    images = read(tmp_path).images
    assert len(images) == 11 and torch.equal(images[8], images[9]) and torch.equal(images[9], images[10])


def test_limit_of_pixels(tmp_path: Path) -> None:
    """Of a picture, of one that is scaled up."""
    fill(tmp_path)
    assert len(read(tmp_path, None, Limits(pixels=120)).images) == 8
    more = "more than 119; --max-pixels raises the limit"
    assert f"8 of 8 images cannot be read: 0.png (10 x 12 = 120 pixels, {more})" in refusal(tmp_path, pixels=119)
    assert "(20 x 24 = 480 pixels when scaled, more than 479; " in refusal(tmp_path, 20, pixels=479)
    assert len(read(tmp_path, 20, Limits(pixels=480)).images) == 8


def test_limit_of_memory(tmp_path: Path) -> None:
    """Of all pictures, counted when the first is known; grey ones count as colour where one is in colour."""
    fill(tmp_path)
    assert "images of 8 x 3 x 128 x 128 take 2 MiB, more than 1; --max-mib" in refusal(tmp_path, 128, mib=1)
    assert read(tmp_path, 128, Limits(mib=2)).images.shape == (8, 3, 128, 128)
    fill(tmp_path, mode="L")
    assert read(tmp_path, 128, Limits(mib=1)).images.shape == (8, 128, 128)
    Image.fromarray(EIGHT[0]).save(tmp_path / "9.png")
    assert "images of 9 x 3 x 128 x 128 take 2 MiB" in refusal(tmp_path, 128, mib=1)


def test_too_large_pictures_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(png(300, 200, b""))  # without any pixels
    assert refusal(tmp_path).startswith("images of 200 x 300 are too large for the networks here")
    Image.fromarray(EIGHT[0]).save(tmp_path / "9.png")
    assert refusal(tmp_path).startswith("images of different sizes: 200 x 300 (8), 12 x 10 (1)")


def test_limits_of_pillow_are_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It warns of and refuses sizes of its own."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(fill(tmp_path)).images) == 8
    assert Image.MAX_IMAGE_PIXELS == 10
    assert "--max-pixels" in refusal(tmp_path, pixels=5)
    assert Image.MAX_IMAGE_PIXELS == 10


# -------------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("dtype", ["u1", ">u2", "f2", "<f4", ">f8"])
@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed], ids=lambda save: save.__name__)
def test_every_way_to_save(dtype: str, order: Any, save: Any, tmp_path: Path) -> None:
    array = np.array(EIGHT / 255 if "f" in dtype else EIGHT, dtype=dtype, order=order)
    path = tmp_path / ("a.npy" if save is np.save else "a.npz")
    save(path, array)
    expected = 2 * torch.from_numpy(array.astype(np.float64)).permute(0, 3, 1, 2) - 1
    if "u" in dtype:
        expected = (expected + 1) / np.iinfo(dtype).max - 1
    torch.testing.assert_close(read(path).images.double(), expected, atol=1e-6, rtol=0)


def test_limits_of_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=np.concatenate([EIGHT] * 1000), labels=np.arange(8000) % 2)
    assert "images of 8000 x 12 x 10 x 3 take 11 MiB, more than 10; --max-mib" in refusal(path, mib=10)
    assert len(read(path, None, Limits(mib=11)).images) == 8000
    assert "images of 8000 x 3 x 32 x 32 take 94 MiB, more than 93; --max-mib" in refusal(path, 32, mib=93)
    np.savez(path, images=EIGHT.astype(np.float64) / 255, labels=np.full(8, "a" * 40_000))
    assert "labels of 8 take 2 MiB, more than 1; --max-mib" in refusal(path, mib=1)
    np.save(tmp_path / "a.npy", np.zeros((8, 1, 3000), dtype=np.uint8))
    assert refusal(tmp_path / "a.npy", 32, pixels=3_000_000) == (
        "images of 96000 x 32 = 3,072,000 pixels when scaled, more than 3,000,000; --max-pixels raises the limit"
    )
    np.save(tmp_path / "a.npy", np.zeros((8, 200, 100, 4), dtype=np.uint8))
    assert refusal(tmp_path / "a.npy").startswith("images of 3 x 200 x 100 are too large for the networks here")


def test_headers_and_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"

    def refused(content: bytes) -> str:
        path.write_bytes(content)
        return refusal(path)

    content = header((8, 12, 10)) + EIGHT[..., 0].tobytes()
    path.write_bytes(content)
    assert len(read(path).images) == 8
    assert refused(content + b"!") == "cannot be read: its header declares 960 bytes, and 961 follow"
    assert refused(content[:-1]) == "cannot be read: its header declares 960 bytes, and 959 follow"
    assert "declares no possible array" in refused(header((-8, -12, 10)) + bytes(960))
    assert "declares no possible array" in refused(header((8, 12, 10), "<U0"))
    assert "cannot be read" in refused(b"\x93NUMPY\x03\0" + content[8:])
    assert "it is no file of NumPy's" in refused(b"\x80\x04K\x01.")  # a pickle
    assert "cannot be read" in refused(b"\x93NUMPY\x01\0\xff\xff" + b"(" * 65535)
    np.save(path, np.zeros((8, 12, 10), dtype=[("a", "u1")]))
    assert refusal(path).startswith("images of dtype [('a', 'u1')]; it must be uint8")
    with pytest.warns(UserWarning, match=r"3\.0"):
        np.save(path, np.zeros((8, 12, 10), dtype=[("\u4e00", "u1")]))
    assert refusal(path) == "cannot be read: version 3.0 of the format, which is for arrays of records"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"])
def test_methods_that_unpack_without_bounds(method: int, tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, EIGHT)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("images.npy", file.getvalue())
    assert refusal(tmp_path / "a.npz").endswith("images.npy is compressed by a method that NumPy does not write")


def test_many_names_are_not_listed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{f"a{index}": np.zeros(1) for index in range(9)})
    assert refusal(tmp_path / "a.npz").startswith("none of its arrays (a0, a1, a2 and 6 more) is named images, ")


# ------------------------------------------------------------------------------------------------------------- command


def test_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "out", fill(tmp_path / "folder")
    assert main(["--data", str(folder), "--max-pixels", "119", "--out", str(out)]) == 1
    assert "10 x 12 = 120 pixels, more than 119; --max-pixels raises the limit" in capsys.readouterr().err
    arguments = ["--data", str(folder), "--max-pixels", "480", "--max-mib", "7", "--out", str(out)]
    config = parse(arguments)
    assert isinstance(config, Config) and (config.max_pixels, config.max_mib) == (480, 7)
    assert load(config).shape == (3, 12, 10)
    comparison = parse(["compare", *arguments])
    assert isinstance(comparison, Comparison) and comparison.runs[0].max_pixels == 480
    default = parse(["--data", str(folder), "--out", str(out)])
    assert isinstance(default, Config) and Limits(default.max_pixels, default.max_mib) == Limits()
