import torch


class SelfForcingModel(torch.nn.Module):
    def _get_timestep(
        self, min_timestep, max_timestep, batch_size, num_frame, num_frame_per_block, uniform_timestep=False
    ):
        assert uniform_timestep
        drawn = torch.randint(min_timestep, max_timestep, [batch_size, 1], device=self.device, dtype=torch.long)
        return drawn.repeat(1, num_frame)

    def _bounds(self, start, end):
        low = end if self.ts_schedule and end is not None else self.min_score_timestep
        return low, start if self.ts_schedule_max and start is not None else self.num_train_timestep

    def _noisy(self, image_or_video, bounds):
        frames = image_or_video.shape[:2]
        timestep = self._get_timestep(*bounds, *frames, self.num_frame_per_block, uniform_timestep=True)
        if self.timestep_shift > 1:
            part = timestep / 1000
            timestep = self.timestep_shift * part / (1 + (self.timestep_shift - 1) * part) * 1000
        timestep = timestep.clamp(self.min_step, self.max_step)
        noise = torch.randn_like(image_or_video)
        flat = [tensor.flatten(0, 1) for tensor in (image_or_video, noise, timestep)]
        return self.scheduler.add_noise(*flat).unflatten(0, frames), timestep
