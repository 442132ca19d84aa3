import torch


class SID_EDMLoss:
    def generator_loss(self, true_score, fake_score, images, labels=None, augment_pipe=None, alpha=1.2, tmax=800):
        rho, low, high = 7.0, 0.002 ** (1 / 7.0), 80 ** (1 / 7.0)
        time = torch.rand([images.shape[0], 1, 1, 1], device=images.device) * tmax / 1000
        sigma = (high + (1 - time) * (low - high)) ** rho
        y, augment = images, torch.zeros(images.shape[0], 9).to(images.device)
        if augment_pipe is not None:
            y, augment = augment_pipe(images)
        noisy = y + torch.randn_like(y) * sigma
        real = true_score(noisy, sigma, labels, augment_labels=augment)
        fake = fake_score(noisy, sigma, labels, augment_labels=augment)
        bad = [torch.isnan(tensor).flatten(1).any(1) for tensor in (y, real, fake)]
        bad = bad[0] | bad[1] | bad[2]
        if bad.any():
            y, real, fake = y[~bad], real[~bad], fake[~bad]
        with torch.no_grad():
            distance = abs(y - real).to(torch.float32).mean(dim=[1, 2, 3], keepdim=True).clip(min=1e-5)
        return (real - fake) * ((real - y) - alpha * (real - fake)) / distance
