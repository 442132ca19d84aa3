"""Network predictions of other kinds than x0, as x0 = a x_t + c prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks
from ._validation import call_named, floating, rows, same_device


def x0_coefficients(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """a and c of ``x0 = a x_t + c prediction`` for x_t = alpha x0 + sigma eps, in float64.

    eps: (x_t - sigma eps) / alpha;  v: (alpha x_t - sigma v) / (alpha^2 + sigma^2);  flow, u = eps - x0:
    (x_t - sigma u) / (alpha + sigma);  score: (x_t + sigma^2 score) / alpha.
    """
    alpha, sigma = alpha.double(), sigma.double()
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha
    if prediction == "v":
        power = alpha**2 + sigma**2
        return alpha / power, -sigma / power
    if prediction == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    return 1 / alpha, sigma**2 / alpha


def rows_like(rows: Tensor, x: Tensor) -> Tensor:
    """Rows of coefficients, whose shape is a leading part of x's, shaped to broadcast against x."""
    return rows.reshape(rows.shape + (1,) * (x.ndim - rows.ndim))


def to_x0(
    pred: Tensor,
    x_t: Tensor,
    *,
    prediction: str,
    alpha: Tensor | float,
    sigma: Tensor | float,
) -> Tensor:
    """The x0-prediction that a network's prediction of another kind stands for, with x_t = alpha x0 + sigma eps.

    Args:
        pred: [B, ...], float32, float64, bfloat16 or float16.
        x_t: the noisy input, in pred's shape, of any of those dtypes.
        prediction: ``"eps"``, ``"v"``, ``"flow"`` (u = eps - x0), ``"score"`` or ``"x0"`` (returned as it is); or
            diffusers' ``"epsilon"``, ``"v_prediction"``, ``"flow_prediction"``, ``"sample"``.
        alpha, sigma: numbers, or tensors whose shape is a leading part of pred's ([B], [B, F]) or broadcasts to it
            ([B, 1, 1, 1]); float64 schedules keep their precision.

    Returns:
        [B, ...] in pred's dtype, computed in float32 (float64 where pred or x_t is), differentiable in pred and x_t.

    Raises:
        TypeError, ValueError: naming the argument, for a wrong type, dtype, shape, device or prediction.
    """
    floating(pred, "pred")
    prediction = _checks.prediction_name(prediction)
    floating(x_t, "x_t")
    if x_t.shape != pred.shape:
        raise ValueError(f"x_t has shape {tuple(x_t.shape)}, but pred has shape {tuple(pred.shape)}")
    same_device(x_t, "x_t", pred, "pred")
    alpha, sigma = rows(alpha, "alpha", pred, "pred"), rows(sigma, "sigma", pred, "pred")
    if prediction == "x0":
        return pred
    dtype = torch.float64 if torch.float64 in (pred.dtype, x_t.dtype) else torch.float32

    def convert(pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        a, c = (v.to(dtype) for v in x0_coefficients(prediction, rows_like(alpha, pred), rows_like(sigma, pred)))
        return (a * x_t.to(dtype) + c * pred.to(dtype)).to(pred.dtype)

    return call_named(convert, {"pred": pred, "x_t": x_t, "alpha": alpha, "sigma": sigma})
