import torch
from fastgen.methods.common_loss import variational_score_distillation_loss
from fastgen.methods.distribution_matching.dmd2 import DMD2Model

all_f_div_weighting_function = {
    "rkl": lambda r: torch.tensor(1, dtype=r.dtype, device=r.device),
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / torch.clamp(r, min=1e-8),
    "sh": lambda r: r**0.5,
    "jf": lambda r: 1 + r,
}


def world_size():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class FdistillModel(DMD2Model):
    def _get_f_div_weighting_h(self, fake_logits, t):
        settings, ranks = self.config.f_distill, world_size()
        ratio = fake_logits.float().mean(1).clamp(-10, 10).exp().detach()
        ratio = ratio.clamp(settings.ratio_lower, settings.ratio_upper)
        if settings.ratio_normalization:
            low, high = float(self.net.noise_scheduler.min_t), float(self.net.noise_scheduler.max_t)
            index = ((t.double() - low) / ((high - low) / self.bin_num)).floor().long().clamp(0, self.bin_num - 1)
            count = torch.bincount(index, minlength=self.bin_num).float()
            total = torch.bincount(index, weights=ratio, minlength=self.bin_num).float()
            if ranks > 1:
                torch.distributed.all_reduce(count)
                torch.distributed.all_reduce(total)
            history, filled, rate = self.net.bins.float(), count > 0, settings.ratio_ema_rate
            history[filled] = rate * history[filled] + (1 - rate) * (total / (count + 1e-6))[filled]
            self.net.bins.copy_(history.to(self.net.bins.dtype))
            ratio = ratio / (history[index] + 1e-6)
        h = self.f_div_weighting_function(ratio)
        mean = h.sum()
        if ranks > 1:
            torch.distributed.all_reduce(mean)
        mean = mean / (len(h) * ranks)
        return (h / (mean + 1e-6)).to(fake_logits.dtype)

    def loss(self, gen_data, teacher_x0, fake_score_x0, h):
        return variational_score_distillation_loss(gen_data, teacher_x0, fake_score_x0, additional_scale=h)
