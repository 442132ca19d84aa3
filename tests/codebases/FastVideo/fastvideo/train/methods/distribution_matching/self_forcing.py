import torch
from fastvideo.train.methods.distribution_matching.dmd2 import DMD2Method, get_optional_float, loss_of

__all__ = ["SelfForcingMethod", "get_optional_float"]


class SelfForcingMethod(DMD2Method):
    def _sf_add_noise(self, clean, noise, time):
        return self.student.add_noise(clean, noise, time)

    def _predict_x0_with_scheduler(self, model, noisy, time, batch, *, conditional, attn_kind):
        return model.predict_x0(noisy, time, batch, conditional=conditional, cfg_uncond=None, attn_kind=attn_kind)

    def _dmd_loss(self, generator_pred_x0, batch):
        x, steps = generator_pred_x0, int(self.student.num_train_timesteps)
        with torch.no_grad():
            time = torch.randint(0, steps, [1], device=x.device, dtype=torch.long, generator=self.cuda_generator)
            time = self.student.shift_and_clamp_timestep(time)
            noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=self.cuda_generator)
            noisy = self._sf_add_noise(x, noise, time)
            models = [(self.critic, True), (self.teacher, True), (self.teacher, False)]
            fake, cond, uncond = (
                self._predict_x0_with_scheduler(model, noisy, time, batch, conditional=given, attn_kind="dense")
                for model, given in models
            )
        return loss_of(x, cond, uncond, fake, self._scale())
