"""The arguments of the functions, as they are documented."""

from __future__ import annotations

POSITIONAL = {
    **dict.fromkeys(
        ("distribution_matching_loss", "score_difference", "score_identity_loss"), ("x", "teacher", "fake")
    ),
    **dict.fromkeys(("f_distill_loss", "f_score_difference", "FDistillLoss"), ("x", "teacher", "fake", "logits", "t")),
    **dict.fromkeys(("f_weights", "FDistillLoss.weights"), ("logits", "t")),
    "gan_generator_loss": ("logits",),
    "gan_discriminator_loss": ("real_logits", "fake_logits"),
    "to_x0": ("pred", "x_t"),
    "RatioHistogram": ("min_t", "max_t", "bins", "ema_rate"),
}
REQUIRED = {
    **dict.fromkeys(
        ("distribution_matching_loss", "score_difference", "score_identity_loss"), ("x", "teacher", "fake")
    ),
    **dict.fromkeys(("f_distill_loss", "f_score_difference", "FDistillLoss"), ("x", "teacher", "fake", "logits")),
    **dict.fromkeys(("f_weights", "FDistillLoss.weights", "gan_generator_loss"), ("logits",)),
    "gan_discriminator_loss": ("real_logits", "fake_logits"),
    "to_x0": ("pred", "x_t", "prediction", "alpha", "sigma"),
    "RatioHistogram": ("min_t", "max_t"),
}
OPTIONAL = {
    "distribution_matching_loss": (
        *("weight", "teacher_uncond", "guidance_scale", "mask", "prediction", "x_t", "alpha", "sigma", "normalizer"),
        *("eps", "nonfinite", "max_norm", "reduction", "return_stats"),
    ),
    "f_weights": (
        *("t", "divergence", "logit_clip", "ratio_clip", "histogram", "normalize", "eps", "nonfinite", "group"),
    ),
    "score_identity_loss": ("alpha", "weight", "mask", "normalizer", "eps", "nonfinite", "reduction", "return_stats"),
    "to_x0": (),
    "gan_generator_loss": (),
    "gan_discriminator_loss": (),
    "RatioHistogram": ("bins", "ema_rate"),
}
_MATCHING = OPTIONAL["distribution_matching_loss"]
OPTIONAL["score_difference"] = (*_MATCHING[:-2], "out")
OPTIONAL["f_distill_loss"] = tuple(dict.fromkeys((*OPTIONAL["f_weights"], *_MATCHING)))
OPTIONAL["f_score_difference"] = (*(n for n in OPTIONAL["f_distill_loss"] if n not in _MATCHING[-2:]), "out")
OPTIONAL["FDistillLoss"] = tuple(n for n in OPTIONAL["f_distill_loss"] if n != "group")
OPTIONAL["FDistillLoss.weights"] = tuple(n for n in OPTIONAL["f_weights"] if n != "group")


def known_arguments(target: str) -> tuple[str, ...]:
    return (*POSITIONAL.get(target, ()), *OPTIONAL.get(target, ()))
