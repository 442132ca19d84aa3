"""The trainer: EDM against closed forms, and tiny runs from end to end."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from trainer_cases import need_extra

import fdistill_ops as fd
from fdistill_ops.trainer import edm, networks
from fdistill_ops.trainer.__main__ import main
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import load
from fdistill_ops.trainer.distill import Distillation, generate

TINY = ["--quick", "--teacher-steps", "6", "--distill-steps", "7", "--batch-size", "16", "--device", "cpu"]
TIMES = ("seconds", "samples_per_second")

pytestmark = pytest.mark.usefixtures("one_thread")

need_extra()


@pytest.fixture(scope="module")
def gen() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# ----------------------------------------------------------------------------------------------------------------- EDM


def test_preconditioning_normalises_input_and_target(gen: torch.Generator) -> None:
    sigma_data = 0.7
    for sigma in (0.01, 0.5, 3.0, 50.0):
        c = edm.preconditioning(torch.tensor([sigma], dtype=torch.float64), sigma_data)
        x0 = sigma_data * torch.randn(200_000, generator=gen, dtype=torch.float64)
        x = x0 + sigma * torch.randn(200_000, generator=gen, dtype=torch.float64)
        # The standard deviation of a variance estimate of n normal numbers is sqrt(2/n) = 0.003.
        assert float((c.input * x).var()) == pytest.approx(1, abs=0.016)
        assert float(((x0 - c.skip * x) / c.output).var()) == pytest.approx(1, abs=0.016)
        assert float(edm.loss_weight(torch.tensor(sigma), sigma_data) * c.output**2) == pytest.approx(1, rel=1e-5)
        assert float(c.noise) == pytest.approx(math.log(sigma) / 4)


def test_initial_denoiser_is_ideal_for_gaussian_data(gen: torch.Generator) -> None:
    """For x0 ~ N(0, s^2), E[x0 | x] = s^2 / (s^2 + sigma^2) x, and the denoising loss is 1 at every noise level."""
    denoiser = networks.Denoiser((2, 3), classes=4, width=8, depth=2, sigma_data=0.5)
    sigma = torch.rand(5000, generator=gen) * 3 + 0.1
    x0 = 0.5 * torch.randn(5000, 2, 3, generator=gen)
    x = edm.add_noise(x0, sigma, gen)
    labels = torch.randint(4, (5000,), generator=gen)
    with torch.no_grad():
        prediction = denoiser(x, sigma, labels)
    torch.testing.assert_close(prediction, (0.25 / (0.25 + sigma**2))[:, None, None] * x)
    # 30,000 squares of unit variance: standard deviation sqrt(2/30000) = 0.008.
    assert float(edm.denoising_loss(prediction, x0, sigma, 0.5)) == pytest.approx(1, abs=0.04)


def test_heun_samples_a_gaussian(gen: torch.Generator) -> None:
    """With the ideal denoiser of N(m, s^2), from sigma = T: the solution of the ODE is
    x(0) = m + s (x(T) - m) / sqrt(s^2 + T^2)."""
    m, s, high = 0.4, 0.6, 20.0
    noise = torch.randn(4000, 2, generator=gen, dtype=torch.float64)

    def ideal(x: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        square = edm.rows(sigma**2, x)
        return (s**2 * x + square * m) / (s**2 + square)

    exact = m + s * (high * noise - m) / math.hypot(s, high)
    labels = torch.zeros(len(noise), dtype=torch.long)
    samples = [edm.heun(ideal, noise, labels, steps, 1e-3, high) for steps in (18, 35, 69)]
    errors = [float((x - exact).square().mean().sqrt()) for x in samples]
    assert errors[0] < 0.03
    # Second order: half the step, a quarter of the error.
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([4, 4], rel=0.2)
    # 8,000 numbers: a mean is known to s / sqrt(8000) = 0.007, a standard deviation to 0.005; and T is not infinite.
    assert float(samples[2].mean()) == pytest.approx(m, abs=0.03)
    assert float(samples[2].std()) == pytest.approx(s, abs=0.02)


def test_schedule_ends() -> None:
    levels = edm.karras_sigma(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), 0.02, 20.0)
    assert levels.tolist() == pytest.approx([20.0, ((20 ** (1 / 7) + 0.02 ** (1 / 7)) / 2) ** 7, 0.02])


# -------------------------------------------------------------------------------------------------------- distillation


def test_logits_are_higher_on_data() -> None:
    config = Config(width=32, depth=1, batch_size=64, distill_steps=150)
    data = load(Config())
    teacher = networks.Denoiser((8, 8), data.classes, config.width, config.depth, data.sigma_data)
    distillation = Distillation(teacher, config, data, "js")
    for _ in range(40):
        distillation.update_critics(100)
    labels, sigma = data.held_out_labels, torch.full((len(data.held_out),), 0.3)
    with torch.no_grad():
        noise = edm.normal((len(labels), 1, 8, 8), distillation.gen)
        generated = generate(distillation.student, noise, labels, distillation.levels)
        logits = [
            distillation.head(
                teacher.with_features(edm.add_noise(x, sigma, distillation.gen), sigma, labels)[1], 0 * labels
            )
            for x in (data.held_out, generated)
        ]
    assert logits[0].mean() > 0 > logits[1].mean()


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first")
    assert main([*TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture
def teacher_cache(first: Path, tmp_path: Path) -> Path:
    """The classifier and the teacher of the first run, without its students."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in (first / "cache").iterdir():
        if not path.name.startswith("student"):
            shutil.copy(path, folder)
    return folder


