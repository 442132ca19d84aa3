"""Your own code base on fdistill_ops without editing it: the machinery behind ``patch()``.

The "code base" is a package of two modules that this script makes; the second has imported the loss by name.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops.integrations import Patch, Target, fingerprint

LOSS = """
import torch.nn.functional as F

def dmd_loss(x, teacher, fake):
    distance = (x - teacher).abs().mean((1, 2, 3), keepdim=True).detach()
    return 0.5 * F.mse_loss(x, (x - (fake - teacher) / distance).detach())
"""
TRAIN = """
from your_code.loss import dmd_loss

def step(x, teacher, fake):
    loss = dmd_loss(x, teacher, fake)
    loss.backward()
    return loss
"""


def dmd_loss(x: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    return fd.distribution_matching_loss(x, teacher, fake, eps=0.0)


# The version that is accepted, by the fingerprint that is printed below; anything else is refused.
PATCH = Patch(
    "your code",
    [Target("your_code.loss", "dmd_loss", "x teacher fake", replacement=dmd_loss)],
    known={"your_code.loss.dmd_loss": {"8a7a62239ea00f58": "the version of this script"}},
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "your_code"
        package.mkdir()
        (package / "loss.py").write_text(LOSS)
        (package / "train.py").write_text(TRAIN)
        sys.path.insert(0, folder)
        from your_code.loss import dmd_loss as original  # type: ignore[import-not-found]
        from your_code.train import step  # type: ignore[import-not-found]

        print(f"the original is {fingerprint(original)}")

        torch.manual_seed(0)
        x = torch.randn(4, 3, 16, 16, requires_grad=True)
        teacher, fake = torch.randn(2, 4, 3, 16, 16)
        before = step(x, teacher, fake)
        with PATCH.apply() as patched:
            print(patched)
            after = step(x, teacher, fake)
        print(f"loss before {before.item():.6f}, patched {after.item():.6f}")
        torch.testing.assert_close(after, before)


if __name__ == "__main__":
    main()
