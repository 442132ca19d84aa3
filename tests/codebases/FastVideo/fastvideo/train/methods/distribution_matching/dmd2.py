import torch
import torch.nn.functional as F


def get_optional_float(mapping, key, *, where):
    return None if mapping.get(key) is None else float(mapping[key])


def loss_of(x, cond, uncond, fake, scale):
    with torch.no_grad():
        real = uncond + (cond - uncond) * scale
        g = torch.nan_to_num((fake - real) / torch.abs(x - real).mean())
    return 0.5 * F.mse_loss(x.float(), (x.float() - g.float()).detach())


class DMD2Method(torch.nn.Module):
    def _scale(self):
        scale = get_optional_float(self.method_config, "real_score_guidance_scale", where="method")
        return 1.0 if scale is None else scale

    def _sample_score_timestep(self, device):
        steps = int(self.student.num_train_timesteps)
        drawn = torch.randint(0, steps, [1], device=device, dtype=torch.long, generator=self.cuda_generator)
        low, high = self._score_min_timestep, self._score_max_timestep
        return self.student.shift_and_clamp_timestep(drawn).clamp(low, high)

    def _dmd_loss(self, generator_pred_x0, batch):
        x = generator_pred_x0
        with torch.no_grad():
            time = self._sample_score_timestep(x.device)
            noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=self.cuda_generator)
            noisy = self.student.add_noise(x, noise, time)
            common = {"cfg_uncond": self._cfg_uncond, "attn_kind": "dense"}
            fake = self.critic.predict_x0(noisy, time, batch, conditional=True, **common)
            cond = self.teacher.predict_x0(noisy, time, batch, conditional=True, **common)
            uncond = self.teacher.predict_x0(noisy, time, batch, conditional=False, **common)
        return loss_of(x, cond, uncond, fake, self._scale())
