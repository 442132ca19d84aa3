"""Two and four processes (gloo) and the concatenated batch: the same histogram, the same weights."""

from __future__ import annotations

import datetime
import os
import tempfile
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

# Samples per rank, for each step: the last batch of an epoch may be short, and leave ranks with nothing.
SPLITS = {
    2: {
        "even": ((4, 4), (4, 4), (4, 4)),
        "uneven": ((6, 2), (6, 2), (6, 2)),
        "short last batch": ((4, 4), (4, 4), (3, 0)),
    },
    4: {
        "even": ((2, 2, 2, 2), (2, 2, 2, 2), (2, 2, 2, 2)),
        "uneven": ((1, 4, 1, 2), (1, 4, 1, 2), (1, 4, 1, 2)),
        "short last batch": ((2, 2, 2, 2), (2, 2, 2, 2), (2, 2, 1, 0)),
    },
}
STEPS = 3
COLLECTIVES = "collectives"


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


def part(values: dict[str, torch.Tensor], split: tuple[int, ...], rank: int | None) -> dict[str, torch.Tensor]:
    """A rank's samples; None: those of all ranks."""
    start, end = (0, sum(split)) if rank is None else (sum(split[:rank]), sum(split[: rank + 1]))
    return {name: value[start:end] for name, value in values.items()}


def weights_of(batch: dict[str, torch.Tensor], histogram: fd.RatioHistogram, group: Any) -> torch.Tensor:
    return fd.f_weights(batch["logits"], batch["t"], histogram=histogram, divergence="kl", group=group)


class Counted:
    """How many collectives this process took part in."""

    def __init__(self) -> None:
        self.n = 0
        reduce = torch.distributed.all_reduce

        def all_reduce(*args: Any, **kwargs: Any) -> Any:
            self.n += 1
            return reduce(*args, **kwargs)

        torch.distributed.all_reduce = all_reduce

    def since(self) -> int:
        n, self.n = self.n, 0
        return n


def scenario(world: int, backend: str, rank: int | None, group: Any, counted: Counted | None = None) -> dict[str, Any]:
    """Everything that is compared: on a rank's part of every batch, or (None) on all of it."""
    results: dict[str, Any] = {}

    def note(key: str) -> None:
        if counted:
            results.setdefault(f"{key} {COLLECTIVES}", []).append(counted.since())

    with fd.use_backend(backend):
        for name, splits in SPLITS[world].items():
            histogram = fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.7)
            module = fd.FDistillLoss(
                "js", histogram=fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.7), reduction="sample"
            )
            for step, split in enumerate(splits):
                batch = part(inputs(step), split, rank)
                results[f"{name} {step} weights"] = weights_of(batch, histogram, group)
                results[f"{name} {step} bins"] = histogram.bins.clone()
                note("histogram and mean")
                x = batch.pop("x").clone().requires_grad_()
                loss = module(x, **batch)
                note("module")
                results[f"{name} {step} loss"] = loss.detach()
                results[f"{name} {step} gradient"] = torch.autograd.grad(loss.sum(), x)[0]
                results[f"{name} {step} module bins"] = module.histogram.bins.clone()
                results[f"{name} {step} module weights"] = module.eval().weights(batch["logits"], batch["t"])
                note("eval")
                module.train()
            batch = part(inputs(9), splits[-1], rank)
            results[f"{name} eval loss"] = module.eval()(batch.pop("x"), **batch)
            results[f"{name} eval bins"] = module.histogram.bins.clone()
            note("eval")
            logits = part(inputs(10), splits[-1], rank)["logits"]
            results[f"{name} bare weights"] = fd.f_weights(logits, group=group)
            note("mean")
            results[f"{name} raw weights"] = fd.f_weights(logits, normalize=None, group=group)
            note("nothing")
    return results


