"""The plain records that cross the layers: validated numbers, no tensors. Back ends and operators see these alone.

The operator schemas are generated from the annotations, in the order of the fields.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_type_hints

PREDICTIONS = {"x0": 0, "eps": 1, "v": 2, "flow": 3, "score": 4}
PREDICTION_ALIASES = {"sample": "x0", "epsilon": "eps", "v_prediction": "v", "flow_prediction": "flow"}
"""The names that diffusers' schedulers give them."""
REDUCTIONS = {"mean": 0, "sum": 1, "sample": 2, "none": 3}
"""Kernels know the first three."""
NORMALIZERS = {None: 0, "mean_abs": 1, "tensor": 2}
RULES = {"distribution_matching": 0, "score_identity": 1}
"""What a loss computes from x, teacher, fake and their coefficient."""
DERIVATIVES = ((True, False, False), (True, True, True))
"""Of each rule: whether it has one with respect to x, teacher and fake."""


class WeightParams(NamedTuple):
    """Numbers of f_weights. ``low`` and ``high`` are both clips together, as bounds on the log-ratio."""

    kind: int = 2
    a: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    min_t: float = 0.0
    max_t: float = 1.0
    ema_rate: float = 0.0
    normalize: bool = True
    eps: float = 1e-6
    zero_nonfinite: bool = False


class LossParams(NamedTuple):
    """Numbers of the losses. ``identity_alpha`` belongs to the rule score_identity alone."""

    guidance_scale: float = 1.0
    prediction: int = 0
    normalizer: int = 1
    eps: float = 1e-6
    zero_nonfinite: bool = False
    reduction: int = 0
    identity_alpha: float = 1.0
    need_stats: bool = False
    rule: int = 0


def schema(record: type, prefix: str = "") -> str:
    """The record's fields as the scalar arguments of an operator schema."""
    return ", ".join(f"{kind.__name__} {prefix}{name}" for name, kind in get_type_hints(record).items())
