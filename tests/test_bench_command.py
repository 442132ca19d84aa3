"""The command line: options, interruptions, progress."""

from __future__ import annotations

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from bench_cases import BRIEF, SHAPE, STEADY, few_sets, record_of, scaled  # noqa: F401
from fdistill_ops.bench import __main__ as command_line
from fdistill_ops.bench import measure, ops, progress
from fdistill_ops.bench.cases import MODES, SHAPES, Case
from fdistill_ops.bench.measure import Plan
from fdistill_ops.bench.record import Record, Result

import fdistill_ops as fd
from fdistill_ops.trainer.interruption import Interrupted

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.no_poison


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_compiler(number: signal.Signals) -> None:
    """Which makes an error of its own of it."""

    def step(i: int) -> None:
        try:
            os.kill(os.getpid(), number)
            for _ in range(1000):
                time.sleep(0.01)
        except BaseException:
            raise RuntimeError("the compiler died") from None

    measurement = measure.Measurement(Case("f_weights", SHAPE, mode="forward"), BRIEF)
    before = signal.getsignal(number)
    with measure.interruptible(), pytest.raises(Interrupted) as error:
        measurement.is_right(measure.Contender("a", "compile", step, list))
    assert error.value.status == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_shows_and_writes_what_is_finished(
    number: signal.Signals,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    done: list[Case] = []

    def interrupted(case: Case, plan: Plan) -> list[Result]:
        if done:
            os.kill(os.getpid(), number)
            time.sleep(10)
        done.append(case)
        return record_of({"cpu": STEADY, "eager": scaled(2.0)}, case).results

    monkeypatch.setattr(command_line, "measure", interrupted)
    path, table = tmp_path / "record.json", tmp_path / "record.csv"
    arguments = ["--op", "f_distill", "--device", "cpu", "--json", str(path), "--csv", str(table)]
    assert command_line.main(arguments) == status
    output = capsys.readouterr()
    assert f"{number.name}: this is what was finished" in output.err
    assert "cifar10" in output.out
    assert "imagenet64" not in output.out
    record = Record.read(path)
    assert (len(record.results), record.partial) == (2, True)
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert {row["contender"] for row in rows} == {"cpu", "eager"}
    assert {row["partial"] for row in rows} == {"True"}
    done.clear()
    done.append(Case("f_distill", SHAPE))
    assert command_line.main(arguments) == status  # before anything was finished
    assert Record.read(path).results == []
    assert Record.read(path).partial


def test_an_interruption_keeps_the_rounds_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody's, and nobody without one."""
    calls: list[str] = []

    def step(name: str, i: int) -> None:
        calls.append(name)
        if len(calls) == 29:  # after three of four in the pilot, and six in the first round
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    measurement = measure.Measurement(Case("f_weights", SHAPE, mode="forward"), replace(BRIEF, rounds=9))
    contenders = [measure.Contender(name, "eager", partial(step, name), list) for name in "ab"]
    measurement.results = {name: Result(measurement.case, name, "eager", 1) for name in "ab"}
    monkeypatch.setattr(measurement, "checked", lambda: contenders)
    with measure.interruptible():
        results = measurement.run()
        with pytest.raises(Interrupted):
            measure.go_on_unless_interrupted()
    assert {result.contender: len(result.rounds) for result in results} == {"a": 2, "b": 2}


WITH_ROUNDS = """
import sys
from fdistill_ops.bench import __main__ as command_line, record

add = record.Result.add
record.Result.add = lambda *arguments: (add(*arguments), print("a round", file=sys.stderr, flush=True))
sys.exit(command_line.main())
"""


@pytest.mark.slow
def test_sigterm_from_outside(tmp_path: Path) -> None:
    """A whole run, its standard error stream redirected."""
    arguments = ["--op", "f_weights", "--shape", "8,4", "--rounds", "10000", "--no-compile", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_ROUNDS, *arguments, "--json", "record.json", "--csv", "record.csv"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(fd.__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "fdistill-bench: 0/1 f_weights forward 8,4 float32\n"
    assert [process.stderr.readline() for _ in range(20)] == ["a round\n"] * 20
    process.terminate()
    output, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "SIGTERM: this is what was finished" in error
    assert "f_weights, forward, float32" in output
    record = Record.read(tmp_path / "record.json")
    assert record.partial
    assert all(0 < len(result.rounds) < 10000 for result in record.results)
    assert (tmp_path / "record.csv").read_text().count("True\n") > 1


@pytest.mark.parametrize(
    "options",
    [
        ["--op", "score_difference", "--mode", "forward+backward"],
        ["--op", "f_weights,gan_generator", "--sweep", "size"],
        ["--contender", "compile", "--no-compile"],
        ["--sweep", "size", "--shape", "4,4"],
        ["--rounds", "2", "--compare", "old.json"],
    ],
    ids=" ".join,
)
def test_what_measures_nothing_is_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.parse(["--device", "cpu", *options])
    assert error.value.code == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_nobody_serves_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    arguments = ["--op", "to_x0", "--contender", "copy", "--shape", "4,4", "--device", "cpu", "--rounds", "1"]
    assert command_line.main([*arguments, "--json", str(path)]) == 0
    if "cpu" in fd.available_backends():
        path.unlink()
        arguments[3] = "cpu"
        assert command_line.main([*arguments, "--json", str(path)]) == 2
        assert not path.exists()
        assert "none of the contenders" in capsys.readouterr().err


def test_unwritable_files_are_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for option, path in (
        ("--json", tmp_path),
        ("--json", Path("/proc/x.json")),
        ("--plot", file),
        ("--plot", file / "a"),
        ("--csv", file / "a"),
    ):
        with pytest.raises(SystemExit) as error:
            command_line.parse([option, str(path)])
        assert error.value.code == 2
        assert f"argument {option}: " in capsys.readouterr().err
    assert command_line.parse(["--plot", str(tmp_path / "a" / "b")]).plot == tmp_path / "a" / "b"


def test_progress_is_a_line_now_and_then_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(9) as shown:
        for case in range(9):
            shown.step(f"case {case}")
            now[0] += 4.0
    assert capsys.readouterr().err.splitlines() == [
        "fdistill-bench: 0/9 case 0",
        "fdistill-bench: 3/9 case 3, 24 s left",
        "fdistill-bench: 6/9 case 6, 12 s left",
    ]


def test_progress_stays_on_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    with progress.Progress(2) as shown:
        shown.step("distribution_matching forward+backward sd3/flux bfloat16")
    lines = terminal.getvalue().split("\r\033[K")
    assert max(map(len, lines)) == 39


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "cifar"], "--shape"),
        (["--shape", "7"], "--shape"),
        (["--guidance", "nan"], "--guidance"),
        (["--guidance", "inf"], "--guidance"),
        (["--op", "nothing"], "--op"),
        (["--dtype", "int8"], "--dtype"),
        (["--divergence", "nothing"], "--divergence"),
        (["--contender", "cpuu"], "--contender"),
        (["--rounds", "0"], "--rounds"),
        (["--threads", "0"], "--threads"),
        (["--json", "/no/such/folder/x.json"], "--json"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line.parse(arguments)
    assert error.value.code == 2
    assert f"argument {message}" in capsys.readouterr().err


def test_options_make_cases() -> None:
    def cases(*arguments: str) -> list[Case]:
        return command_line.parse(["--device", "cpu", *arguments]).cases

    every = cases()
    assert {case.op for case in every} == set(ops.OPS)
    assert {case.shape for case in every} == set(SHAPES.values())
    assert {case.mode for case in every} == set(MODES)
    assert len(set(every)) == len(every)
    (case,) = cases(
        *("--op", "f_distill", "--shape", "2,3,4", "--mode", "forward", "--dtype", "bfloat16", "--threads", "1"),
        *("--divergence", "fkl", "--guidance", "7.5", "--mask", "--no-histogram", "--warm"),
    )
    assert case == Case("f_distill", (2, 3, 4), "", "forward", "bfloat16", "cpu", 1, "fkl", 7.5, True, False, True)
    assert len(cases("--op", "dmd2", "--shape", "sd3", "--shape", "flux", "--shape", "sd3/flux")) == len(MODES)
    forward = cases("--op", "f_distill", "--sweep", "size", "--mode", "forward")
    assert {case.mode for case in forward} == {"forward"}
    sweep = cases("--sweep", "size", "--dtype", "float32,bfloat16")
    assert sweep[0].tensor_bytes == 1024
    assert {case.dtype for case in sweep} == {"float32", "bfloat16"}
    assert {case.op for case in sweep} == {"f_distill"}
    again = cases("--op", "dmd2", "--op", "f_weights,dmd2", "--mode", "forward", "--shape", "sdxl", "--shape", "2,3")
    assert [(case.op, case.shape) for case in again] == [
        *(("dmd2", shape) for shape in (SHAPES["sdxl"], (2, 3))),
        *(("f_weights", shape) for shape in (SHAPES["sdxl"], (2, 3))),
    ]


def test_quick_compiles_once_also_on_a_slow_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    seen: list[tuple[str, bool]] = []

    def measured(case: Case, plan: Plan) -> list[Result]:
        now[0] += 20 * seconds if plan.compile else seconds
        seen.append((case.label, plan.compile))
        return [Result(case, "cpu", "fused", 1)]

    monkeypatch.setattr(command_line, "measure", measured)
    monkeypatch.setattr(command_line, "measure_overhead", lambda *_: [])
    monkeypatch.setattr(command_line.time, "monotonic", lambda: now[0])
    seconds = 0.1
    assert command_line.main(["--quick", "--device", "cpu"]) == 0
    assert [label for label, compiles in seen if compiles] == ["cifar10"]
    assert len(seen) == 3 + 5 + 8
    assert "out of time" not in capsys.readouterr().err
    seen.clear()
    seconds = 4.0
    assert command_line.main(["--quick", "--device", "cpu"]) == 0
    assert seen[0] == ("cifar10", True)
    assert len(seen) == 4  # beside it what ends within 15 seconds
    assert "out of time" in capsys.readouterr().err
    seen.clear()
    assert command_line.main(["--quick", "--no-compile", "--device", "cpu"]) == 0
    assert not any(compiles for _, compiles in seen)


@pytest.mark.slow
def test_quick(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that --quick does but compiling."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "_QUICK", replace(command_line._QUICK, rounds=2, seconds=0.0))
    monkeypatch.setattr(command_line, "memory_bytes", lambda device: 48 << 20)  # sizes up to 1 MiB
    outputs = ["--json", "record.json", "--csv", "record.csv", "--plot", "figures"]
    assert command_line.main(["--quick", "--no-compile", "--shape", "8,3,16,16", "--device", "cpu", *outputs]) == 0
    output = capfd.readouterr()
    assert "profiler" not in output.err
    assert "\033" not in output.out + output.err
    assert "host overhead" in output.out
    record = Record.read(tmp_path / "record.json")
    assert record.machine["cores"] == os.cpu_count()
    assert all(result.error is None for result in record.results)
    assert not record.partial
    assert (tmp_path / "record.csv").read_text().count("\n") > len(record.results)
    assert list((tmp_path / "figures").iterdir())


@pytest.mark.slow
def test_pytest_benchmark_suite() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider", "bench"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two that wait for each other are slow on a busy machine
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
    assert re.search(r"\d+ passed", result.stdout)
