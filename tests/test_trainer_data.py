"""The trainer's data sets: what they hold, images of one's own, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_cases import need_extra

from fdistill_ops.trainer import own_data
from fdistill_ops.trainer.__main__ import main
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import NAMES, load
from fdistill_ops.trainer.evaluate import Judge, Sampler
from fdistill_ops.trainer.networks import Classifier
from fdistill_ops.trainer.own_data import DataError, read

need_extra()

from PIL import Image  # noqa: E402

COUNT = 12


def picture(index: int = 0, size: tuple[int, int] = (10, 12), mode: str = "RGB") -> Image.Image:
    """Noise, another for each index."""
    pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def fill(folder: Path, count: int = COUNT, first: int = 0, **kind: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        picture(index, **kind).save(folder / f"{index:03}.png")  # type: ignore[arg-type]
    return folder


def refusal(path: Path, size: int | None = None) -> str:
    with pytest.raises(DataError) as error:
        read(path, size)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------------ named data sets


@pytest.mark.parametrize("name", NAMES)
def test_named_data(name: str) -> None:
    data, again, other = (load(Config(data=name, seed=seed)) for seed in (3, 3, 4))
    assert data.name == name
    assert data.fingerprint == again.fingerprint != other.fingerprint
    for samples, labels in ((data.train, data.train_labels), (data.held_out, data.held_out_labels)):
        assert samples.dtype == torch.float32 and samples.is_contiguous() and len(samples) == len(labels)
        assert labels.unique().tolist() == list(range(data.classes))
        if data.mixture is None:
            assert -1 <= samples.min() < -0.9 and 0.9 < samples.max() <= 1
    assert 0.3 < data.sigma_data < 1


def test_no_pixel_of_a_patch_is_on_both_sides() -> None:
    data = load(Config(data="patches"))
    assert data.shape == (3, 32, 32) and len(data.train) == 2 * 3 * len(data.held_out)
    # Every patch is 16 tiles of 8 x 8 pixels on one lattice over the photograph, mirror images apart.
    blocks = [
        samples.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * 64)
        for samples in (data.train, data.held_out)
    ]
    textured = [block[block.std(1) > 0.05] for block in blocks]  # the sky is everywhere the same
    both, counts = torch.cat([block.unique(dim=0) for block in textured]).unique(dim=0, return_counts=True)
    assert len(both) > 1000 and counts.max() == 1


def test_patches_are_mirrored() -> None:
    data = load(Config(data="patches"))
    train = data.train.flatten(1)
    mirrored = data.train.flip(3).flatten(1)
    _, counts = torch.cat([train.unique(dim=0), mirrored.unique(dim=0)]).unique(dim=0, return_counts=True)
    assert (counts == 2).all()


# ----------------------------------------------------------------------------------------------------------- own images


def test_folder_without_classes(tmp_path: Path) -> None:
    (fill(tmp_path) / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image either")
    fill(tmp_path / ".thumbnails")
    images = read(tmp_path)
    assert images.images.shape == (COUNT, 3, 10, 12) and images.classes == 1
    expected = np.asarray(picture(5)).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(images.images[5].numpy(), expected, atol=1e-6)


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    fill(tmp_path / "b", 9, first=20)
    fill(tmp_path / "a" / "deeper", 10)
    images = read(tmp_path)
    assert images.labels.tolist() == [0] * 10 + [1] * 9 and images.classes == 2
    np.testing.assert_allclose(images.images[10, 0].numpy(), np.asarray(picture(20))[..., 0] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_pictures(mode: str, tmp_path: Path) -> None:
    fill(tmp_path)
    for file in tmp_path.iterdir():
        with Image.open(file) as image:
            image.convert("L" if mode == "PA" else "RGB").convert(mode).save(file.with_suffix(".tiff"))
        file.unlink()
    images = read(tmp_path).images
    assert images.shape == ((COUNT, 10, 12) if mode in ("1", "L") else (COUNT, 3, 10, 12))
    assert -1 <= images.min() < images.max() <= 1


def test_grey_among_colour(tmp_path: Path) -> None:
    fill(tmp_path)
    picture(50, mode="L").save(tmp_path / "grey.png")
    grey = read(tmp_path).images[-1]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_sixteen_bits_and_transparency(tmp_path: Path) -> None:
    deep = fill(tmp_path / "deep", 8, mode="L")
    for index in range(8):
        values = np.array([[0, 1000], [32768, 65535]], dtype=np.uint16)
        Image.fromarray(values).save(deep / f"{index:03}.png")
    expected = 2 * torch.tensor([[0, 1000], [32768, 65535]]) / 65535 - 1
    torch.testing.assert_close(read(deep).images[0], expected, atol=1e-6, rtol=0)

    clear = fill(tmp_path / "clear", 8)
    pixels = np.zeros((10, 12, 4), dtype=np.uint8)
    pixels[:, :6] = (255, 0, 0, 255)
    pixels[:, 6:] = (0, 0, 0, 51)
    Image.fromarray(pixels).save(clear / "000.png")
    image = read(clear).images[0]
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    torch.testing.assert_close(image[:, 0, 6], torch.full((3,), 2 * (1 - 51 / 255) - 1))


def test_image_size(tmp_path: Path) -> None:
    """The shorter side is scaled, and the middle kept."""
    fill(tmp_path)
    fill(tmp_path, 3, first=50, size=(20, 30))
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "000.png")
    images = read(tmp_path, 10).images
    assert images.shape == (COUNT + 3, 3, 10, 10)
    assert float(images[0, :, :, 1:-1].min()) == pytest.approx(1)  # the white third; its edges blend
    assert float(images[0].mean()) > 0.9
    assert images.min() >= -1 and images.max() <= 1


def test_turned_by_exif(tmp_path: Path) -> None:
    for index in range(8):
        image = picture(index)
        exif = image.getexif()
        exif[274] = 6
        image.save(tmp_path / f"{index}.png", exif=exif)
    images = read(tmp_path).images
    assert images.shape == (8, 3, 12, 10)
    np.testing.assert_allclose(
        images[0, 0].numpy(), np.rot90(np.asarray(picture(0))[..., 0], -1) / 127.5 - 1, atol=1e-6
    )


def test_unreadable_files_are_counted_and_named(tmp_path: Path) -> None:
    fill(tmp_path)
    for index in range(5):
        (tmp_path / f"bad{index}.png").write_bytes(b"" if index else (tmp_path / "000.png").read_bytes()[:100])
    message = refusal(tmp_path)
    assert message.startswith("5 of 17 images cannot be read: bad0.png (")
    assert "bad2.png" in message and "bad3.png" not in message and message.endswith(" and 2 more")


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "two\nlines.png").write_bytes(b"")
    assert "two lines.png" in refusal(tmp_path)


def test_wide_integers_are_refused(tmp_path: Path) -> None:
    """Pillow gives some 16-bit pictures in 32 bits, so that the values decide."""
    fill(tmp_path, size=(4, 4))
    Image.fromarray(np.full((4, 4), 65535, dtype=np.int32)).save(tmp_path / "white.tiff")
    assert read(tmp_path).images.max() == 1
    Image.fromarray(np.full((4, 4), 65536, dtype=np.int32)).save(tmp_path / "more.tiff")
    assert "white" not in refusal(tmp_path) and "more.tiff (pixels of 32 bits have no known range)" in refusal(tmp_path)


def test_links(tmp_path: Path) -> None:
    """Classes may be links; one to a folder above leads nowhere."""
    for name in "ab":
        (tmp_path / "all").mkdir(exist_ok=True)
        (tmp_path / "all" / name).symlink_to(fill(tmp_path / f"elsewhere-{name}"))
        (tmp_path / f"elsewhere-{name}" / "up").symlink_to(tmp_path / "all")
    found = read(tmp_path / "all")
    assert found.labels.tolist().count(0) == found.labels.tolist().count(1) == COUNT


def test_mixed_sizes_are_counted(tmp_path: Path) -> None:
    fill(tmp_path)
    fill(tmp_path, 3, first=50, size=(7, 8))
    message = refusal(tmp_path)
    assert message.startswith("images of different sizes: 10 x 12 (12), 7 x 8 (3)") and "--image-size" in message
    assert read(tmp_path, 8).images.shape == (15, 3, 8, 8)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(empty) == "no images in this folder"
    (empty / "notes.txt").write_text("")
    assert refusal(empty) == "no images in this folder"
    fill(empty / "a")
    (empty / "b").mkdir()
    assert "no images in b" in refusal(empty)
    fill(empty / "b", 3)
    assert refusal(empty) == "classes of fewer than 8 images: b (3)"
    fill(empty, 1)
    assert "1 image(s) lie beside them" in refusal(empty)
    assert refusal(fill(tmp_path / "few", 7)) == "7 images; at least 8 are needed"
    assert "are too large" in refusal(fill(tmp_path / "large", 8, size=(200, 200)))
    assert "neither a folder" in refusal(tmp_path / "large" / "000.png")
    assert "neither a folder" in refusal(tmp_path / "nothing.npy")


# ----------------------------------------------------------------------------------------------------------- own arrays


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12, 9, 7), (12, 9, 7)),
        ((12, 9, 7, 1), (12, 9, 7)),
        ((12, 1, 9, 7), (12, 9, 7)),
        ((12, 9, 7, 3), (12, 3, 9, 7)),
        ((12, 3, 9, 7), (12, 3, 9, 7)),
        ((12, 9, 7, 4), (12, 3, 9, 7)),
        ((12, 4, 9, 7), (12, 3, 9, 7)),
    ],
)
def test_layouts(shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(*shape))
    assert read(tmp_path / "a.npy").images.shape == expected
    assert read(tmp_path / "a.npy", 5).images.shape == (*expected[:-2], 5, 5)


def test_values_of_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    pixels = noise(12, 9, 7)
    expected = torch.from_numpy(pixels).float() / 127.5 - 1
    for array in (
        pixels,
        pixels.astype(np.uint16) * 257,
        pixels / 255,
        (pixels / 255).astype(np.float32),
        pixels / 127.5 - 1,
    ):
        np.save(path, array)
        torch.testing.assert_close(read(path).images, expected, atol=1e-6, rtol=0)
    np.save(path, (pixels / 255).astype(np.float16))
    torch.testing.assert_close(read(path).images, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("X", "y"), ("x_train", "y_train")])
@pytest.mark.parametrize("kind", ["integers", "column", "strings", "bools"])
def test_labels(images: str, labels: str, kind: str, tmp_path: Path) -> None:
    values = np.array([7, 3] * 10)
    given = {"integers": values, "column": values[:, None], "strings": values.astype(str), "bools": values == 7}
    np.savez(tmp_path / "a.npz", **{images: noise(20, 9, 7), labels: given[kind]})
    found = read(tmp_path / "a.npz")
    assert found.labels.tolist() == [1, 0] * 10 and found.classes == 2


def test_arrays_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"

    def refused(array: np.ndarray) -> str:
        np.save(path, array, allow_pickle=True)
        return refusal(path)

    assert "must be [N, H, W]" in refused(noise(12, 9))
    assert "1, 3 or 4 channels" in refused(noise(12, 9, 7, 5))
    assert "1, 3 or 4 channels" in refused(noise(12, 3, 7, 3))
    assert "holds no images" in refused(noise(0, 9, 7))
    assert "dtype int64" in refused(noise(12, 9, 7).astype(np.int64))
    assert "dtype complex128" in refused(noise(12, 9, 7).astype(complex))
    assert "cannot be read" in refused(np.array([{}] * 12, dtype=object))
    assert "values from 0 to 25" in refused(noise(12, 9, 7).astype(float))
    assert "the same" in refused(np.zeros((12, 9, 7)))
    assert "12 of 12 images" in refused(noise(12, 9, 7) * 1e300)
    bad = noise(12, 9, 7) / 255
    bad[3, 0, 0], bad[4, :, 0] = np.nan, np.inf
    assert refused(bad) == "2 of 12 images hold values that are not finite"
    assert refused(noise(3, 9, 7)) == "3 images; at least 8 are needed"
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read" in refusal(path)
    path.write_bytes(b"")
    assert "cannot be read" in refusal(path)


def test_archives_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def refused(**arrays: np.ndarray) -> str:
        np.savez(path, **arrays)
        return refusal(path)

    images = noise(20, 9, 7)
    assert "none of its arrays (pixels) is named images" in refused(pixels=images)
    assert "20 images, but labels of shape 19" in refused(images=images, labels=np.zeros(19, dtype=int))
    assert "labels of shape 20 x 2" in refused(images=images, labels=np.zeros((20, 2), dtype=int))
    assert "labels of dtype float64" in refused(images=images, labels=np.zeros(20))
    assert "cannot be read" in refused(images=images, labels=np.array([{}] * 20, dtype=object))
    assert "classes of fewer than 8 images: True (1)" in refused(images=images, labels=np.arange(20) == 3)
    assert refused(images=images, labels=np.arange(20)).endswith(" and 17 more")
    np.savez_compressed(path, images=images)
    damaged = bytearray(path.read_bytes())
    damaged[500:600] = bytes(100)
    path.write_bytes(damaged)
    assert "cannot be read" in refusal(path)
    path.write_bytes(b"PK\x03\x04 something else")
    assert "cannot be read" in refusal(path)


# ------------------------------------------------------------------------------------------------------------ the split


def test_own_data_is_split_by_class(tmp_path: Path) -> None:
    labels = np.array([0] * 40 + [1] * 8)
    np.savez(tmp_path / "mine.npz", images=noise(48, 4, 5), labels=labels)
    config = Config(data=str(tmp_path / "mine.npz"))
    data = load(config)
    assert (data.name, data.shape, data.classes) == ("mine", (4, 5), 2)
    assert data.train_labels.bincount().tolist() == [30, 6] and data.held_out_labels.bincount().tolist() == [10, 2]
    everything = torch.cat([data.train, data.held_out]).flatten(1)
    assert len(everything.unique(dim=0)) == 48
    assert load(dataclasses.replace(config, seed=1)).fingerprint != data.fingerprint
    np.savez(tmp_path / "mine.npz", images=noise(48, 4, 5), labels=labels[::-1])
    assert load(config).fingerprint != data.fingerprint


# -------------------------------------------------------------------------------------------------------------- command


def test_refused_data_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as status:
        main(["--data", "no_such", "--out", str(out)])
    assert status.value.code == 2
    assert "argument --data: must be one of digits, ring, grid, patches or a path" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["--data", str(tmp_path / "empty"), "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"fdistill-train: error: {tmp_path / 'empty'}: no images in this folder\n"
    assert not list(out.rglob("*.*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", "folder", "labels"])
def test_run_on_other_data(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.npz"
    if kind == "folder":
        fill(tmp_path / "data", 40)
        data = tmp_path / "data"
    elif kind == "labels":
        np.savez(data, images=noise(60, 6, 6, 3), labels=np.arange(60) % 3)
    arguments = ["--teacher-steps", "3", "--distill-steps", "3", "--batch-size", "8", "--device", "cpu", "--quick"]
    assert main(["--data", "ring" if kind == "ring" else str(data), "--out", str(tmp_path / "out"), *arguments]) == 0
    table = capsys.readouterr().out
    for column, kinds in {"class as asked": ["labels"], "modes": ["ring", "folder"], "JS divergence": ["ring"]}.items():
        assert (f"| {column} " in table) == (kind in kinds)
    for name in ("overview", "weights", "student_js"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


alike = np.repeat(noise(2, 5, 4), (1, 39), axis=0)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (noise(8, 5, 4), np.zeros(8, dtype=int)),
        (noise(20, 1, 1), np.zeros(20, dtype=int)),
        (alike, np.zeros(40, dtype=int)),
        (alike, np.arange(40) % 2),
    ],
    ids=["few", "one pixel", "alike", "alike in classes"],
)
def test_poor_images_are_judged(images: np.ndarray, labels: np.ndarray, tmp_path: Path) -> None:
    """Two held out; one feature; features without any variance."""
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    for seed in range(10):  # with several of them the image that differs is held out
        data = load(Config(data=str(tmp_path / "data.npz"), seed=seed))
        classifier = Classifier(data.shape, data.classes) if data.classes > 1 else None
        judge = Judge(data, classifier, seed)
        row = judge.row("", [data.held_out], data.held_out_labels)
        row |= judge.coverage(Sampler("", 1, lambda unit, _: unit), torch.Generator().manual_seed(0))
        assert all(math.isfinite(row[name]) for name in ("frechet", "precision", "recall", "modes_lost"))


def test_a_large_picture_is_not_the_only_reason(tmp_path: Path) -> None:
    """--image-size is what makes pictures of any size usable."""
    folder = fill(tmp_path / "large", 8, size=(200, 210))
    assert read(folder, 8).images.shape == (8, 3, 8, 8)
    assert own_data.LARGEST < 3 * 200 * 210
