from fastgen.methods.common_loss import variational_score_distillation_loss


class DMD2Model:
    def loss(self, gen_data, teacher_x0, fake_score_x0):
        return variational_score_distillation_loss(gen_data, teacher_x0, fake_score_x0)
