"""The rules of the losses, the weights and their neighbours, function by function (:mod:`.contract`)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops import _oracle as oracle

from .contract import (
    FLOATS,
    State,
    Verdict,
    as_number,
    is_strided,
    is_tensor,
    is_wrapper,
    judge_flag,
    judge_like,
    judge_mask,
    judge_number,
    judge_per_sample,
    judge_rows,
    judge_tensor,
    judge_word,
    same_device,
)
from .operands import Sub
from .signatures import REQUIRED

_TIMES = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64}
_TIMES |= set(FLOATS)
_PERHAPS_TIMES = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
_PERHAPS_TIMES |= {torch.float8_e8m0fnu}
PREDICTIONS = {"x0": "x0", "eps": "eps", "v": "v", "flow": "flow", "score": "score"}
PREDICTIONS |= {"sample": "x0", "epsilon": "eps", "v_prediction": "v", "flow_prediction": "flow"}
LOSSES = ("distribution_matching_loss", "f_distill_loss", "score_identity_loss", "FDistillLoss")
DIFFERENCES = ("score_difference", "f_score_difference")
F_DISTILL = ("f_distill_loss", "f_score_difference", "FDistillLoss")
WEIGHTED = ("f_weights", "FDistillLoss.weights", *F_DISTILL)
_MISSING = object()


# -------------------------------------------------------------------------------------------------------------- losses


def _sample_arguments(verdict: Verdict, given: Mapping[str, Any], target: str) -> None:
    """x, teacher, fake and what goes with them."""
    x = given.get("x", _MISSING)
    usable = x is not _MISSING and judge_tensor(verdict, x, "x")
    if usable and x.ndim == 0:
        verdict.fault("x", "has no batch dimension")
    like = x if usable else None
    for name in ("teacher", "fake"):
        if name in given:
            judge_like(verdict, given[name], name, like, "x")
    if given.get("weight") is not None:
        judge_rows(verdict, given["weight"], "weight", like)
    uncond, scale = given.get("teacher_uncond"), given.get("guidance_scale")
    if uncond is not None:
        judge_like(verdict, uncond, "teacher_uncond", like, "x")
        if scale is None:
            verdict.fault("guidance_scale teacher_uncond", "is missing")
        else:
            if is_tensor(scale) and scale.ndim:
                judge_per_sample(verdict, scale, "guidance_scale", like)
            else:
                judge_rows(verdict, scale, "guidance_scale", like)
    elif scale is not None:
        verdict.fault("teacher_uncond guidance_scale", "is missing")
    if given.get("mask") is not None:
        judge_mask(verdict, given["mask"], like)
    _prediction_arguments(verdict, given, like, target)
    normalizer = given.get("normalizer", "mean_abs")
    if is_tensor(normalizer):
        judge_per_sample(verdict, normalizer, "normalizer", like)
    else:
        judge_word(verdict, normalizer, "normalizer", ("mean_abs", None))
    judge_word(verdict, given.get("reduction", "mean"), "reduction", ("mean", "sum", "sample", "none"))
    judge_word(verdict, given.get("nonfinite", "propagate"), "nonfinite", ("propagate", "zero"))
    judge_number(verdict, given.get("eps", 1e-6), "eps", low=0.0)
    if given.get("max_norm") is not None:
        judge_number(verdict, given["max_norm"], "max_norm", low=5e-324)
    judge_flag(verdict, given.get("return_stats", False), "return_stats")
    if given.get("out") is not None:
        _out(verdict, given, like)


def prediction_of(given: Mapping[str, Any]) -> str:
    """By the first of its names."""
    return PREDICTIONS[str(given.get("prediction", "x0"))]


def _prediction_arguments(verdict: Verdict, given: Mapping[str, Any], x: Tensor | None, target: str) -> None:
    if target == "score_identity_loss":
        judge_number(verdict, given.get("alpha", 1.0), "alpha")
        return
    names = ("x_t", "alpha", "sigma")
    if not judge_word(verdict, given.get("prediction", "x0"), "prediction", tuple(PREDICTIONS)):
        return
    if prediction_of(given) == "x0":
        for name in names:
            if given.get(name) is not None:
                verdict.fault(f"{name} prediction", "has no use")
        return
    for name in names:
        value = given.get(name)
        if value is None:
            verdict.fault(f"{name} prediction", "is missing")
        elif name == "x_t":
            judge_like(verdict, value, name, x, "x")
        else:
            judge_rows(verdict, value, name, x)


def _out(verdict: Verdict, given: Mapping[str, Any], x: Tensor | None) -> None:
    out = given["out"]
    if not judge_tensor(verdict, out, "out") or x is None:
        return
    if out.shape != x.shape or out.dtype != x.dtype:
        verdict.fault("out", "has another shape or dtype than x")
    same_device(verdict, out, "out", x, "x")
    if out.requires_grad and torch.is_grad_enabled():
        verdict.fault("out", "requires a gradient")
    if out.is_neg() or out.is_inference() or out.device.type == "meta":
        verdict.doubt("out")
    if out.device.type == "meta" or is_wrapper(out) or out.dtype not in FLOATS:
        return
    own = addresses(out)
    if len(np.unique(own)) < own.size:
        verdict.fault("out", "has elements that share memory")
    if torch._is_zerotensor(out) or torch._is_functional_tensor(out):
        verdict.doubt("out")
    for name, value in given.items():
        if name in ("out", "") or not is_tensor(value) or is_wrapper(value) or not is_strided(value):
            continue
        if value.device.type == "meta" or memory_of(value) != memory_of(out) or not memory_of(out):
            continue
        same = value.data_ptr() == out.data_ptr() and value.stride() == out.stride() and value.dtype == out.dtype
        if same and value.shape == out.shape:
            if name not in ("x", "teacher", "fake"):
                verdict.doubt("out")
        elif np.intersect1d(addresses(value), own).size:
            verdict.fault("out", f"shares memory with {name}")
        else:
            verdict.doubt("out")


def memory_of(tensor: Tensor) -> int:
    """Where the memory begins that it is a view of; 0 where it has none."""
    if torch._is_functional_tensor(tensor) or torch._is_zerotensor(tensor) or tensor.numel() == 0:
        return 0
    return tensor.untyped_storage().data_ptr()


def addresses(tensor: Tensor) -> np.ndarray:
    """The addresses of every byte of its elements."""
    place = np.zeros((1,), dtype=np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size != 1:
            place = (place[:, None] + np.arange(size) * stride).reshape(-1)
    return (tensor.data_ptr() + place[:, None] * tensor.itemsize + np.arange(tensor.itemsize)).reshape(-1)


# ------------------------------------------------------------------------------------------------------------- weights

_ALPHA = re.compile(r"alpha\s*[:=(]\s*([^()]+?)\s*\)?$")


def known_divergence(name: str) -> str | None:
    """The short canonical name that the oracle knows; None for an unknown name."""
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    for canonical, aliases in oracle.ALIASES.items():
        if key in (canonical, *(alias.replace("-", "_") for alias in aliases)):
            return canonical
    return None


def divergence_of(value: Any) -> tuple[str, float] | None:
    """Its canonical name and the parameter of the alpha family."""
    if type(value) is fd.Divergence:
        return (value.name, 0.5 if value.a is None else value.a) if value.name in oracle.ALIASES else None
    if not issubclass(type(value), str):
        return None
    spelled = _ALPHA.match(str(value).strip().lower())
    if spelled:
        try:
            a = float(spelled.group(1))
        except ValueError:
            return None
        return ("alpha", a) if math.isfinite(a) else None
    found = known_divergence(value)
    return None if found is None else (found, 0.5)


def _weight_arguments(verdict: Verdict, given: Mapping[str, Any]) -> None:
    logits = given.get("logits", _MISSING)
    usable = logits is not _MISSING and judge_tensor(verdict, logits, "logits")
    if usable and (logits.ndim == 0 or 0 in logits.shape[1:]):
        verdict.fault("logits", "is not of shape [B] or [B, ...]")
    if divergence_of(given.get("divergence", "js")) is None:
        verdict.fault("divergence a", "is unknown")
    judge_word(verdict, given.get("normalize", "mean"), "normalize", ("mean", None))
    judge_word(verdict, given.get("nonfinite", "propagate"), "nonfinite", ("propagate", "zero"))
    judge_number(verdict, given.get("eps", 1e-6), "eps", low=0.0)
    if given.get("logit_clip", 10.0) is not None:
        judge_number(verdict, given.get("logit_clip", 10.0), "logit_clip", low=0.0, finite=False)
    _ratio_clip(verdict, given.get("ratio_clip", (0.1, 20.0)))
    if given.get("group") is not None:
        verdict.fault("group process_group", "is no process group")
    t, histogram = given.get("t"), given.get("histogram")
    if t is not None and judge_tensor(verdict, t, "t", _TIMES | _PERHAPS_TIMES):
        if t.dtype in _PERHAPS_TIMES:
            verdict.doubt("t")
        if usable and logits.ndim:
            if t.ndim == 0 or t.shape[0] != logits.shape[0] or t.numel() != logits.shape[0]:
                verdict.fault("t logits", "is not of shape [B]")
            same_device(verdict, t, "t", logits, "logits")
    if t is not None and histogram is None:
        verdict.fault("t histogram", "has no use without a histogram")
    if histogram is not None:
        if type(histogram) is not State:
            verdict.fault("histogram", "is no RatioHistogram")
            return
        if t is None:
            verdict.fault("t histogram", "is missing")
        histogram_state(verdict, histogram)
        bins = histogram.bins
        if usable and is_tensor(bins):
            same_device(verdict, bins, "histogram", logits, "logits")


def histogram_state(verdict: Verdict, histogram: Any) -> None:
    """What attributes set later may be."""
    bins = histogram.bins
    names = "histogram bins"
    if not is_tensor(bins) or not is_strided(bins) or bins.dtype not in FLOATS:
        verdict.fault(names, "holds no floating tensor")
    elif bins.ndim != 1 or bins.numel() == 0:
        verdict.fault(names, "holds bins that are not of shape [n]")
    elif bins.requires_grad or is_wrapper(bins):
        verdict.doubtful |= {"bins", "histogram"}
    numbers = []
    for name, low in (("min_t", -math.inf), ("max_t", -math.inf), ("ema_rate", 0.0)):
        one = Verdict()
        judge_number(one, getattr(histogram, name), name, low)
        if one.wrong:
            verdict.fault(f"{name} histogram", one.why[0])
        elif one.doubtful:
            verdict.doubtful |= {name, "histogram"}
        numbers.append(as_number(getattr(histogram, name))[0])
    low, high, rate = numbers
    if low is not None and high is not None:
        if not low < high:
            verdict.fault("min_t max_t histogram", "is not below max_t")
        elif math.isinf(high - low):
            verdict.doubtful |= {"min_t", "max_t", "histogram"}
    if rate is not None and rate > 1:
        verdict.fault("ema_rate histogram", "is above 1")


def _ratio_clip(verdict: Verdict, value: Any) -> None:
    if value is None:
        return
    if type(value) not in (tuple, list):
        if is_tensor(value) or issubclass(type(value), tuple | list | range | np.ndarray):
            verdict.doubt("ratio_clip")
        else:
            verdict.fault("ratio_clip", "is no pair")
            return
    try:
        pair = list(value)
    except Exception:
        pair = []
    if len(pair) != 2:
        verdict.fault("ratio_clip", "is no pair")
        return
    for bound in pair:
        judge_number(verdict, bound, "ratio_clip", low=0.0, finite=False)
    low, high = (as_number(bound)[0] for bound in pair)
    if low is not None and high is not None and (low > high or high == 0 or low == math.inf):
        verdict.fault("ratio_clip", "leaves no finite positive ratio")


# ---------------------------------------------------------------------------------------------------------------- all


def _to_x0(verdict: Verdict, given: Mapping[str, Any]) -> None:
    pred = given.get("pred", _MISSING)
    usable = pred is not _MISSING and judge_tensor(verdict, pred, "pred")
    judge_word(verdict, given.get("prediction"), "prediction", tuple(PREDICTIONS))
    like = pred if usable else None
    if "x_t" in given:
        judge_like(verdict, given["x_t"], "x_t", like, "pred")
    for name in ("alpha", "sigma"):
        if name in given:
            judge_rows(verdict, given[name], name, like, "pred")


def _ratio_histogram(verdict: Verdict, given: Mapping[str, Any]) -> None:
    for name in ("min_t", "max_t"):
        if name in given:
            judge_number(verdict, given[name], name)
    low, high = (as_number(given.get(name))[0] for name in ("min_t", "max_t"))
    if low is not None and high is not None:
        if not low < high:
            verdict.fault("min_t max_t", "is not below max_t")
        elif math.isinf(high - low):
            verdict.doubtful |= {"min_t", "max_t"}
    bins = given.get("bins", 10)
    if is_tensor(bins):
        if judge_tensor(verdict, bins, "bins"):
            if bins.ndim != 1 or bins.numel() == 0:
                verdict.fault("bins", "is not of shape [n]")
            if bins.requires_grad:
                verdict.fault("bins", "requires a gradient")
    elif type(bins) is bool or not issubclass(type(bins), int | np.integer):
        verdict.fault("bins", "is no integer")
    elif int(bins) < 1:
        verdict.fault("bins", "is below 1")
    elif int(bins) > 2**20 or type(bins) is not int:
        verdict.doubt("bins")
    rate = given.get("ema_rate", 0.0)
    judge_number(verdict, rate, "ema_rate", low=0.0)
    if (as_number(rate)[0] or 0.0) > 1:
        verdict.fault("ema_rate", "is above 1")


def judge(target: str, given: Mapping[str, Any]) -> Verdict:
    """``given``: the values by argument; those that are missing are not looked at, but by :func:`missing`."""
    verdict = Verdict()
    if target in LOSSES or target in DIFFERENCES:
        _sample_arguments(verdict, given, target)
    if target in WEIGHTED:
        _weight_arguments(verdict, given)
    if target in F_DISTILL:
        x, logits = given.get("x"), given.get("logits")
        if all(is_tensor(v) and "Uninit" not in type(v).__name__ and is_strided(v) and v.ndim for v in (x, logits)):
            if logits.shape[0] != x.shape[0]:
                verdict.fault("logits x", "has another number of samples than x")
            same_device(verdict, logits, "logits", x, "x")
    if target.startswith("gan_"):
        for name, value in given.items():
            judge_tensor(verdict, value, name)
        devices = {value.device for value in given.values() if is_tensor(value)}
        verdict.doubtful |= {"real_logits", "fake_logits"} if len(devices) > 1 else set()
    if target == "to_x0":
        _to_x0(verdict, given)
    if target == "RatioHistogram":
        _ratio_histogram(verdict, given)
    if any(is_wrapper(value) for value in given.values()):  # which may not mix with a subclass either
        verdict.doubtful |= {name for name, value in given.items() if type(value) is Sub}
    for name in missing(target, given):
        verdict.fault(name, "is not given")
    return verdict


def missing(target: str, given: Mapping[str, Any]) -> list[str]:
    return [name for name in REQUIRED.get(target, ()) if name not in given]
