"""The comparison of divergences: its statistics on made-up numbers, its report, and tiny comparisons end to end."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_cases import need_extra

import fdistill_ops as fd
from fdistill_ops.trainer import comparison_report, findings
from fdistill_ops.trainer.__main__ import main, parse
from fdistill_ops.trainer.compare import Comparison, gradient_variances
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import load
from fdistill_ops.trainer.distill import Distillation
from fdistill_ops.trainer.networks import Denoiser

pytestmark = pytest.mark.usefixtures("one_thread")

need_extra()


# ----------------------------------------------------------------------------------------------------------- statistics


def results(**metrics: dict[str, list[float | None]]) -> list[findings.Result]:
    """Of made-up runs: metric, divergence, and a number for each seed."""
    runs: dict[tuple[str, int], findings.Result] = {}
    for metric, columns in metrics.items():
        for divergence, values in columns.items():
            for seed, value in enumerate(values):
                start = {"data": "ring", "seed": seed, "divergence": divergence}
                runs.setdefault((divergence, seed), start)[metric] = value
    return list(runs.values())


def lost(**columns: list[float | None]) -> list[findings.Finding]:
    return findings.findings(results(modes_lost=columns))


def test_t_test_of_pairs() -> None:
    """Differences 1, 2, 3: t = 2 sqrt(3), and with two degrees of freedom P(T > t) = (1 - t / sqrt(t^2 + 2)) / 2."""
    t = 2 * math.sqrt(3)
    p = (1 - t / math.sqrt(t**2 + 2)) / 2
    test = findings.paired_test([11, 5, 8], [10, 3, 5])
    assert isinstance(test, findings.OneSided)
    assert test.higher == pytest.approx(p) and test.lower == pytest.approx(1 - p)


def test_holm() -> None:
    assert findings.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert findings.holm([0.9, 0.8]) == [1.0, 1.0]
    assert findings.holm([]) == []


def test_claim_that_is_reproduced() -> None:
    (found,) = lost(forward_kl=[1, 0, 1, 0, 1], reverse_kl=[3, 3, 4, 2, 4])
    assert found.verdict == "reproduced" and found.p is not None and found.p < 0.01
    assert re.fullmatch(
        r"ring: forward_kl loses fewer modes than reverse KL: reproduced \(p = \S+, 0.6 against 3.2, 5 seeds\).",
        found.sentence,
    )


def test_claim_that_is_contradicted() -> None:
    (found,) = lost(forward_kl=[3, 3, 4, 2, 4], reverse_kl=[1, 0, 1, 0, 1])
    assert found.verdict == "contradicted" and found.p is not None and found.p < 0.01
    assert "contradicted (p = " in found.sentence and "3.2 against 0.6" in found.sentence


def test_claim_that_stays_open() -> None:
    (found,) = lost(forward_kl=[3, 1, 2, 2], reverse_kl=[1, 3, 2, 3])
    assert found.verdict == "not significant"
    assert re.search(r"not significant with 4 seeds \(2 against 2.25, difference -0.25, p = 0.\d+\)", found.sentence)


def test_many_divergences_are_corrected_for() -> None:
    """p = 0.037 alone is significant, and is not among four."""
    pair = {"reverse_kl": [4.0, 5.0, 6.0], "forward_kl": [3.0, 3.0, 3.0]}
    assert [one.verdict for one in lost(**pair)] == ["reproduced"]
    more = {name: [5.0, 4.0, 6.5] for name in ("js", "jeffreys", "squared_hellinger")}
    assert [one.verdict for one in lost(**pair, **more)] == ["not significant"] * 4


def test_only_less_mode_seeking_divergences_are_tested() -> None:
    names = {name: findings.less_mode_seeking(name) for name in fd.DIVERGENCES}
    assert [name for name, less in names.items() if not less] == ["reverse_kl", "softened_reverse_kl", "neyman_chi2"]
    assert findings.less_mode_seeking("alpha:0.3") and not findings.less_mode_seeking("alpha:-0.3")
    columns = {name: [1.0, 2.0, 4.0] for name in ("sf", "alpha:0.3", "rkl")}
    found = findings.findings(results(modes_lost=columns, gradient_variance_common=columns))
    assert [(one.divergence, one.claim.split()[0]) for one in found] == [("alpha:0.3", "loses")]


def test_gradient_variance_is_claimed_of_two() -> None:
    columns = {"js": [1.1, 1.2, 1.15], "fkl": [1.4, 1.5, 1.41], "jeffreys": [0.8, 0.7, 0.71], "rkl": [1.0, 1.0, 1.0]}
    found = findings.findings(
        results(modes_lost={name: [1.0] * 3 for name in columns}, gradient_variance_common=columns)
    )
    verdicts = {one.divergence: one.verdict for one in found if "gradient" in one.claim}
    assert verdicts == {"fkl": "reproduced", "jeffreys": "contradicted"}


def test_what_cannot_be_tested() -> None:
    (one,) = lost(forward_kl=[1], reverse_kl=[3])
    assert one.verdict == "not tested" and "one seed is no sample" in one.sentence
    (same,) = lost(forward_kl=[2, 3, 2], reverse_kl=[2, 3, 2])
    assert same.verdict == "not significant" and "the difference is +0 in every seed" in same.sentence
    (constant,) = lost(forward_kl=[1, 2, 1], reverse_kl=[2, 3, 2])
    assert constant.verdict == "not tested" and "the difference is -1 in every seed" in constant.sentence
    for missing in (math.nan, math.inf, None):
        (found,) = lost(forward_kl=[1, missing, 1], reverse_kl=[2, 3, 4])
        assert found.verdict == "not tested" and "not finite" in found.sentence
    found = findings.findings(results(modes_lost={"js": [1, 2], "forward_kl": [1, 2]}))
    assert {one.verdict for one in found} == {"not tested"}
    assert all("reverse_kl is not among the divergences" in one.sentence for one in found)
    assert findings.findings([]) == []


def test_one_bad_divergence_leaves_the_others_tested() -> None:
    found = lost(js=[math.nan, 1, 1], forward_kl=[1, 0, 0], reverse_kl=[3, 3, 4])
    assert [one.verdict for one in found] == ["not tested", "reproduced"]


def test_seeds_are_paired_by_number() -> None:
    """Runs in any order; a seed that reverse KL does not have is left out."""
    runs = results(modes_lost={"forward_kl": [5, 1, 2, 9], "reverse_kl": [6, 3, 5]})
    (found,) = findings.findings(runs[::-1])
    assert found.seeds == 3 and found.verdict == "reproduced"
    assert found.means == pytest.approx((8 / 3, 14 / 3))


# --------------------------------------------------------------------------------------------------- gradient variances


def test_gradient_variance_is_that_of_the_gradients() -> None:
    """By the definition, from gradients kept one by one; and the run goes on as if nothing had been measured."""
    config = Config(data="ring", width=16, depth=1, batch_size=32, distill_steps=60, gradient_batches=5)
    data = load(config)
    teacher = Denoiser(data.shape, 1, config.width, config.depth, data.sigma_data)
    run = Distillation(teacher, config, data, "forward_kl")
    for step in range(30):
        run.update(step)
    assert run.loss.histogram is not None
    before = run.gen.get_state(), run.loss.histogram.bins.clone()
    found = gradient_variances(run, ("js", "forward_kl", "rkl"))
    assert torch.equal(run.gen.get_state(), before[0]) and torch.equal(run.loss.histogram.bins, before[1])
    assert run.loss.training and run.loss.histogram.training and run.loss.divergence.name == "forward_kl"

    def total_variance(divergence: str) -> float:
        from fdistill_ops.trainer.training import random_numbers

        other = Distillation(teacher, config, data, divergence)
        for name in ("student", "fake", "head"):
            getattr(other, name).load_state_dict(getattr(run, name).state_dict())
        assert other.loss.histogram is not None
        other.loss.histogram.load_state_dict(before_histogram)
        other.loss = fd.FDistillLoss(divergence, histogram=other.loss.histogram, normalizer=None).eval()
        other.gen = random_numbers(config, "gradients")
        gradients = []
        for _ in range(config.gradient_batches):
            other.student.zero_grad()
            other.student_losses(other.draw())[0].backward(inputs=list(other.student.parameters()))
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in other.student.parameters()]))
        return float(torch.stack(gradients).double().var(0).sum())

    before_histogram = run.loss.histogram.state_dict()
    scale = total_variance("reverse_kl")
    for name, value in found.items():
        assert value == pytest.approx(total_variance(name) / scale, rel=1e-6)
    assert found["rkl"] == 1 and found["forward_kl"] != 1


# ----------------------------------------------------------------------------------------------------------- the report


def test_mean_and_standard_error() -> None:
    assert comparison_report.cell([1.0, 2.0, 6.0], ".2f") == "3.00 ± 1.53"  # sqrt((4 + 1 + 9) / 2 / 3)
    assert comparison_report.cell([2.0], ".1f") == "2.0"
    assert comparison_report.cell([1.0, None], ".1f") == "-"
    assert comparison_report.cell([1.0, math.nan], ".1f") == "nan"
    assert comparison_report.cell([1.0, math.inf], ".1f") == "inf"


# ----------------------------------------------------------------------------------------------------------- end to end

TINY = ["--quick", "--teacher-steps", "6", "--distill-steps", "5", "--batch-size", "16", "--device", "cpu"]
TINY += ["--width", "8", "--depth", "1"]
COMPARE = [*TINY, "--seeds", "2"]
DIVERGENCES = "js,rkl,alpha:0.3"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one class, named so that HTML has to be careful."""
    path = tmp_path_factory.mktemp("data") / "a<b>&c.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (60, 4, 5), dtype=np.uint8))
    return path


