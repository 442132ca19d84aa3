"""The statistics of one loss call: one device vector, read with one copy."""

from __future__ import annotations

from torch import Tensor

FIELDS = (
    "loss",
    "grad_norm",
    "grad_mean_abs",
    "normalizer_min",
    "normalizer_mean",
    "normalizer_max",
    "weight_min",
    "weight_mean",
    "weight_max",
    "ratio_mean",
    "clipped_low",
    "clipped_high",
    "effective_sample_size",
    "nonfinite",
)
RATIO_FIELDS = slice(FIELDS.index("ratio_mean"), FIELDS.index("clipped_high") + 1)


class LossStats:
    """Named views of a statistics vector. Reading an attribute gives a 0-dimensional tensor on the loss's device and
    does not synchronise; ``to_dict()`` copies the whole vector to the host once.

    Attributes:
        vector: [14], in the loss's dtype, on its device, in the order of the fields below.
        loss: the loss (the mean over the samples for ``reduction="sample"``).
        grad_norm, grad_mean_abs: L2 norm and mean absolute value of g (design: ``w / (n + eps) * (fake - T)``) over the
            mask (everything where there is none), before the division by the number of elements.
        normalizer_min, normalizer_mean, normalizer_max: of n_b over the samples.
        weight_min, weight_mean, weight_max: of w, over its rows.
        ratio_mean: mean density ratio r after clipping, before the division by the histogram; NaN where no logits
            were given, as are the next two.
        clipped_low, clipped_high: fraction of the samples whose log-ratio was raised to the lower bound, or lowered
            to the upper one.
        effective_sample_size: (sum w)^2 / sum w^2 over the rows of w.
        nonfinite: how many elements of g (on the mask) were NaN or infinite, replaced by zero or not.

    Those of the normaliser, the weight and the ratio are over the finite values, NaN where there are none; grad_norm
    and grad_mean_abs are not finite where g is not, unless ``nonfinite="zero"`` has made that zero.

    Raises:
        TypeError: vector is no tensor [14].
    """

    __slots__ = ("vector",)

    loss: Tensor
    grad_norm: Tensor
    grad_mean_abs: Tensor
    normalizer_min: Tensor
    normalizer_mean: Tensor
    normalizer_max: Tensor
    weight_min: Tensor
    weight_mean: Tensor
    weight_max: Tensor
    ratio_mean: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    effective_sample_size: Tensor
    nonfinite: Tensor

    def __init__(self, vector: Tensor) -> None:
        if not isinstance(vector, Tensor) or vector.shape != (len(FIELDS),):
            got = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
            raise TypeError(f"vector must be a tensor [{len(FIELDS)}], got {got}")
        self.vector = vector

    def to_dict(self) -> dict[str, float]:
        """Every field as a Python float: one copy to the host, and on a GPU the only synchronisation."""
        return dict(zip(FIELDS, self.vector.tolist(), strict=True))

    def __repr__(self) -> str:
        return f"LossStats({', '.join(f'{name}={value:.4g}' for name, value in self.to_dict().items())})"


def _field(index: int) -> property:
    return property(lambda self: self.vector[index])


for _index, _name in enumerate(FIELDS):
    setattr(LossStats, _name, _field(_index))
