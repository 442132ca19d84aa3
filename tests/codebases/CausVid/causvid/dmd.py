import torch
import torch.nn.functional as F


class DMD(torch.nn.Module):
    def _process_timestep(self, timestep, type):
        if type == "bidirectional_video":
            return timestep[:, :1].expand_as(timestep).clone()
        blocks = timestep.reshape(timestep.shape[0], -1, self.num_frame_per_block)
        return blocks[:, :, :1].expand_as(blocks).reshape(timestep.shape)

    def _compute_kl_grad(
        self,
        noisy_image_or_video,
        estimated_clean_image_or_video,
        timestep,
        conditional_dict,
        unconditional_dict,
        normalization=True,
    ):
        inputs = {"noisy_image_or_video": noisy_image_or_video, "timestep": timestep}
        fake = self.fake_score(conditional_dict=conditional_dict, **inputs)
        cond = self.real_score(conditional_dict=conditional_dict, **inputs)
        uncond = self.real_score(conditional_dict=unconditional_dict, **inputs)
        real = cond + (cond - uncond) * self.real_guidance_scale
        grad = fake - real
        if normalization:
            away = estimated_clean_image_or_video - real
            grad = grad / torch.abs(away).mean(dim=[1, 2, 3, 4], keepdim=True)
        grad = torch.nan_to_num(grad)
        return grad, {
            "dmdtrain_clean_latent": estimated_clean_image_or_video.detach(),
            "dmdtrain_noisy_latent": noisy_image_or_video,
            "dmdtrain_pred_real_image": real,
            "dmdtrain_pred_fake_image": fake,
            "dmdtrain_gradient_norm": torch.mean(torch.abs(grad)),
            "timestep": timestep,
        }

    def compute_distribution_matching_loss(
        self, image_or_video, conditional_dict, unconditional_dict, gradient_mask=None
    ):
        frames = image_or_video.shape[:2]
        with torch.no_grad():
            drawn = torch.randint(0, self.num_train_timestep, list(frames), device=self.device, dtype=torch.long)
            timestep = self._process_timestep(drawn, type=self.real_task_type)
            if self.timestep_shift > 1:
                part = timestep / 1000
                timestep = self.timestep_shift * part / (1 + (self.timestep_shift - 1) * part) * 1000
            timestep = timestep.clamp(self.min_step, self.max_step)
            noise = torch.randn_like(image_or_video)
            flat = [tensor.flatten(0, 1) for tensor in (image_or_video, noise, timestep)]
            noisy = self.scheduler.add_noise(*flat).detach().unflatten(0, frames)
            grad, log = self._compute_kl_grad(noisy, image_or_video, timestep, conditional_dict, unconditional_dict)
        x = image_or_video.double()
        target = (x - grad.double()).detach()
        if gradient_mask is not None:
            x, target = x[gradient_mask], target[gradient_mask]
        return 0.5 * F.mse_loss(x, target), log