@pytest.fixture(scope="module")
def compared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    assert main(["compare", *COMPARE, "--data", f"ring,{images}", "--divergences", DIVERGENCES, "--out", str(out)]) == 0
    return out


def report(out: Path) -> Any:
    return json.loads((out / "report.json").read_text())


@pytest.mark.slow
def test_comparison(compared: Path) -> None:
    content = report(compared)
    assert [(one["name"], one["seed"]) for one in content["runs"]] == [
        ("ring", 0),
        ("a<b>&c", 0),
        ("ring", 1),
        ("a<b>&c", 1),
    ]
    for one in content["runs"]:
        assert [row["divergence"] for row in one["results"]] == ["rkl", "js", "alpha:0.3"]
        for row in one["results"]:
            assert row["modes_covered"] + row["modes_lost"] == row["modes"]
            names = ("precision", "recall", "frechet", "weight_variance", "gradient_variance")
            assert all(math.isfinite(row[name]) for name in names)
            assert ("jensen_shannon" in row) == (one["name"] == "ring")
        assert one["results"][0]["gradient_variance"] == 1 and one["results"][0]["weight_variance"] < 1e-6
        assert one["results"][1]["weight_variance"] > 1e-6
    assert {finding["data"] for finding in content["findings"]} == {"ring"}
    about = [(finding["divergence"], "modes" in finding["claim"]) for finding in content["findings"]]
    assert about == [(name, modes) for modes in (True, False) for name in ("js", "alpha:0.3")]


