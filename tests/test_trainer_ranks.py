"""The trainer on two processes: the result of one, up to rounding; a rank that dies or is told to end ends the job."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_cases import TINY, environment, wait_for

from fdistill_ops.trainer import ranks
from fdistill_ops.trainer.__main__ import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.no_poison,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

LONG = ["--distill-steps", "100000", "--checkpoint-every", "20"]
SHORT = ["--divergences", "fkl"]


def torchrun(out: Path, *more: str, processes: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "fdistill_ops.trainer", *TINY, "--out", str(out), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment())


def newest(out: Path, stage: str) -> dict[str, Any]:
    return torch.load(sorted((out / "cache").glob(f"{stage}-*.pt"))[-1], weights_only=True)["state"]


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The trainer's processes, in the order of their ranks."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status, variables = (folder / "status").read_text(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if f"\nPPid:\t{process.pid}\n" in status:
            found += [(int(value[5:]), int(folder.name)) for value in variables if value.startswith(b"RANK=")]
    return [pid for _, pid in sorted(found)]


@pytest.mark.parametrize("settings", [[], ["--student-steps", "2", "--guidance", "2"]], ids=["one step", "two, guided"])
def test_two_ranks_are_one_up_to_rounding(settings: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    process = torchrun(two, *SHORT, *settings)
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error[-3000:]
    assert output.count("| samples from ") == 1, "one rank prints the table"
    threads = torch.get_num_threads()
    assert main([*TINY, "--out", str(one), *SHORT, *settings]) == 0
    assert torch.get_num_threads() == threads
    for stage in ("classifier", "teacher", "student-fkl"):
        a, b = newest(one, stage), newest(two, stage)
        assert torch.equal(a["random"], b["random"])
        for name, part in a["parts"].items():
            if not name.endswith("optimizer"):
                for key, value in part.items():
                    # Adam divides by the gradient's size: where that is nothing but rounding, a step of the full rate
                    # can come of it, so that what is compared is the whole tensor.
                    difference = (value - b["parts"][name][key]).double().norm()
                    assert difference <= 1e-4 * value.double().norm() + 1e-5, (stage, name, key, float(difference))
        for mine, theirs in zip(a["records"], b["records"], strict=True):
            assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5, nan_ok=True), stage


def test_parts_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(12)
    monkeypatch.setattr(ranks, "world", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        assert ranks.mine(whole).tolist() == list(range(4 * rank, 4 * rank + 4))


def test_statistics_of_the_whole_batch() -> None:
    """Those of the parts, put together, are those of the batch in one."""
    import fdistill_ops as fd

    gen = torch.Generator().manual_seed(0)
    x, teacher, fake = torch.randn(3, 8, 5, generator=gen)
    weight = torch.rand(8, generator=gen)
    _, stats = fd.distribution_matching_loss(x, teacher, fake, weight=weight, return_stats=True)
    parts = []
    for part in (slice(0, 4), slice(4, 8)):
        _, own = fd.distribution_matching_loss(
            x[part], teacher[part], fake[part], weight=weight[part], return_stats=True
        )
        parts.append(own.to_dict())
    assert ranks.combined(parts) == pytest.approx(stats.to_dict(), rel=1e-5, nan_ok=True)


def test_resumed_on_another_number_of_ranks(tmp_path: Path) -> None:
    process = torchrun(tmp_path, *LONG)
    wait_for(tmp_path / "cache", "student-js-*-00000[1-9]*.pt", process)
    process.terminate()
    error = process.communicate(timeout=120)[1]
    assert "SIGTERM: every file is whole" in error
    step = int(sorted((tmp_path / "cache").glob("student-js-*.pt"))[-1].stem[-8:])
    command = [sys.executable, "-m", "fdistill_ops.trainer", *TINY, "--out", str(tmp_path), *LONG]
    alone = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for(tmp_path / "cache", f"student-js-*-{step // 20 * 20 + 20:08d}.pt", alone)
    alone.send_signal(signal.SIGINT)
    error = alone.communicate(timeout=60)[1]
    assert f"js: goes on after step {step}" in error and alone.returncode == 130


@pytest.mark.parametrize("victim", [0, 1])
def test_rank_that_dies(victim: int, tmp_path: Path) -> None:
    process = torchrun(tmp_path, *LONG)
    wait_for(tmp_path / "cache", "student-js-*-00000[1-9]*.pt", process)
    start = time.monotonic()
    os.kill(workers(process)[victim], signal.SIGKILL)
    error = process.communicate(timeout=90)[1]
    assert process.returncode != 0 and time.monotonic() - start < 60
    assert "exitcode  : -9" in error  # torchrun's own report names the rank
    for path in (tmp_path / "cache").glob("*.pt"):
        torch.load(path, weights_only=True)


# A thread of the group that lets go of a tensor while the interpreter ends kills the process: "terminate called without
# an active exception". It takes bad luck, so the threads themselves are looked for.
LEAVING = """
import atexit, os, sys
from pathlib import Path

def threads(when):
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    found = " ".join(name for name in names if "gloo" in name)
    Path(sys.argv[0]).with_name(f"{when} {os.environ['RANK']}").write_text(found)

atexit.register(threads, "left")  # called last: after what is registered from here on

import torch
from fdistill_ops.trainer import ranks

def run():
    module = ranks.parallel(torch.nn.Linear(2, 2))
    module.cycle = [module]
    module(torch.ones(1, 2)).sum().backward()
    ranks.gathered(0)
    threads("within")
    if sys.argv[1] == "fails":
        raise RuntimeError

try:
    with ranks.joined("cpu"):
        run()
except RuntimeError:
    pass
"""


@pytest.mark.parametrize("how", ["ends", "fails"])
def test_no_thread_of_the_group_is_left(how: str, tmp_path: Path) -> None:
    script = tmp_path / "leaving.py"
    script.write_text(LEAVING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    for rank in "01":
        assert (tmp_path / f"within {rank}").read_text(), "the threads have other names"
        assert not (tmp_path / f"left {rank}").read_text()


def test_rank_that_dies_without_torchrun(tmp_path: Path) -> None:
    """The other one ends by itself, and says why."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "fdistill_ops.trainer", *TINY, "--out", str(tmp_path), *LONG]
    processes = [
        subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment() | meeting | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in ("0", "1")
    ]
    wait_for(tmp_path / "cache", "student-js-*-00000[1-9]*.pt", processes[0])
    processes[1].kill()
    processes[1].communicate()
    error = processes[0].communicate(timeout=60)[1]
    assert processes[0].returncode == 1
    assert "fdistill-train: rank 0: error, perhaps since another rank has ended: " in error
    assert "Traceback" not in error


def test_signal_to_one_rank(tmp_path: Path) -> None:
    """Both end after the same step, saved."""
    process = torchrun(tmp_path, *LONG)
    wait_for(tmp_path / "cache", "student-js-*-00000[1-9]*.pt", process)
    os.kill(workers(process)[1], signal.SIGTERM)
    error = process.communicate(timeout=90)[1]
    assert "rank 0: SIGTERM: every file is whole" in error and "rank 1: SIGTERM: every file is whole" in error


def test_batch_that_cannot_be_shared(tmp_path: Path) -> None:
    process = torchrun(tmp_path / "out", "--batch-size", "15")
    error = process.communicate(timeout=90)[1]
    assert "argument --batch-size: must be a multiple of the number of ranks, 2, got 15" in error
    assert process.returncode != 0 and not (tmp_path / "out").exists()
