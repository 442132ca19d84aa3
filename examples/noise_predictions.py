"""A generator trained by DMD2's loss on noise predictions, with guidance: nothing is converted to x0 by hand.

The "networks" are the exact noise predictions of Gaussians, so that the result is known: with the guidance scale s the
generator's mean moves to uncond + s * (cond - uncond).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill_ops.integrations.dmd2 import noise_matching_loss

STEPS, SCALE, EVERY = 300, 3.0, 100
alphas_cumprod = torch.linspace(0.999, 0.01, 1000)
shape = (64, 4, 8, 8)
cond, uncond = 0.5, 0.2


def noise_of(noisy: Tensor, mean: Tensor | float, timesteps: Tensor) -> Tensor:
    """The noise that a network which knows the distribution N(mean, 1) predicts."""
    alpha, sigma = (f.sqrt().reshape(-1, 1, 1, 1) for f in (alphas_cumprod[timesteps], 1 - alphas_cumprod[timesteps]))
    return sigma * (noisy - alpha * mean)


def main() -> float:
    torch.manual_seed(0)
    shift = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([shift], lr=0.02)
    for step in range(1, STEPS + 1):
        latents = torch.randn(shape) + shift
        with torch.no_grad():
            timesteps = torch.randint(20, 980, shape[:1])
            power = alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
            noisy = power.sqrt() * latents + (1 - power).sqrt() * torch.randn(shape)
            fake = noise_of(noisy, shift, timesteps)
            real, real_uncond = (noise_of(noisy, mean, timesteps) for mean in (cond, uncond))
        loss, stats = noise_matching_loss(
            latents,
            noisy,
            real,
            fake,
            alphas_cumprod,
            timesteps,
            real_noise_uncond=real_uncond,
            guidance_scale=SCALE,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:  # the only copies to the host
            print(f"step {step}: mean {shift.item():.3f}, gradient norm {stats.grad_norm.item():.1f}")
    return shift.item()


if __name__ == "__main__":
    mean = main()
    expected = uncond + SCALE * (cond - uncond)
    print(f"mean {mean:.3f}, expected {expected:.3f}")
    assert abs(mean - expected) < 0.05
