import torch
import torch.nn.functional as F


def variational_score_distillation_loss(gen_data, teacher_x0, fake_score_x0, additional_scale=None):
    with torch.no_grad():
        distance = (gen_data.float() - teacher_x0.float()).abs().flatten(1).mean(1)
        factor = 1 / (distance + 1e-6)
        if additional_scale is not None:
            factor = factor * additional_scale.float().flatten()
        factor = factor.to(gen_data.dtype).reshape(-1, *[1] * (gen_data.ndim - 1))
        target = gen_data - (fake_score_x0 - teacher_x0) * factor
    return 0.5 * F.mse_loss(gen_data, target)