def test_report_is_one_page(compared: Path) -> None:
    page = (compared / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|src=\"(?!data:)", page)
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 4
    assert all(base64.b64decode(picture, validate=True).startswith(b"\x89PNG") for picture in pictures)
    assert "a&lt;b&gt;&amp;c" in page and "a<b>" not in page
    assert page.count("<li>") == page.count("</li>") == 7 + 4 and "<p>-" not in page  # the notes, the findings
    text = (compared / "report.md").read_text()
    for name in ("js", "rkl", "alpha:0.3", "teacher, 18 Heun steps"):
        assert f"| {name} " in text and f"<td>{name}</td>" in page
    assert "| modes lost of 8 " in text and "D, alpha:0.3" in text and " ± " in text
    for sentence in [finding["sentence"] for finding in report(compared)["findings"]]:
        assert sentence in text and sentence in page


@pytest.mark.slow
def test_nothing_is_done_twice(
    compared: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = report(compared)
    steps: list[tuple[str, int]] = []
    update: Callable[..., Any] = Distillation.update

    def counted(self: Distillation, step: int) -> Any:
        steps.append((self.stage, step))
        return update(self, step)

    monkeypatch.setattr(Distillation, "update", counted)
    arguments = ["compare", *COMPARE, "--out", str(compared), "--data"]
    # Limits of what is read have no part in the result.
    limits = ["--max-pixels", "1000", "--max-mib", "1"]
    assert main([*arguments, f"ring,{images}", "--divergences", DIVERGENCES, *limits]) == 0
    assert not steps and report(compared)["runs"] == before["runs"] and len(list((compared / "results").iterdir())) == 4
    assert capsys.readouterr().out.startswith("## ring\n\n| samples from ")
    # One more divergence: what is there is measured again and not trained again.
    assert main([*arguments, str(images), "--divergences", DIVERGENCES + ",jeffreys"]) == 0
    assert steps == 2 * [("jeffreys", step) for step in range(5)]
    again = report(compared)["runs"]
    assert [one["results"][:3] for one in again] == [one["results"] for one in before["runs"] if one["name"] != "ring"]


@pytest.mark.slow
def test_interrupted_comparison_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted in the second student of the second seed, then by processes of its own to the same numbers."""
    arguments = ["compare", *COMPARE, "--data", str(images), "--divergences", "js,rkl", "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    update: Callable[..., Any] = Distillation.update

    def interrupt(self: Distillation, step: int) -> Any:
        if (self.config.seed, self.stage, step) == (1, "js", 2):
            raise KeyboardInterrupt
        return update(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distillation, "update", interrupt)
        main([*arguments, str(tmp_path / "parts")])
    assert not (tmp_path / "parts" / "report.json").exists()
    assert len(list((tmp_path / "parts" / "results").glob("*.pt"))) == 1
    capsys.readouterr()
    assert main([*arguments, str(tmp_path / "parts"), "--jobs", "2"]) == 0
    assert "seed 1: done" not in capsys.readouterr().err  # it was another process
    assert report(tmp_path / "parts") == report(tmp_path / "whole")


@pytest.mark.slow
def test_failure_of_a_process(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends the comparison with a message and status 1."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "logs").write_text("a file where a folder has to be")
    arguments = ["compare", *COMPARE, "--data", str(images), "--jobs", "2", "--out", str(out)]
    assert main(arguments) == 1
    assert "one of the processes has failed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ arguments


def test_settings_of_each_run(tmp_path: Path) -> None:
    wanted = parse(["compare", "--data", "grid,digits", "--seeds", "2", "--seed", "5", "--out", str(tmp_path / "out")])
    assert isinstance(wanted, Comparison)
    assert [(run.data, run.seed) for run in wanted.runs] == [("grid", 5), ("digits", 5), ("grid", 6), ("digits", 6)]
    assert wanted.runs[0].gan_weight != wanted.runs[1].gan_weight == Config.gan_weight
    assert {run.cache for run in wanted.runs} == {tmp_path / "out" / "cache"}
    assert {run.divergences for run in wanted.runs} == {("js", "forward_kl", "reverse_kl", "jeffreys")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "ring,nothing"], "argument --data: must be one of"),
        (["--data", "ring,ring"], "two data sets are called 'ring'"),
        (["--data", ""], "argument --data: must be one of"),
        (["--seeds", "0"], "--seeds: must be an integer from 1"),
        (["--jobs", "0"], "--jobs: must be an integer from 1"),
        (["--divergences", "kl,fkl"], "same divergence"),
        (["--divergences", "alpha:x"], "argument --divergences"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["compare", "--out", str(tmp_path / "out"), *arguments])
    assert status.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_refused_under_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as status:
        main(["compare", "--out", str(tmp_path / "out")])
    assert status.value.code == 2 and not (tmp_path / "out").exists()
    assert "compare runs without torchrun" in capsys.readouterr().err


def test_guidance_without_classes_is_found_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *COMPARE, "--data", "digits,ring", "--guidance", "2", "--out", str(tmp_path)]) == 1
    assert "--guidance 2.0 needs classes, and ring has none" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_images_called_as_a_mixture(tmp_path: Path) -> None:
    """They are drawn as images."""
    np.save(tmp_path / "ring.npy", np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8))
    arguments = ["compare", *TINY, "--divergences", "js", "--data", str(tmp_path / "ring.npy")]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert report(tmp_path / "out")["findings"] == []


def test_bad_data_is_found_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["compare", *COMPARE, "--data", f"ring,{tmp_path / 'empty'}", "--out", str(tmp_path / "out")]) == 1
    assert "no images in this folder" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.pt"))
