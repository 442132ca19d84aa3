"""Fused kernels for diffusion distillation with f-divergences (f-distill, arXiv 2502.15681)."""

from typing import Any

from . import reference
from ._build_info import build_info
from ._version import __version__
from ._warmup import warmup
from .backends import available_backends, empty_cache, set_backend, use_backend
from .divergences import DIVERGENCES, Divergence, get_divergence, register_divergence
from .histogram import RatioHistogram
from .losses import (
    ScoreDifference,
    distribution_matching_loss,
    f_distill_loss,
    f_score_difference,
    gan_discriminator_loss,
    gan_generator_loss,
    score_difference,
    score_identity_loss,
)
from .modules import FDistillLoss
from .predictions import to_x0
from .stats import LossStats
from .weights import f_weights

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "FDistillLoss",
    "LossStats",
    "RatioHistogram",
    "ScoreDifference",
    "__version__",
    "available_backends",
    "build_info",
    "distribution_matching_loss",
    "empty_cache",
    "f_distill_loss",
    "f_score_difference",
    "f_weights",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "get_divergence",
    "integrations",
    "reference",
    "register_divergence",
    "score_difference",
    "score_identity_loss",
    "selfcheck",
    "set_backend",
    "testing",
    "to_x0",
    "use_backend",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in ("integrations", "selfcheck", "testing"):  # nobody pays for importing them who does not use them
        import importlib

        return importlib.import_module(f"fdistill_ops.{name}")
    raise AttributeError(f"module 'fdistill_ops' has no attribute {name!r}")
