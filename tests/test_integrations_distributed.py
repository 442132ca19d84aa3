"""FastGen's weights on two processes (gloo): those of one process on the whole batch, with half the collectives."""

from __future__ import annotations

import datetime
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from integration_cases import importable
from test_integrations import batch, fdistill_model

from fdistill_ops.integrations import Deferred, fastgen
from fdistill_ops.testing import assert_close

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

SPLITS = {"even": (8, 8), "uneven": (11, 5)}


def weights(part: slice, patched: bool) -> tuple[torch.Tensor, torch.Tensor, list[torch.Size]]:
    """Two steps on a part of the batches: the last weights, the histogram, the shapes that were reduced."""
    reduced: list[torch.Size] = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        reduced.append(tensor.shape)
        return all_reduce(tensor, *args, **kwargs)

    with importable("FastGen", "restated"):
        model = fdistill_model(importlib.import_module("fastgen.methods.distribution_matching.f_distill"), "kl")
        if patched:
            fastgen.patch(strict=False)
        torch.distributed.all_reduce = counted
        try:
            for step in range(2):
                logits, t = batch(step)
                reduced.clear()
                h = model._get_f_div_weighting_h(logits[part], t[part])
        finally:
            torch.distributed.all_reduce = all_reduce
            fastgen.unpatch()
    return h, model.net.bins, reduced


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/rendezvous"
    timeout = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=timeout)
    try:
        results = {}
        for name, (first, _) in SPLITS.items():
            part = slice(0, first) if rank == 0 else slice(first, None)
            results[name] = weights(part, patched=True)
        results["original"] = weights(slice(0, 8) if rank == 0 else slice(8, None), patched=False)
        deferred = Deferred(lambda: torch.full((2,), float(rank)), (2,), torch.float32, torch.device("cpu"))
        gathered = [torch.empty(2) for _ in range(2)]
        torch.distributed.all_gather(gathered, deferred)  # as trainers gather what they log
        assert torch.stack(gathered).tolist() == [[0, 0], [1, 1]]
        torch.save({name: (h, bins, len(reduced)) for name, (h, bins, reduced) in results.items()}, f"{folder}/{rank}")
    finally:
        torch.distributed.destroy_process_group()


def test_fastgen_on_two_ranks(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2, join=True)
    first, second = (torch.load(os.path.join(tmp_path, str(rank))) for rank in range(2))
    whole, bins, reduced = weights(slice(None), patched=True)
    assert reduced == []
    for name in SPLITS:
        assert_close(torch.cat([first[name][0], second[name][0]]), whole.double(), ulps=4, what=name)
        assert_close(first[name][1], bins.double(), ulps=2, what=name)
        assert torch.equal(first[name][1], second[name][1])
        assert first[name][2] == second[name][2] == 2
    assert first["original"][2] == 3
    assert_close(first["even"][0], first["original"][0].double(), ulps=32)
