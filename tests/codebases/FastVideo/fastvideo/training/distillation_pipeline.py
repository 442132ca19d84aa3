import torch
import torch.nn.functional as F


def shift_timestep(timestep, shift, num_train_timestep):
    part = timestep / num_train_timestep
    return timestep if shift == 1 else num_train_timestep * (shift * part / (1 + (shift - 1) * part))


def pred_noise_to_pred_video(pred_noise, noise_input_latent, timestep, scheduler):
    nearest = (scheduler.timesteps.double() - timestep.double()).abs().argmin()
    sigma = scheduler.sigmas.double()[nearest]
    return (noise_input_latent.double() - sigma * pred_noise.double()).to(pred_noise.dtype)


class DistillationPipeline(torch.nn.Module):
    def _dmd_forward(self, generator_pred_video, training_batch):
        x, given, free = generator_pred_video, training_batch.conditional_dict, training_batch.unconditional_dict
        with torch.no_grad():
            time = torch.randint(0, self.num_train_timestep, [1], device=self.device, dtype=torch.long)
            time = shift_timestep(time, self.timestep_shift, self.num_train_timestep)
            time = time.clamp(self.min_timestep, self.max_timestep)
            noise = torch.randn(self.video_latent_shape, device=self.device, dtype=x.dtype)
            noisy = self.noise_scheduler.add_noise(x.flatten(0, 1), noise.flatten(0, 1), time)
            noisy = noisy.detach().unflatten(0, (1, x.shape[1]))
            images = []
            fake_model, real_model = self._get_fake_score_transformer, self._get_real_score_transformer
            for model, condition in ((fake_model, given), (real_model, given), (real_model, free)):
                training_batch = self._build_distill_input_kwargs(noisy, time, condition, training_batch)
                flow = model(time)(**training_batch.input_kwargs).permute(0, 2, 1, 3, 4)
                flat = pred_noise_to_pred_video(
                    pred_noise=flow.flatten(0, 1),
                    noise_input_latent=noisy.flatten(0, 1),
                    timestep=time,
                    scheduler=self.noise_scheduler,
                )
                images.append(flat.unflatten(0, flow.shape[:2]))
            fake, cond, uncond = images
            real = cond + (cond - uncond) * self.real_score_guidance_scale
            g = torch.nan_to_num((fake - real) / torch.abs(x - real).mean())
        training_batch.dmd_latent_vis_dict.update(
            training_batch_dmd_fwd_clean_latent=training_batch.latents,
            generator_pred_video=x.detach(),
            real_score_pred_video=real,
            faker_score_pred_video=fake,
            dmd_timestep=time,
        )
        return 0.5 * F.mse_loss(x.float(), (x.float() - g.float()).detach())
