"""Two processes (gloo) and the concatenated batch: the same histogram, the same weights."""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from conftest import Backend

import fdistill_ops as fd
from fdistill_ops.testing import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

SPLITS = {"even": (4, 4), "uneven": (6, 2), "one empty": (8, 0)}
STEPS = 3


def inputs(step: int) -> dict[str, torch.Tensor]:
    """The whole batch of a step; one logit and one time in it are NaN."""
    generator = torch.Generator().manual_seed(step)
    made = {name: torch.randn(8, 3, 5, generator=generator) for name in ("x", "teacher", "fake")}
    made["logits"] = 3 * torch.randn(8, 2, generator=generator)
    made["t"] = torch.rand(8, generator=generator, dtype=torch.float64)
    if step == 1:
        made["logits"][3, 1] = torch.nan
        made["t"][7] = torch.nan
    return made


def part(values: dict[str, torch.Tensor], split: tuple[int, int], rank: int) -> dict[str, torch.Tensor]:
    start = 0 if rank == 0 else split[0]
    return {name: value[start : start + split[rank]] for name, value in values.items()}


def weights_of(batch: dict[str, torch.Tensor], histogram: fd.RatioHistogram, group: Any) -> torch.Tensor:
    return fd.f_weights(batch["logits"], batch["t"], histogram=histogram, divergence="kl", group=group)


def scenario(
    rank: int, backend: str, group: Any, choose: Callable[[dict[str, torch.Tensor], int], Any]
) -> dict[str, Any]:
    """Everything that is compared; ``choose`` takes this rank's part of a batch."""
    results: dict[str, Any] = {}
    with fd.use_backend(backend):
        for split in SPLITS:
            histogram = fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.7)
            module = fd.FDistillLoss(
                "js", histogram=fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.7), reduction="sample"
            )
            for step in range(STEPS):
                batch = choose(inputs(step), split)
                results[f"{split} {step} weights"] = weights_of(batch, histogram, group)
                results[f"{split} {step} bins"] = histogram.bins.clone()
                x = batch.pop("x").clone().requires_grad_()
                loss, stats = module(x, **batch, return_stats=True)
                results[f"{split} {step} loss"] = loss.detach()
                results[f"{split} {step} gradient"] = torch.autograd.grad(loss.sum(), x)[0]
                results[f"{split} {step} module bins"] = module.histogram.bins.clone()
                results[f"{split} {step} clipped"] = stats.clipped_low.clone()
            module.eval()
            batch = choose(inputs(9), split)
            results[f"{split} eval loss"] = module(batch.pop("x"), **batch)
            results[f"{split} eval bins"] = module.histogram.bins.clone()
            bare = choose(inputs(10), split)
            results[f"{split} bare weights"] = fd.f_weights(bare["logits"], group=group)
    return results


def worker(rank: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        world = torch.distributed.group.WORLD
        results = scenario(rank, backend, world, lambda batch, split: part(batch, SPLITS[split], rank))
        with fd.use_backend(backend):
            # A rank with wrong arguments raises before it would wait for the others, and keeps its histogram.
            histogram = fd.RatioHistogram(0.0, 1.0)
            try:
                fd.f_weights(torch.randn(3), histogram=histogram, group=world)
            except ValueError as error:
                results["refused"] = str(error)
            results["refused bins"] = histogram.bins
            alone = fd.f_weights(torch.linspace(-1, 1, 4 + rank))
            results["no group"] = alone
        torch.save(results, os.path.join(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    """Results of both ranks, per back end, computed once."""
    return {}


def both_ranks(runs: dict[str, list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    if name not in runs:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, args=(name, folder), nprocs=2, join=True)
            runs[name] = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(2)]
    return runs[name]


def test_two_processes_equal_one(backend: Backend, runs: dict[str, list[dict[str, Any]]]) -> None:
    if backend.device != "cpu":
        pytest.skip("gloo runs on CPU tensors")
    first, second = both_ranks(runs, backend.name)
    whole = scenario(0, backend.name, None, lambda batch, split: batch)
    for key, want in whole.items():
        what = key.rsplit(" ", 1)[-1]
        if what == "bins":
            assert torch.equal(first[key], second[key]), f"{key}: the ranks disagree"
            assert_close(first[key], want, ulps=2, what=key)
        elif what == "clipped":
            continue
        else:
            assert_close(torch.cat([first[key], second[key]]), want, ulps=4, what=key)


def test_errors_and_no_group(backend: Backend, runs: dict[str, list[dict[str, Any]]]) -> None:
    if backend.device != "cpu":
        pytest.skip("gloo runs on CPU tensors")
    for rank, results in enumerate(both_ranks(runs, backend.name)):
        assert "t is missing" in results["refused"]
        assert results["refused bins"].tolist() == [1.0] * 10
        assert torch.equal(results["no group"], fd.f_weights(torch.linspace(-1, 1, 4 + rank)))
