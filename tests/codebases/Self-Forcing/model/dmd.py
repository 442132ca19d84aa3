import torch
import torch.nn.functional as F
from model.base import SelfForcingModel


class DMD(SelfForcingModel):
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
        _, fake = self.fake_score(conditional_dict=conditional_dict, **inputs)
        if self.fake_guidance_scale != 0.0:
            _, uncond = self.fake_score(conditional_dict=unconditional_dict, **inputs)
            fake = fake + (fake - uncond) * self.fake_guidance_scale
        _, cond = self.real_score(conditional_dict=conditional_dict, **inputs)
        _, uncond = self.real_score(conditional_dict=unconditional_dict, **inputs)
        real = cond + (cond - uncond) * self.real_guidance_scale
        grad = fake - real
        if normalization:
            away = estimated_clean_image_or_video - real
            grad = grad / torch.abs(away).mean(dim=[1, 2, 3, 4], keepdim=True)
        grad = torch.nan_to_num(grad)
        return grad, {"dmdtrain_gradient_norm": torch.mean(torch.abs(grad)), "timestep": timestep}

    def compute_distribution_matching_loss(
        self,
        image_or_video,
        conditional_dict,
        unconditional_dict,
        gradient_mask=None,
        denoised_timestep_from=0,
        denoised_timestep_to=0,
    ):
        bounds = self._bounds(denoised_timestep_from, denoised_timestep_to)
        return self._matching(bounds, image_or_video, conditional_dict, unconditional_dict, gradient_mask)

    def _matching(self, bounds, image_or_video, conditional_dict, unconditional_dict, gradient_mask):
        with torch.no_grad():
            noisy, timestep = self._noisy(image_or_video, bounds)
            grad, log = self._compute_kl_grad(noisy, image_or_video, timestep, conditional_dict, unconditional_dict)
        x = image_or_video.double()
        target = (x - grad.double()).detach()
        if gradient_mask is not None:
            x, target = x[gradient_mask], target[gradient_mask]
        return 0.5 * F.mse_loss(x, target), log
