"""A small set of calls that reaches every kernel once, for compute-sanitizer; with ``--large`` one call for ncu."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch

import fdistill_ops as fd

DEVICE = "cuda"
SHAPES = ((3, 1000), (2, 3, 64, 64), (1, 4, 300, 400), (2, 37))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def calls(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B = shape[0]
    x, teacher, fake, uncond, x_t = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(5))
    x.requires_grad_()
    logits, t = torch.randn(B, device=DEVICE), torch.rand(B, device=DEVICE)
    histogram = fd.RatioHistogram(0.0, 1.0).to(DEVICE)
    mask = torch.rand(shape, device=DEVICE) > 0.5
    schedule = {"prediction": "v", "x_t": x_t, "alpha": t + 0.5, "sigma": 0.4}
    variants: tuple[dict[str, Any], ...] = (
        {},
        {"mask": mask, "return_stats": True},
        {"teacher_uncond": uncond, "guidance_scale": 3.0, **schedule},
        {"normalizer": None, "reduction": "sample"},
    )
    for arguments in variants:
        found = fd.f_distill_loss(x, teacher, fake, logits, t, histogram=histogram, **arguments)
        loss = found[0] if isinstance(found, tuple) else found
        (loss.sum() * 0.5).backward()
    strided = teacher.transpose(-1, -2).contiguous().transpose(-1, -2)
    fd.distribution_matching_loss(x, strided, fake.float()).backward()
    fd.distribution_matching_loss(x, teacher.float(), fake).backward()
    fd.distribution_matching_loss(x, teacher.float(), fake, mask=mask).backward()
    fd.score_identity_loss(x, teacher, fake, mask=mask).backward()
    fd.f_weights(torch.randn(3000, 2, device=DEVICE))
    torch.cuda.synchronize()


def main() -> None:
    if "--large" in sys.argv:
        x, teacher, fake = (torch.randn(256, 4, 128, 128, device=DEVICE) for _ in range(3))  # 64 MiB
        with fd.use_backend("cuda"):
            fd.f_distill_loss(x.requires_grad_(), teacher, fake, torch.randn(256, device=DEVICE))
        torch.cuda.synchronize()
        return
    with fd.use_backend("cuda"):
        for shape, dtype in itertools.product(SHAPES, DTYPES):
            calls(shape, dtype)


if __name__ == "__main__":
    main()
