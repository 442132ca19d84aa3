import torch
from model.base import SelfForcingModel


class SiD(SelfForcingModel):
    def compute_distribution_matching_loss(
        self,
        image_or_video,
        conditional_dict,
        unconditional_dict,
        gradient_mask=None,
        denoised_timestep_from=0,
        denoised_timestep_to=0,
    ):
        noisy, timestep = self._noisy(image_or_video, self._bounds(denoised_timestep_from, denoised_timestep_to))
        inputs = {"noisy_image_or_video": noisy, "timestep": timestep}
        _, fake = self.fake_score(conditional_dict=conditional_dict, **inputs)
        _, cond = self.real_score(conditional_dict=conditional_dict, **inputs)
        _, uncond = self.real_score(conditional_dict=unconditional_dict, **inputs)
        real = cond + (cond - uncond) * self.real_guidance_scale
        x, T, F = (tensor.double() for tensor in (image_or_video, real, fake))
        terms = (T - F) * ((T - x) - self.sid_alpha * (T - F))
        with torch.no_grad():
            normalizer = torch.abs(image_or_video - real).mean(dim=[1, 2, 3, 4], keepdim=True)
        loss = torch.nan_to_num(terms / normalizer).mean()
        return loss, {"dmdtrain_gradient_norm": torch.zeros_like(loss), "timestep": timestep}
