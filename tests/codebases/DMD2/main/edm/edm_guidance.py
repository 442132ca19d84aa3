import torch
import torch.nn.functional as F


class EDMGuidance(torch.nn.Module):
    def compute_distribution_matching_loss(self, latents, labels):
        with torch.no_grad():
            end = min(self.max_step + 1, self.num_train_timesteps)
            timesteps = torch.randint(
                self.min_step, end, [latents.shape[0], 1, 1, 1], device=latents.device, dtype=torch.long
            )
            noise = torch.randn_like(latents)
            sigma = self.karras_sigmas[timesteps]
            noisy = latents + sigma * noise
            real = self.real_unet(noisy, sigma, labels)
            fake = self.fake_unet(noisy, sigma, labels)
            away = latents - real
            grad = (away - (latents - fake)) / away.abs().mean(dim=[1, 2, 3], keepdim=True)
            grad = torch.nan_to_num(grad)
        loss = 0.5 * F.mse_loss(latents, (latents - grad).detach())
        return {"loss_dm": loss}, {
            "dmtrain_noisy_latents": noisy,
            "dmtrain_pred_real_image": real,
            "dmtrain_pred_fake_image": fake,
            "dmtrain_grad": grad,
            "dmtrain_gradient_norm": torch.norm(grad).item(),
            "dmtrain_timesteps": timesteps,
        }
