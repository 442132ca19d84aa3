"""The choice of a back end: for the process, for a thread, for a task, once in a call."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import in_threads

import fdistill_ops as fd
from fdistill_ops import backends

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif("cpu" not in fd.available_backends(), reason="not compiled")


@pytest.fixture(autouse=True)
def default_afterwards() -> Iterator[None]:
    yield
    fd.set_backend(None)


def test_a_block_holds_for_its_thread_alone() -> None:
    inside, seen = threading.Barrier(2, timeout=20), threading.Barrier(2, timeout=20)

    def enters() -> None:
        with fd.use_backend("reference"):
            inside.wait()
            assert backends.choose(CPU) == "reference"
            seen.wait()

    def looks() -> None:
        inside.wait()
        assert backends.choose(CPU) == "cpu"
        seen.wait()

    in_threads(enters, looks)


def test_blocks_that_overlap_leave_nothing_behind() -> None:
    """A enters, B enters, A leaves, B leaves: the process was left on A's choice."""
    a_in, b_in, a_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with fd.use_backend("reference"):
            a_in.set()
            assert b_in.wait(20)
        a_out.set()

    def second() -> None:
        assert a_in.wait(20)
        with fd.use_backend("cpu"):
            b_in.set()
            assert a_out.wait(20)
            assert backends.choose(CPU) == "cpu"

    in_threads(first, second)
    assert backends.choose(CPU) == "cpu"
    seen: list[str] = []
    in_threads(lambda: seen.append(backends.choose(CPU)))
    assert seen == ["cpu"]


def test_a_block_holds_for_its_task_alone() -> None:
    async def task(name: str, rounds: int) -> None:
        with fd.use_backend(name):
            for _ in range(rounds):
                await asyncio.sleep(0)
                assert backends.choose(CPU) == name
        assert backends.choose(CPU) == "cpu"

    async def run() -> None:
        await asyncio.gather(task("reference", 3), task("cpu", 5), task("reference", 7))

    asyncio.run(run())


def test_set_backend_is_for_the_process_and_blocks_win() -> None:
    fd.set_backend("reference")
    seen: list[str] = []
    in_threads(lambda: seen.append(backends.choose(CPU)))
    assert seen == ["reference"]
    with fd.use_backend("cpu"):
        assert backends.choose(CPU) == "cpu"
        fd.set_backend(None)
        fd.set_backend("reference")
        assert backends.choose(CPU) == "cpu"
    with fd.use_backend(None):
        assert backends.choose(CPU) == "cpu"
    assert backends.choose(CPU) == "reference"


def test_blocks_nest() -> None:
    with fd.use_backend("reference"):
        with fd.use_backend("cpu"), fd.use_backend("reference"):
            assert backends.choose(CPU) == "reference"
        assert backends.choose(CPU) == "reference"
        with fd.use_backend(None):
            assert backends.choose(CPU) == "cpu"


@pytest.fixture
def often_switched() -> Iterator[None]:
    """Threads take turns every ten microseconds. As it is, one that never waits gets five milliseconds whenever
    another gives the interpreter away for a moment."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("often_switched")
def test_the_choice_may_change_at_any_moment_of_a_call() -> None:
    """One thread turns the process's choice over and over, two compute: no call notices."""
    x, teacher, fake = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    logits = torch.tensor([0.5, -0.5])
    done = threading.Event()
    histogram = fd.RatioHistogram(0.0, 1.0, 4, ema_rate=0.9).eval()

    def turns() -> None:
        while not done.is_set():
            fd.set_backend("reference")
            fd.set_backend("cpu")

    def computes() -> None:
        leaf = x.clone().requires_grad_()
        for _ in range(1000):
            loss = fd.f_distill_loss(leaf, teacher, fake, logits, logits, histogram=histogram)
            torch.autograd.grad(loss, leaf)
            fd.f_weights(logits, logits, histogram=histogram)

    def both() -> None:
        try:
            in_threads(computes, computes)
        finally:
            done.set()

    in_threads(turns, both)


@pytest.mark.parametrize("times", [1, 3])
def test_one_choice_in_a_call(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    logits = torch.randn(3)
    chosen: list[torch.device] = []
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda device: (chosen.append(device), choose(device))[1])
    calls: list[Callable[[], Any]] = [
        lambda: fd.distribution_matching_loss(x, x.detach(), x.detach()),
        lambda: fd.f_distill_loss(x, x.detach(), x.detach(), logits),
        lambda: fd.f_weights(logits),
        lambda: fd.score_difference(x, x.detach(), x.detach()),
        lambda: fd.score_identity_loss(x, x.detach(), x.detach()),
    ]
    for name in ("cpu", "reference"):
        with fd.use_backend(name):
            for call in calls:
                chosen.clear()
                for _ in range(times):
                    call()
                assert len(chosen) == times


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_compiled_code_asks_whenever_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once, it follows the choice of the thread it runs in, without being compiled again."""
    torch._dynamo.reset()
    compiled = torch.compile(fd.distribution_matching_loss, backend="aot_eager", fullgraph=True)
    x, teacher, fake = (torch.randn(3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    served: list[str] = []
    kernels = backends.kernels
    monkeypatch.setattr(backends, "kernels", lambda name: (served.append(name), kernels(name))[1])
    expected = compiled(x, teacher, fake)
    assert served == ["cpu"]
    with torch._dynamo.config.patch(error_on_recompile=True), fd.use_backend(name):
        torch.testing.assert_close(compiled(x, teacher, fake), expected)
        assert served == ["cpu", name]
    torch._dynamo.reset()


FIRST_CALLS = """
import importlib.abc, importlib.machinery, sys, threading, time
import torch, fdistill_ops as fd

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("fdistill_ops._C"):
            time.sleep(0.5)
        return None

sys.meta_path.insert(0, Slow())
together, seen = threading.Barrier(4, timeout=60), []

def first(x=torch.ones(2, 3)):
    together.wait()
    with fd.use_backend("cpu"):
        fd.distribution_matching_loss(x, x, x + 1)
    seen.append(fd.build_info()["compiled"])

threads = [threading.Thread(target=first) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(seen)
"""


def test_first_calls_of_several_threads_wait_for_the_compiled_module() -> None:
    """Those that came while another was importing it were told that it is not available: None."""
    run = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout.strip()) == (0, str([True] * 4)), run.stderr