def numbers(out: Path) -> tuple[str, str]:
    """The log, and the report without what is a time."""

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in TIMES}
        return [strip(item) for item in value] if isinstance(value, list) else value

    report = json.loads((out / "report.json").read_text())
    return (out / "log.jsonl").read_text(), json.dumps(strip(report))


def test_run_writes_everything(first: Path) -> None:
    images = ["overview", "weights", "held-out_images", "teacher_18_Heun_steps", "student_js", "student_reverse_kl"]
    for name in images:
        assert (first / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((first / "report.json").read_text())
    names = ["held-out images", "teacher, 18 Heun steps", "teacher, 1 step", "student, js", "student, reverse_kl"]
    assert [row["name"] for row in report["rows"]] == names
    for row in report["rows"]:
        for field in ("frechet", "precision", "recall", "agreement", "classes", "rarest_class"):
            assert math.isfinite(row[field])
        assert sum(row["class_counts"]) == row["samples"]
        assert (row["samples_per_second"] is None) == (row["name"] == "held-out images")
    assert [row["evaluations"] for row in report["rows"]] == [None, 35, 1, 1, 1]
    text = (first / "report.md").read_text()
    assert all(f"| {name} " in text for name in names)
    assert not [path.name for path in first.iterdir() if path.name.startswith(".")]


def test_log_has_the_loss_statistics(first: Path) -> None:
    records = [json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(record["stage"] for record in records)) == ["classifier", "teacher", "js", "reverse_kl"]
    js = [record for record in records if record["stage"] == "js"]
    assert [record["step"] for record in js] == [5, 7]
    assert js[-1]["weight_min"] < js[-1]["weight_mean"] < js[-1]["weight_max"]
    reverse_kl = [record for record in records if record["stage"] == "reverse_kl"][-1]
    assert reverse_kl["weight_min"] == pytest.approx(1, abs=1e-5)
    assert reverse_kl["effective_sample_size"] == pytest.approx(16, rel=1e-5)


def test_same_seed_same_result(first: Path, tmp_path: Path) -> None:
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    assert numbers(tmp_path) == numbers(first)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "count"), [("first", 3), ("teacher_cache", 2)])
def test_cached_same_result(
    source: str,
    count: int,
    first: Path,
    teacher_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = {"first": first / "cache", "teacher_cache": teacher_cache}[source]
    assert main([*TINY, "--out", str(tmp_path), "--cache", str(cache), "--divergences", "js"]) == 0
    output = capsys.readouterr()
    assert output.err.count(": from ") == count
    assert output.out.startswith("| samples from ")
    log = (first / "log.jsonl").read_text().splitlines(keepends=True)
    assert (tmp_path / "log.jsonl").read_text() == "".join(line for line in log if "reverse_kl" not in line)


@pytest.mark.slow
def test_back_end_names_the_students(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = shutil.copytree(first / "cache", tmp_path / "cache")
    arguments = [*TINY, "--out", str(tmp_path), "--cache", str(cache), "--divergences", "js"]
    with fd.use_backend("reference"):
        assert main(arguments) == 0
    other = "cpu" if "cpu" in fd.available_backends() else "reference"
    taken = {line.split(":")[0] for line in capsys.readouterr().err.splitlines() if ": from " in line}
    assert taken == {"classifier", "teacher"} | ({"js"} if other == "reference" else set())
    assert main(arguments) == 0
    assert len(list(cache.glob("student-js-*"))) == (2 if other == "cpu" else 1)


def test_seed_and_settings_name_the_cache() -> None:
    changes = ({}, {"seed": 1}, {"teacher_steps": 1}, {"threads": 7})
    keys = {Config(**changed).key("teacher_steps") for changed in changes}
    assert len(keys) == 4
    assert Config(distill_steps=1).key("teacher_steps") in keys


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, which names the file; nothing half written."""

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main([*TINY, "--out", str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fdistill-train: error: [Errno 28] No space left on device: ") and "/classifier-" in last
    assert list((tmp_path / "cache").iterdir()) == []


def test_loss_that_is_not_finite(
    teacher_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    critics = Distillation.update_critics

    def spoil(self: Distillation, step: int) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            next(self.student.parameters()).fill_(torch.nan)
        return critics(self, step)

    monkeypatch.setattr(Distillation, "update_critics", spoil)
    assert main([*TINY, "--out", str(tmp_path), "--cache", str(teacher_cache)]) == 1
    assert "js: the loss is nan at step 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--divergences", "foo"], "'foo' is unknown"),
        (["--divergences", "foo"], "jensen_shannon"),
        (["--divergences", "js,jensen_shannon"], "same divergence"),
        (["--teacher-steps", "0"], "--teacher-steps: must be an integer from 1"),
        (["--distill-steps", "-3"], "--distill-steps: must be an integer from 1"),
        (["--batch-size", "1.5"], "--batch-size: must be an integer from 1"),
        (["--batch-size", "1000000000"], "--batch-size: must be an integer from 1"),
        (["--threads", "0"], "--threads: must be an integer from 1"),
        (["--seed", "-1"], "--seed: must be an integer from 0"),
        (["--device", "abacus"], "must be cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "is not there"),
        (["--student-steps", "0"], "--student-steps: must be an integer from 1"),
        (["--guidance", "-1"], "--guidance: must be a number from 0, got '-1'"),
        (["--guidance", "nan"], "--guidance: must be a number from 0, got 'nan'"),
        (["--precision", "float8"], "--precision: invalid choice: 'float8'"),
        (["--checkpoint-every", "0"], "--checkpoint-every: must be an integer from 1"),
        (["--width", "0"], "--width: must be an integer from 8"),
        (["--cuda-graph", "--device", "cpu"], "--cuda-graph: needs --device cuda, got cpu"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["--out", str(tmp_path / "out"), *arguments])
    assert status.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--out", "--cache"])
def test_folder_that_cannot_be_written(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as status:
        main(["--out", str(tmp_path / "out"), option, str(tmp_path / "file" / "folder")])
    assert status.value.code == 2
    assert f"argument {option}: cannot write to" in capsys.readouterr().err.splitlines()[-1]


def test_device_without_back_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(logits: torch.Tensor) -> None:
        raise RuntimeError(f"no back end serves {logits.device.type} tensors\nand so on")

    monkeypatch.setattr(fd, "f_weights", refuse)
    with pytest.raises(SystemExit) as status:
        main(["--out", str(tmp_path), "--device", "cpu"])
    assert status.value.code == 2
    assert "argument --device: no back end serves cpu tensors" in capsys.readouterr().err.splitlines()[-1]


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit) as status:
        main(["--out", str(tmp_path)])
    assert status.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "scikit-learn" in error and "pip install 'fdistill_ops[trainer]'" in error
