"""What a person reads off a report: how far the judge can be trusted, where samples stray, how far a stage is."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_cases import TINY, need_extra

from fdistill_ops.trainer import comparison_report, evaluate, progress, report
from fdistill_ops.trainer.__main__ import main, parse
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import load
from fdistill_ops.trainer.mixtures import MIXTURES
from fdistill_ops.trainer.networks import Classifier
from fdistill_ops.trainer.run import SETTINGS

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

need_extra()

# ----------------------------------------------------------------------------------------------------------- the judge


def test_bound_of_a_poor_judge() -> None:
    """A quarter of the errors of guessing the most frequent class."""
    assert evaluate.accuracy_bound(torch.arange(10).repeat(5)) == pytest.approx(0.775)
    assert evaluate.accuracy_bound(torch.tensor([0, 0, 0, 1])) == pytest.approx(1 - 0.25 * 0.25)


@pytest.mark.slow
def test_poor_judge_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr and in the report; the table says it beside every figure that comes of the classifier."""
    assert main([*TINY, "--classifier-steps", "1", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "warning: the classifier that judges is poor: right on " in captured.err
    text, content = (tmp_path / "report.md").read_text(), json.loads((tmp_path / "report.json").read_text())
    assert "**Warning: the classifier that judges is poor" in text and len(content["warnings"]) == 1
    for line in captured.out.splitlines()[2:]:
        assert line.count("(weak)") == 6, line
    assert all(row["weak"] and row["judge_accuracy"] < row["judge_bound"] for row in content["rows"])


def test_good_judge_is_not() -> None:
    row = {"name": "a", "evaluations": 1, "frechet": 1.0, "frechet_std": None, "precision": 1.0, "recall": 1.0}
    row |= {"samples_per_second": None, "weak": False}
    assert "weak" not in report.table([row]) and "weak" in report.table([row | {"weak": True}])
    assert evaluate.poor_judge([row], "images") == ""


def test_comparison_warns_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = [*TINY, "--divergences", "js,rkl", "--classifier-steps", "1"]
    assert main(["compare", *tiny, "--data", "digits", "--seeds", "1", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert "warning: digits, seed 0: the classifier that judges is poor" in captured.err
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "Warning: the classifier that judges is poor" in text
    rows = [line for line in captured.out.splitlines() if line.startswith("| js ")]
    assert rows[0].count("(weak)") == len(comparison_report.JUDGED)


def test_memory_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks get parts of them, matrices of distances are cut into rows; the results are those of one piece."""
    data = load(Config())
    judge = evaluate.Judge(data, Classifier(data.shape, data.classes), 0)
    whole = judge.row("", [data.held_out], data.held_out_labels)
    monkeypatch.setattr(evaluate, "BATCH", 640)
    monkeypatch.setattr(evaluate, "ROWS", 5000)
    sizes: list[int] = []
    sampler = evaluate.Sampler("", 1, lambda noise, labels: (sizes.append(len(noise)), noise)[1])
    assert torch.equal(sampler(data.held_out, data.held_out_labels), data.held_out) and set(sizes) <= {10, 9}
    parts = judge.row("", [data.held_out], data.held_out_labels)
    assert parts.pop("name") == whole.pop("name")
    numbers = [name for name, value in whole.items() if isinstance(value, float)]
    assert [parts[name] for name in numbers] == pytest.approx([whole[name] for name in numbers], rel=1e-3)
    assert parts["class_counts"] == whole["class_counts"] and parts.keys() == whole.keys()


# ------------------------------------------------------------------------------------------------------------- bridges


@pytest.mark.parametrize("name", ["ring", "grid"])
def test_exact_strays(name: str) -> None:
    """Against samples of the mixture; on the ring against the law of Rayleigh, whose modes do not touch."""
    mixture, count = MIXTURES[name](), 400_000
    found = mixture.strays(mixture.sample(count, torch.Generator().manual_seed(0)))
    for key, exact in mixture.exact_strays.items():
        assert found[key] == pytest.approx(exact, abs=5 * math.sqrt(exact / count) + 1e-6)
    if name == "ring":
        assert mixture.exact_strays["far"] == pytest.approx(math.exp(-8), rel=0.05)


def test_bridges_are_seen() -> None:
    """A tenth of the samples on the lines between neighbours: one of them in eight is near a middle."""
    mixture, gen = MIXTURES["ring"](), torch.Generator().manual_seed(0)
    good = mixture.sample(9000, gen)
    ends, part = mixture.means.roll(-1, 0), torch.rand(1000, 1, generator=gen, dtype=torch.float64)
    start = torch.randint(8, (1000,), generator=gen)
    bridges = mixture.means[start] + part * (ends - mixture.means)[start]
    found = mixture.strays(torch.cat([good, bridges.float()]))
    length = float((ends - mixture.means)[0].norm()) / mixture.std
    assert found["far"] == pytest.approx(0.1 * (1 - 8 / length) + 0.9 * math.exp(-8), abs=0.01)
    assert found["between"] == pytest.approx(0.1 * 2 / length, abs=0.005)


@pytest.mark.slow
def test_strays_are_in_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--data", "ring", "--out", str(tmp_path)]) == 0
    assert main(["compare", *TINY, "--data", "ring", "--seeds", "1", "--out", str(tmp_path / "compared")]) == 0
    titles = ("far from modes (exact 0.03%)", "between modes (exact 0.00%)")
    for folder in (tmp_path, tmp_path / "compared"):
        assert all(title in (folder / "report.md").read_text() for title in titles)
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert all(0 <= row[name] <= 1 for row in rows for name in ("far", "between"))


# ---------------------------------------------------------------------------------------------------- data: both sides


@pytest.mark.slow
def test_nothing_held_out(tmp_path: Path) -> None:
    """It is said what is measured on training data then."""
    assert main([*TINY, "--hold-out", "0", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "Nothing is held out (--hold-out 0)" in text and "| training images " in text and "held-out" not in text
    data = load(Config(hold_out=0.0))
    assert len(data.train) == 1797 and torch.equal(data.train, data.held_out) and not data.holds_out


def test_share_held_out(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (48, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(48) >= 40)
    config = Config(data=str(tmp_path / "own.npz"), hold_out=0.5)
    assert load(config).held_out_labels.bincount().tolist() == [20, 4]
    few = load(dataclasses.replace(config, hold_out=0.05))
    assert few.held_out_labels.bincount().tolist() == [2, 2]
    assert len(load(Config(hold_out=0.5)).train) == round(1797 / 2)


def test_flips(tmp_path: Path) -> None:
    plain, flipped = load(Config()), load(Config(flip=True))
    count = len(plain.train)
    assert torch.equal(flipped.train[count:], plain.train.flip(-1)) and torch.equal(flipped.train[:count], plain.train)
    assert torch.equal(flipped.train_labels, plain.train_labels.repeat(2))
    assert torch.equal(flipped.held_out, plain.held_out) and flipped.fingerprint != plain.fingerprint


# ------------------------------------------------------------------------------------------------------------- options

FLAGS = {"teacher_lr": 0.5, "student_lr": 0.5, "fake_lr": 0.5, "discriminator_lr": 0.5, "ema": 0.5, "gan_weight": 0.5}
FLAGS |= {"fake_updates": 3, "distill_sigma_min": 0.5, "distill_sigma_max": 7.0}


@pytest.mark.parametrize("name", FLAGS)
def test_option_reaches_the_key(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    option = f"--{name.replace('_', '-')}"
    config = parse([option, str(FLAGS[name]), "--device", "cpu", "--out", str(tmp_path)])
    assert isinstance(config, Config) and getattr(config, name) == FLAGS[name] != getattr(Config, name)
    used = ("ema", *SETTINGS["teacher"], *SETTINGS["student"])  # as Stages.checkpoints has it
    assert config.key(*used) != dataclasses.replace(config, **{name: getattr(Config, name)}).key(*used)
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(default: {getattr(Config, name)}" in shown.split(f"{option} {name.upper()} ")[1][:130]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher-lr", "0"], "argument --teacher-lr: must be a number above 0, got '0'"),
        (["--ema", "1.5"], "argument --ema: must be a number from 0 to 1, got '1.5'"),
        (["--gan-weight", "-1"], "argument --gan-weight: must be a number from 0, got '-1'"),
        (["--fake-updates", "0"], "argument --fake-updates: must be an integer from 1"),
        (
            ["--distill-sigma-min", "30"],
            "argument --distill-sigma-min: must be less than --distill-sigma-max, 20, got 30",
        ),
        (["--hold-out", "0.01"], "argument --hold-out: must be 0 or a number from 0.05 to 0.9, got 0.01"),
        (["--hold-out", "0.95"], "argument --hold-out: must be a number from 0 to 0.9, got '0.95'"),
        (["--data", "ring", "--flip"], "argument --flip: only for images, and ring is points"),
        (["--data", "ring", "--hold-out", "0.5"], "argument --hold-out: only for images, and ring is points"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["--device", "cpu", "--out", str(tmp_path / "out"), *arguments])
    assert status.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bar is drawn into a file; the last line says that it is done, and each how long it will take."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    assert list(progress.bar("sampling", range(3))) == [0, 1, 2]
    text = sys.stderr.getvalue()
    lines = text.splitlines()
    assert "\r" not in text and lines[-1].startswith("sampling: 100%") and "3/3" in lines[-1]
    assert any("1/3" in line and "<" in line for line in lines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress.bar("sampling", range(3))) == [0, 1, 2]
    assert "\rsampling: 100%" in sys.stderr.getvalue()


def test_every_stage_shows_its_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *TINY, "--data", "digits", "--seeds", "1", "--out", str(tmp_path)]) == 0
    shown = {line.split(":")[0] for line in capsys.readouterr().err.splitlines() if "%|" in line}
    assert shown >= {"classifier", "teacher", "js", "gradients", "evaluation", "sampling", "comparison"}