def worker(rank: int, world: int, backend: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        everyone = torch.distributed.group.WORLD
        counted = Counted()
        results = scenario(world, backend, rank, everyone, counted)
        with fd.use_backend(backend):
            # A rank with wrong arguments raises before it would wait for the others, and keeps its histogram.
            histogram = fd.RatioHistogram(0.0, 1.0)
            try:
                fd.f_weights(torch.randn(3), histogram=histogram, group=everyone)
            except ValueError as error:
                results["refused"] = str(error)
            results["refused bins"] = histogram.bins.clone()
            results["no group"] = fd.f_weights(torch.linspace(-1, 1, 4 + rank))
            groups = [torch.distributed.new_group([member]) for member in range(world)]
            counted.since()
            logits, t = torch.linspace(-1, 1, 4 + rank), torch.full((4 + rank,), 0.3)
            results["group of one"] = weights_of({"logits": logits, "t": t}, fd.RatioHistogram(0.0, 1.0), groups[rank])
            results[f"group of one {COLLECTIVES}"] = [counted.since()]
            try:
                fd.f_weights(logits, group=groups[rank - 1])
            except TypeError as error:
                results["no member"] = str(error)
        torch.save(results, os.path.join(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Results of all ranks, per back end and number of ranks, computed once."""
    return {}


@pytest.fixture(params=list(SPLITS), ids=lambda world: f"{world} ranks")
def ranks(
    request: pytest.FixtureRequest, backend: Backend, runs: dict[tuple[str, int], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    if backend.device != "cpu":
        pytest.skip("gloo runs on CPU tensors")
    key = (backend.name, request.param)
    if key not in runs:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, args=(request.param, backend.name, folder), nprocs=request.param, join=True)
            runs[key] = [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(request.param)]
    return runs[key]


def test_ranks_equal_one_process(backend: Backend, ranks: list[dict[str, Any]]) -> None:
    whole = scenario(len(ranks), backend.name, None, None)
    assert whole.keys() <= ranks[0].keys()
    for key, want in whole.items():
        if key.endswith("bins"):
            for results in ranks[1:]:
                assert torch.equal(results[key], ranks[0][key]), f"{key}: the ranks disagree"
            assert_close(ranks[0][key], want, ulps=2, what=key)
        else:
            assert_close(torch.cat([results[key] for results in ranks]), want, ulps=4, what=key)


def test_collectives_are_packed(ranks: list[dict[str, Any]]) -> None:
    """One for the histogram, one for the mean, and none that is not needed."""
    wanted = {"histogram and mean": 2, "module": 2, "eval": 1, "mean": 1, "nothing": 0, "group of one": 0}
    for results in ranks:
        counts = {key.removesuffix(f" {COLLECTIVES}"): n for key, n in results.items() if key.endswith(COLLECTIVES)}
        assert counts.keys() == wanted.keys()
        for key, n in wanted.items():
            assert set(counts[key]) == {n}, key


def test_errors_and_no_group(ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(ranks):
        assert "t is missing" in results["refused"]
        assert results["refused bins"].tolist() == [1.0] * 10
        assert torch.equal(results["no group"], fd.f_weights(torch.linspace(-1, 1, 4 + rank)))
        batch = {"logits": torch.linspace(-1, 1, 4 + rank), "t": torch.full((4 + rank,), 0.3)}
        assert torch.equal(results["group of one"], weights_of(batch, fd.RatioHistogram(0.0, 1.0), None))
        assert "group must be a process group" in results["no member"]


def test_group_of_the_wrong_type(backend: Backend) -> None:
    histogram = fd.RatioHistogram(0.0, 1.0)
    for group in ("world", 3):
        with pytest.raises(TypeError, match="group must be"):
            fd.f_weights(torch.zeros(2), torch.zeros(2), histogram=histogram, group=group)
        x = torch.randn(2, 3)
        with pytest.raises(TypeError, match="group must be"):
            fd.f_distill_loss(x, x, x, torch.zeros(2), torch.zeros(2), histogram=histogram, group=group)
    assert histogram.bins.tolist() == [1.0] * 10
