from model import dmd
from model.base import SelfForcingModel


class CausVid(SelfForcingModel):
    _compute_kl_grad = dmd.DMD._compute_kl_grad
    _matching = dmd.DMD._matching

    def compute_distribution_matching_loss(
        self, image_or_video, conditional_dict, unconditional_dict, gradient_mask=None
    ):
        bounds = (0, self.num_train_timestep)
        return self._matching(bounds, image_or_video, conditional_dict, unconditional_dict, gradient_mask)
