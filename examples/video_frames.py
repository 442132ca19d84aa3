"""One call for video as it comes: flow predictions, a time for every frame, guidance, the first frames left out.

Prints the loss and the gradient beside the lines of PyTorch that the call stands for.
"""

from __future__ import annotations

import torch

import fdistill_ops as fd

B, F, C, H, W = 2, 6, 4, 16, 16
SCALE = 3.5  # cond + SCALE * (cond - uncond): an offset of 1 to guidance_scale


def main() -> None:
    torch.manual_seed(0)
    video = torch.randn(B, F, C, H, W, requires_grad=True)
    x_t, flow_cond, flow_uncond, flow_fake = torch.randn(4, B, F, C, H, W)
    t = torch.rand(B, F, dtype=torch.float64)  # x_t = (1 - t) x0 + t noise; flow = noise - x0
    mask = torch.ones(B, F, C, H, W, dtype=torch.bool)
    mask[:, :2] = False

    loss = fd.distribution_matching_loss(
        video,
        flow_cond,
        flow_fake,
        teacher_uncond=flow_uncond,
        guidance_scale=1 + SCALE,
        prediction="flow",
        x_t=x_t,
        alpha=1 - t,
        sigma=t,
        mask=mask,
        eps=0.0,
    )
    (gradient,) = torch.autograd.grad(loss, video)

    with torch.no_grad():
        sigma = t[:, :, None, None, None]
        cond, uncond, fake = (x_t - sigma * flow for flow in (flow_cond, flow_uncond, flow_fake))
        real = cond + SCALE * (cond - uncond)
        distance = (video - real).abs().mean((1, 2, 3, 4), keepdim=True)
        target = video - (fake - real) / distance
    expected = 0.5 * torch.nn.functional.mse_loss(video.double()[mask], target[mask])
    (expected_gradient,) = torch.autograd.grad(expected, video)

    print(f"loss {loss.item():.6f}, by hand {expected.item():.6f}")
    difference = (gradient - expected_gradient).norm() / expected_gradient.norm()
    print(f"gradients differ by {difference.item():.1e}; on the first frames {gradient[:, :2].abs().max().item()}")
    torch.testing.assert_close(loss.double(), expected)
    torch.testing.assert_close(gradient, expected_gradient)


if __name__ == "__main__":
    main()
