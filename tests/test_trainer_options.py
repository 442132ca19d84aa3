"""Options of the distillation: students of several steps, guidance, precision, torch.compile, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer_cases import TINY, distillation, need_extra, same

import fdistill_ops as fd
from fdistill_ops import backends
from fdistill_ops.stats import FIELDS
from fdistill_ops.trainer import edm
from fdistill_ops.trainer.__main__ import main
from fdistill_ops.trainer.capture import CapturedUpdate
from fdistill_ops.trainer.config import Config
from fdistill_ops.trainer.data import Data, load
from fdistill_ops.trainer.distill import Draws, generate, guided, student_levels
from fdistill_ops.trainer.files import Log
from fdistill_ops.trainer.networks import Denoiser
from fdistill_ops.trainer.teacher import TeacherTraining

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]

need_extra()


@pytest.fixture(scope="module")
def data() -> Data:
    return load(Config())


# ------------------------------------------------------------------------------------------------------- several steps


class Recorder(torch.nn.Module):
    """A student that answers with half of its input, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.asked: list[tuple[Tensor, float]] = []

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        assert sigma.shape == (len(x),)
        self.asked.append((x, float(sigma[0])))
        return self.factor * x


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_samples_of_several_steps(steps: int) -> None:
    """x_k = f (x_{k-1} + s_k z_k)."""
    levels, student = [20.0, 3.0, 0.5][:steps], Recorder()
    noise = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = generate(student, noise, torch.zeros(4, dtype=torch.long), levels)
    expected = torch.zeros(4, 2, dtype=torch.float64)
    for k, level in enumerate(levels):
        expected = 0.5 * (expected + level * noise[:, k])
    torch.testing.assert_close(x, expected)
    assert [level for _, level in student.asked] == levels


def test_backward_simulation(data: Data) -> None:
    """Samples b stops at step last[b], with the gradient of that step alone, x_{k-1} + s_k z_k."""
    training = distillation(data, student_steps=3, batch_size=8)
    student = training.student = training.trained_student = Recorder()
    draws = training.draw()._replace(start=torch.randn(8, 3, 8, 8, dtype=torch.float64))
    assert draws.last.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    x = training.student_samples(draws)
    inputs = []
    for b, last in enumerate(draws.last.tolist()):
        x_t = training.levels[0] * draws.start[b, 0]
        for k in range(1, last + 1):
            x_t = 0.5 * x_t + training.levels[k] * draws.start[b, k]
        inputs.append(x_t)
    torch.testing.assert_close(x, 0.5 * torch.stack(inputs))
    x.sum().backward()
    torch.testing.assert_close(student.factor.grad, torch.stack(inputs).sum())


def test_no_gradient_where_none_is_wanted() -> None:
    with torch.no_grad():
        assert not generate(Recorder(), torch.zeros(2, 1, 3), torch.zeros(2, dtype=torch.long), [1.0]).requires_grad


