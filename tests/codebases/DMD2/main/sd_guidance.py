import torch
import torch.nn.functional as F
from main.utils import get_x0_from_noise


def predict_noise(
    unet,
    noisy_latents,
    text_embeddings,
    uncond_embedding,
    timesteps,
    guidance_scale=1.0,
    unet_added_conditions=None,
    uncond_unet_added_conditions=None,
):
    added = unet_added_conditions
    if not guidance_scale > 1:
        return unet(noisy_latents, timesteps, text_embeddings, added_cond_kwargs=added).sample
    if added is not None:
        added = {key: torch.cat([uncond_unet_added_conditions[key], added[key]]) for key in added}
    embeddings = torch.cat([uncond_embedding, text_embeddings])
    both = unet(torch.cat([noisy_latents] * 2), torch.cat([timesteps] * 2), embeddings, added_cond_kwargs=added).sample
    uncond, text = both.chunk(2)
    return uncond + guidance_scale * (text - uncond)


class SDGuidance(torch.nn.Module):
    def compute_distribution_matching_loss(
        self, latents, text_embedding, uncond_embedding, unet_added_conditions, uncond_unet_added_conditions
    ):
        with torch.no_grad():
            end = min(self.max_step + 1, self.num_train_timesteps)
            timesteps = torch.randint(self.min_step, end, [latents.shape[0]], device=latents.device, dtype=torch.long)
            noisy = self.scheduler.add_noise(latents, torch.randn_like(latents), timesteps)
            conditions = (text_embedding, uncond_embedding, unet_added_conditions, uncond_unet_added_conditions)

            def image(unet, seen, text, uncond, added, added_uncond, scale):
                noise = predict_noise(unet, seen, text, uncond, timesteps, scale, added, added_uncond)
                return get_x0_from_noise(noisy.double(), noise.double(), self.alphas_cumprod.double(), timesteps)

            fake = image(self.fake_unet, noisy, *conditions, self.fake_guidance_scale)
            seen = noisy
            if self.use_fp16:
                half = torch.bfloat16
                text, uncond, *added = conditions
                if self.sdxl:
                    added = [{key: value.to(half) for key, value in entry.items()} for entry in added]
                seen, conditions = noisy.to(half), (text.to(half), uncond.to(half), *added)
            real = image(self.real_unet, seen, *conditions, self.real_guidance_scale)
            away = latents - real
            grad = (away - (latents - fake)) / away.abs().mean(dim=[1, 2, 3], keepdim=True)
            grad = torch.nan_to_num(grad)
        loss = 0.5 * F.mse_loss(latents.float(), (latents - grad).detach().float())
        return {"loss_dm": loss}, {
            "dmtrain_noisy_latents": noisy.float(),
            "dmtrain_pred_real_image": real.float(),
            "dmtrain_pred_fake_image": fake.float(),
            "dmtrain_grad": grad.float(),
            "dmtrain_gradient_norm": torch.norm(grad).item(),
        }
