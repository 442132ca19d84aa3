"""FDistillLoss on two processes with batches of unequal size: weights and histogram of the whole batch."""

from __future__ import annotations

import os
import tempfile

import torch
import torch.multiprocessing as mp

import fdistill_ops as fd

PARTS = (slice(0, 5), slice(5, 8))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(8, 3), torch.rand(8)


def criterion() -> fd.FDistillLoss:
    return fd.FDistillLoss("js", histogram=fd.RatioHistogram(0.0, 1.0, bins=4, ema_rate=0.9))


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module = criterion()
    logits, t = (tensor[PARTS[rank]] for tensor in inputs())
    weights = module.weights(logits, t)  # one all-reduce for the histogram, one for the mean
    torch.save((weights, module.histogram.bins), os.path.join(folder, str(rank)))
    torch.distributed.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, args=(folder,), nprocs=2)
        (first, bins), (second, other_bins) = (torch.load(os.path.join(folder, str(rank))) for rank in range(2))
    alone = criterion()
    expected = alone.weights(*inputs())
    print("rank 0:", first)
    print("rank 1:", second)
    print("one process:", expected)
    torch.testing.assert_close(torch.cat([first, second]), expected)
    torch.testing.assert_close(bins, alone.histogram.bins)
    assert torch.equal(bins, other_bins)


if __name__ == "__main__":
    main()