def test_no_step_is_left_untrained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["--student-steps", "4", "--batch-size", "3", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert status.value.code == 2 and not (tmp_path / "out").exists()
    assert "argument --batch-size: must be at least --student-steps, 4, got 3" in capsys.readouterr().err


def test_levels() -> None:
    assert student_levels(Config()) == pytest.approx([20.0])
    levels = student_levels(Config(student_steps=4))
    u = torch.tensor([0, 0.25, 0.5, 0.75], dtype=torch.float64)
    assert levels == pytest.approx(edm.karras_sigma(u, 0.02, 20.0).tolist())
    assert levels == sorted(levels, reverse=True) and levels[0] == pytest.approx(20)


def test_critics_tell_the_steps_apart(data: Data) -> None:
    """The fake score starts as the teacher at each of them; a step that is not in a batch is not trained."""
    training = distillation(data, student_steps=2, batch_size=16)
    draws = training.draw()
    x, sigma = draws.real_noise, draws.sigma
    with torch.no_grad():
        expected = training.teacher(x, sigma, draws.labels)
        torch.testing.assert_close(training.fake(x, sigma, training.by_step(draws)), expected)
    first = draws._replace(last=torch.zeros_like(draws.last))
    training.draw = lambda: first  # type: ignore[method-assign]
    classes = training.teacher.no_class + 1
    before = [training.fake.network.label.weight.detach().clone(), training.head.step.weight.detach().clone()]
    for step in range(2):
        training.update_critics(step)
    moved = [training.fake.network.label.weight != before[0], training.head.step.weight != before[1]]
    assert moved[0][:classes].any() and not moved[0][classes:].any()
    assert moved[1][0].any() and not moved[1][1].any()


def test_samples_take_all_steps_and_are_the_same_each_time(data: Data) -> None:
    training = distillation(data, student_steps=3)
    noise, labels = torch.randn(5, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(5)
    state = training.gen.get_state()
    samples = training.sample(noise, labels)
    assert torch.equal(samples, training.sample(noise, labels)) and torch.equal(training.gen.get_state(), state)
    one = generate(training.average, noise[:, None], labels, training.levels[:1])
    assert samples.shape == one.shape and not torch.equal(samples, one)
    assert torch.equal(distillation(data).sample(noise, labels), one)
    # Other noise brings other noise for the further steps.
    moved = training.sample(noise + 1e-6, labels) - samples
    assert float(moved.abs().max()) > 1e-2


# ------------------------------------------------------------------------------------------------------------ guidance


def test_guided_student_loss_is_that_of_the_guided_teacher(data: Data) -> None:
    """u + s (c - u) in the kernel and beside it."""
    training = distillation(data, guidance=2.5)
    draws = training.draw()
    with torch.no_grad():
        loss, _, stats = training.student_losses(draws)
        x = generate(training.student, draws.start, draws.labels, training.levels)
        x_t = x + edm.rows(draws.sigma, x) * draws.noise
        _, features = training.teacher.with_features(x_t, draws.sigma, draws.labels)
        teacher = guided(training.teacher, training.config)(x_t, draws.sigma, draws.labels)
        fake = training.fake(x_t, draws.sigma, training.by_step(draws))
        logits = training.head(features, draws.last)
        histogram = fd.RatioHistogram(training.loss.histogram.min_t, training.loss.histogram.max_t, 10, 0.9)
        expected = fd.reference.f_distill_loss(x, teacher, fake, logits, draws.sigma.log(), histogram=histogram)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(stats[FIELDS.index("loss")]) == float(loss)
    unguided = training.teacher(x_t, draws.sigma, draws.labels)
    assert not torch.allclose(teacher, unguided)


def test_no_guidance_is_the_teacher_itself(data: Data) -> None:
    training = distillation(data)
    assert guided(training.teacher, training.config) is training.teacher


@pytest.mark.parametrize(("guidance", "share"), [(1.0, 0.0), (3.0, 0.1)])
def test_labels_are_dropped_for_guidance_alone(guidance: float, share: float, data: Data) -> None:
    config = Config(guidance=guidance, width=8, depth=1, batch_size=1000)
    model = Denoiser((8, 8), data.classes, 8, 1, data.sigma_data)
    training = TeacherTraining(model, config, data)
    asked: list[Tensor] = []
    training.parallel = lambda x, sigma, labels: asked.append(labels) or model(x, sigma, labels)  # type: ignore
    for _ in range(5):
        training.loss()
    labels = torch.cat(asked)
    # 5,000 draws: standard deviation sqrt(0.1 * 0.9 / 5000) = 0.004.
    assert float((labels == model.no_class).double().mean()) == pytest.approx(share, abs=5 * 0.0043 * (share > 0))
    assert int(labels.max()) <= model.no_class
    assert Config(guidance=guidance).key("label_dropout") != Config(guidance=4 - guidance).key("label_dropout")


@pytest.mark.slow
def test_run_with_steps_guidance_and_alpha(tmp_path: Path) -> None:
    options = ["--divergences", "alpha:0.3,neyman", "--student-steps", "4", "--guidance", "1.5"]
    assert main([*TINY, *options, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["name"]: row["evaluations"] for row in rows} == {
        "held-out images": None,
        "teacher, 18 Heun steps": 70,
        "teacher, 1 step": 1,
        "student, alpha:0.3": 4,
        "student, neyman": 4,
    }


# ----------------------------------------------------------------------------------------------- precision and compile


@pytest.mark.parametrize(("precision", "roundings"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_low_precision_is_near_float32(precision: str, roundings: float, data: Data) -> None:
    """The first losses, which come of the same parameters and random numbers: what differs is the rounding of a few
    layers."""
    low, full = (distillation(data, precision=name, batch_size=256) for name in (precision, "float32"))
    losses = [[loss.item() for loss in training.critic_losses(training.draw())] for training in (low, full)]
    assert losses[0] == pytest.approx(losses[1], rel=16 * roundings) and losses[0] != losses[1]
    for training in (low, full):
        assert training.student_losses(training.draw())[0].dtype == torch.float32


def test_float16_gradients_are_scaled(data: Data) -> None:
    training = distillation(data, precision="float16")
    scaler = training.student_optimizer.scaler
    assert scaler.is_enabled() and scaler.get_scale() == 2**16
    before = [parameter.clone() for parameter in training.student.parameters()]
    training.update(0)
    assert scaler.get_scale() == 2**16, "the first update overflowed"
    assert not same(before, list(training.student.parameters()))
    # The next one does, and is left out.
    before = [parameter.clone() for parameter in training.student.parameters()]
    training.student_optimizer.update(sum(p.sum() for p in training.student.parameters()) * torch.inf)
    assert same(before, [p.detach() for p in training.student.parameters()]) and scaler.get_scale() == 2**15


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"precision": "bfloat16", "student_steps": 2, "guidance": 2.0}], ids=str)
def test_compiled_step(settings: dict[str, Any], data: Data) -> None:
    """Without a graph break, and with the losses and the histogram of the step that is not compiled. In bfloat16 the
    score difference, at first nothing but rounding, says nothing."""
    torch._dynamo.reset()
    compiled, eager = (distillation(data, compile=flag, **settings) for flag in (True, False))
    low = "precision" in settings
    tolerance = 2e-2 if low else 1e-4
    for step in range(2):
        records = [training.update(step)() for training in (compiled, eager)]
        names = ["fake_loss", "discriminator_loss", "gan_loss"] if low else list(records[0])
        mine, theirs = ({name: record[name] for name in names} for record in records)
        assert mine == pytest.approx(theirs, rel=tolerance, abs=1e-6, nan_ok=True)
    torch.testing.assert_close(compiled.loss.histogram.bins, eager.loss.histogram.bins, rtol=tolerance, atol=0)


def test_gradients_reach_the_trained_network_alone(data: Data) -> None:
    """The student's loss goes through the discriminator's head and the teacher; neither gets a gradient of it."""
    training = distillation(data)
    training.update_critics(0)
    heads = [parameter.grad.clone() for parameter in training.head.parameters()]
    training.update_student(0)
    assert same(heads, [parameter.grad for parameter in training.head.parameters()])
    assert all(parameter.grad is None for parameter in training.teacher.parameters())
    assert all(parameter.grad is None for parameter in training.average.parameters())


class Graph:
    """Stands for CUDA's: what is called within ``capture`` runs when it is replayed, on the same tensors."""

    def __init__(self) -> None:
        self.work: list[Any] = []

    def replay(self) -> None:
        for work in self.work:
            work()


def test_captured_update_runs_once_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up calls, the one that captures and those that replay: each is one update, with its own inputs."""
    capturing: list[Graph] = []

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.pop()

    @contextlib.contextmanager
    def stream(_: object) -> Iterator[None]:
        yield

    waits = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {"CUDAGraph": Graph, "graph": capture, "stream": stream}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: waits)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: waits)
    total, result = torch.zeros(()), torch.zeros(())

    class Inputs(NamedTuple):
        value: Tensor

    def update(inputs: Inputs) -> Tensor:
        def work() -> None:
            total.add_(inputs.value)
            result.copy_(2 * inputs.value)

        if capturing:
            capturing[-1].work.append(work)
        else:
            work()
        return result

    captured = CapturedUpdate(update)
    for value in range(1, 8):
        assert float(captured(Inputs(torch.tensor(float(value))))) == 2 * value
        assert float(total) == value * (value + 1) / 2
    assert captured.graph is not None and len(captured.graph.work) == 1  # type: ignore[attr-defined]


class NoConstants(TorchFunctionMode):
    """No tensor is made of Python numbers, which copies them to the device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function not in (torch.tensor, torch.as_tensor, Tensor.new_tensor), function
        return function(*args, **(kwargs or {}))


class OnDevice(TorchDispatchMode):
    """Nothing of the host takes part. The meta device has no values: whatever reads one there fails by itself."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, Tensor) or tensor.is_meta, (function, tensor)
        return result


@pytest.mark.parametrize("settings", [{}, {"student_steps": 2, "guidance": 2.0}, {"precision": "bfloat16"}], ids=str)
def test_captured_update_stays_on_its_device(
    settings: dict[str, Any], data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is captured as a CUDA graph reads nothing from the device, and copies nothing to it."""
    training = distillation(data, **settings)
    for network in (training.teacher, training.student, training.fake, training.head, training.loss):
        network.to("meta")
    training.level_of_step = training.level_of_step.to("meta")
    draws = Draws(*(value.to("meta") for value in training.draw()))
    monkeypatch.setattr(backends, "choose", lambda device: "cpu")
    with NoConstants(), OnDevice():
        loss, gan_loss, _ = training.student_losses(draws)
        (loss + gan_loss).backward(inputs=list(training.student.parameters()))
        with pytest.raises(RuntimeError, match="item"):
            loss.item()
        with pytest.raises(AssertionError):
            loss + torch.ones(())
    assert all(parameter.grad.is_meta for parameter in training.student.parameters())


# ---------------------------------------------------------------------------------------------------------------- logs


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed: every number of a record by stage and step; those of an earlier run are there already."""
    written: list[tuple[str, float, int]] = []
    closed: list[str] = []
    suffixes: list[str] = []

    class SummaryWriter:
        def __init__(self, folder: str, filename_suffix: str) -> None:
            self.folder = folder
            suffixes.append(filename_suffix)

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((tag, value, step))

        def close(self) -> None:
            closed.append(self.folder)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", types.SimpleNamespace(__spec__=object()))
    with Log(tmp_path) as log:
        log.repeat("js", [{"step": 1, "loss": 3.0}])
        log.write("js", {"step": 2, "loss": 1.5, "weight_mean": 1.0})
    assert written == [("js/loss", 1.5, 2), ("js/weight_mean", 1.0, 2)]
    assert closed == [str(tmp_path / "tensorboard")]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    with Log(tmp_path):
        pass
    assert suffixes[0] != suffixes[1], "the names of the files can be foreseen"


def test_real_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Log(tmp_path) as log:
        log.write("js", {"step": 2, "loss": 1.5})
    assert list((tmp_path / "tensorboard").glob("events*"))


@pytest.mark.parametrize("missing", [True, False])
def test_without_tensorboard(missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing:
        monkeypatch.setitem(sys.modules, "tensorboard", None)
    with Log(tmp_path if missing else None) as log:
        log.write("js", {"step": 2, "loss": float("nan")})
    assert [path.name for path in tmp_path.iterdir()] == (["log.jsonl"] if missing else [])
    if missing:
        assert json.loads((tmp_path / "log.jsonl").read_text()) == {"stage": "js", "step": 2, "loss": None}
