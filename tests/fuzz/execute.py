"""One call: from its record to what is wrong with its outcome."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fdistill_ops as fd
from fdistill_ops import backends

from . import expected, expected_stats, expected_weights, others
from .compare import Array, Problem, Problems, numbers_of, plain_of
from .contract import State, Verdict, is_tensor, is_wrapper, names_one
from .rules import DIFFERENCES, LOSSES, addresses, judge, memory_of
from .specs import (
    Call,
    Tens,
    after_lines,
    call_lines,
    differentiated,
    in_context,
    namespace,
    operand_lines,
    wants_stats,
)

_ROOT = Path(fd.__file__).resolve().parent
_CPU = torch.device("cpu")


class Undrawable(Exception):
    """The operands of the call cannot be made."""


@dataclass
class Outcome:
    """``problems``: none where all is as it should be. ``names``: by which a refusal may name what is wrong.
    ``raised``: type and message of the call's exception, ``place`` where it came from."""

    problems: list[Problem] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)
    raised: str = ""
    place: str = ""

    @property
    def kinds(self) -> list[str]:
        return sorted({problem.kind for problem in self.problems})


def run_lines(lines: list[str], names: dict[str, Any]) -> Exception | None:
    if not lines:
        return None
    code = compile("\n".join(lines), "<call>", "exec")
    try:
        exec(code, names)
    except Exception as error:
        return error
    return None


def place_of(error: Exception) -> str:
    """The innermost line of the package that the exception passed."""
    found = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(str(_ROOT)):
            found = f"{Path(frame.filename).relative_to(_ROOT)}:{frame.name}"
    return found


def message_of(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""


# ------------------------------------------------------------------------------------------------- what may not change


class Kept:
    """An operand as it was, with all of the memory behind it."""

    def __init__(self, name: str, value: Tensor) -> None:
        self.name, self.value = name, value
        self.about = self._about()
        memory = plain_of(value)
        self.memory: Tensor | None = None
        if memory is not None and memory.numel() and not torch._is_zerotensor(memory):
            self.memory = torch.empty(0, dtype=torch.uint8).set_(memory.untyped_storage())
            self.before = self.memory.clone()

    def _about(self) -> tuple[Any, ...]:
        value = self.value
        if type(value).__name__ == "UninitializedParameter" or value.is_nested or value.layout is not torch.strided:
            return (type(value), value.dtype)
        return (type(value), value.dtype, tuple(value.shape), value.stride(), value.requires_grad)

    def changed(self, written: Tensor | None = None) -> str | None:
        """What is not as before. ``written``: a tensor that the call may have written to."""
        if self._about() != self.about:
            return f"{self.name} is now {self._about()}, and was {self.about}"
        if self.memory is None:
            return None
        if self.memory.numel() != self.before.numel():
            return f"the memory of {self.name} has another size"
        if torch.equal(self.memory, self.before):
            return None
        if written is None or memory_of(written) != memory_of(self.memory):
            return f"{self.name} has changed"
        rest = (self.memory != self.before).numpy()
        rest[addresses(written) - self.memory.data_ptr()] = False
        return f"memory around out has changed, that of {self.name}" if rest.any() else None


def choice() -> str:
    """The back end that a call on CPU tensors would get."""
    try:
        return backends.choose(_CPU)
    except Exception as error:
        return repr(error)


def registry() -> tuple[Any, ...]:
    return tuple((name, id(divergence)) for name, divergence in fd.DIVERGENCES.items())


# ------------------------------------------------------------------------------------------------------------ the call


def execute(call: Call) -> Outcome:
    """Runs the call and what belongs to it.

    Raises:
        Undrawable: the operands cannot be made.
    """
    fd.set_backend(call.backend)
    threads = torch.get_num_threads()
    try:
        with np.errstate(all="ignore"):
            return _execute(call)
    finally:
        fd.set_backend(None)
        torch.set_num_threads(threads)


def _execute(call: Call) -> Outcome:
    names = namespace()
    for name, text in operand_lines(call):
        try:
            names[name] = eval(text, names)
        except Exception as error:
            raise Undrawable(f"{name} = {text}: {error!r}") from error
    if call.target in others.TARGETS:
        return _execute_other(call, names)
    given, state = _given(call, names)
    with torch.set_grad_enabled(not call.grad_mode):
        verdict = judge(call.target, given)
    _judge_syntax(call, verdict)
    before = {name: array for name, value in given.items() if (array := numbers_of(value)) is not None}
    bins = None if state is None else numbers_of(state.bins)
    kept = [Kept(name, value) for name, value in given.items() if is_tensor(value)]
    histogram = names.get("histogram") if state is not None else None
    if histogram is not None and is_tensor(histogram.bins):
        buffer = Kept("histogram.bins", histogram.bins)
    world = (choice(), registry(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    torch.set_num_threads(call.threads)

    error = run_lines(in_context(call, call_lines(call)), names)

    problems = Problems()
    outcome = Outcome(problems.found, sorted(verdict.wrong | verdict.doubtful), verdict.why)
    if (choice(), registry(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()) != world:
        problems.add("changed", "the chosen back end, the registry or the gradient mode has changed")
    written = None
    if error is not None:
        _judge_error(call, given, verdict, error, outcome, problems)
        if histogram is not None and not call.setup and (text := buffer.changed()):
            problems.add("changed", f"after the error {text}")
    elif not verdict.legal:
        problems.add("accepted", f"accepted, although {'; '.join(verdict.why)}")
    else:
        written = plain_of(given.get("out"))
        names["result"] = names.get("result", names.get("loss"))
        _check_result(call, given, before, bins, state, names, problems)
        if histogram is not None and not histogram.training and not call.setup and (text := buffer.changed()):
            problems.add("changed", f"in eval mode {text}")
    for operand in kept:
        if text := operand.changed(written):
            problems.add("changed", text)
            break
    return outcome


def _given(call: Call, names: Mapping[str, Any]) -> tuple[dict[str, Any], State | None]:
    """The values by argument, and the histogram as it is to be."""
    given: dict[str, Any] = {name: names[name] for name in call.arguments}
    histogram = given.get("histogram")
    if type(histogram) is not fd.RatioHistogram:
        return given, None
    state = State(histogram.min_t, histogram.max_t, histogram.ema_rate, histogram.bins, histogram.training)
    for attribute, value in call.setup:
        new = eval(value.source(call.shape, False), dict(names))
        if attribute == "load":
            fits = is_tensor(new) and new.shape == histogram.bins.shape and new.device.type != "meta"
            state.bins = new.to(histogram.bins.dtype) if fits else None
        else:
            setattr(state, attribute, new)
    given["histogram"] = state
    return given, state


def _judge_syntax(call: Call, verdict: Verdict) -> None:
    """Names that the function does not know, too many arguments without one, and settings that are none."""
    if call.extra:
        word = call.extra.partition("=")[0] if "=" in call.extra else "positional"
        verdict.fault(word, "is given and not known" if "=" in call.extra else "arguments are too many")
    if "normalizer" in call.settings and isinstance(call.arguments.get("normalizer"), Tens):
        verdict.fault("normalizer", "is a tensor in a constructor")


def _judge_error(
    call: Call, given: Mapping[str, Any], verdict: Verdict, error: Exception, outcome: Outcome, problems: Problems
) -> None:
    text = message_of(error)
    outcome.raised, outcome.place = f"{type(error).__name__}: {text}", place_of(error)
    expected_names = verdict.wrong | verdict.doubtful
    tensors = [value for value in given.values() if is_tensor(value)]
    if tensors and all(value.device.type == "meta" for value in tensors) and "meta" in text:
        return  # no back end with kernels serves them
    if not isinstance(error, ValueError | TypeError | RuntimeError):
        problems.add("type", f"{type(error).__name__} is none of ValueError, TypeError and RuntimeError: {text}")
    elif verdict.legal and not verdict.doubtful:
        problems.add("refused", f"refused: {type(error).__name__}: {text}")
    elif not names_one(text, expected_names):
        which = ", ".join(sorted(expected_names))
        problems.add("unnamed", f"{type(error).__name__} names none of {which}: {text}")


# -------------------------------------------------------------------------------------------------------- legal results


def _check_result(
    call: Call,
    given: dict[str, Any],
    before: dict[str, Array],
    bins: Array | None,
    state: State | None,
    names: dict[str, Any],
    problems: Problems,
) -> None:
    target = call.target
    if target == "RatioHistogram":
        others.check_histogram(given, names["result"], problems)
        return
    if any(is_tensor(v) and v.device.type == "meta" for v in given.values()) or not _have_values(given, before):
        _check_shape_alone(call, given, names, problems)
        return
    if target.startswith("gan_") or target == "to_x0":
        others.check_simple(call, given, before, names, problems)
        return
    weighted = None
    if "logits" in given:
        weighted = expected_weights.weights(given | {"histogram": state}, before, bins)
        live = None if state is None else names["histogram"]
        expected_weights.check_histogram(problems, {"histogram": live}, weighted, bins)
    if target in ("f_weights", "FDistillLoss.weights"):
        assert weighted is not None
        expected_weights.check_weights(problems, given, weighted, names["result"], "result")
        return
    want = expected.losses(target, given, before, weighted)
    if target in DIFFERENCES:
        result, expression = names["result"], "result"
        if target == "f_score_difference":
            assert weighted is not None
            expected_weights.check_weights(problems, given, weighted, result.weights, "result.weights")
            result, expression = result.g, "result.g"
        expected.check_difference(problems, want, result, given["x"].dtype, expression, given.get("out"))
        if given.get("out") is not None and result is not given["out"]:
            problems.same(
                result.data_ptr() == given["out"].data_ptr(), True, f"{expression}.data_ptr() == out.data_ptr()"
            )
        return
    result = names["result"]
    loss, stats = (names["loss"], names["stats"]) if wants_stats(call) else (result, None)
    if type(result) is tuple:
        names["loss"], stats = loss, _ = result[0], result[1]
    names["loss"] = loss
    expected.check_loss(problems, want, loss)
    if stats is not None:
        expected_stats.check_stats(problems, want, given, before, stats, weighted)
    leaves = differentiated(call)
    if is_tensor(loss) and not is_wrapper(loss):
        problems.same(bool(loss.requires_grad), bool(leaves) and not call.grad_mode, "loss.requires_grad")
    if call.after.kind and leaves and not call.grad_mode and not problems.found:
        _check_backward(call, names, want, leaves, problems)


def _have_values(given: Mapping[str, Any], before: Mapping[str, Array]) -> bool:
    return all(name in before for name, value in given.items() if is_tensor(value))


def _check_shape_alone(call: Call, given: Mapping[str, Any], names: Mapping[str, Any], problems: Problems) -> None:
    """Tensors without values: the result has none either."""
    result = names["result"]
    result = result[0] if type(result) is tuple else names.get("loss", result)
    if call.target in LOSSES:
        dtype = expected.computed_in(*(given.get(name) for name in expected.LIKE_X))
        whole = tuple(given["x"].shape)
        shape = {"sample": whole[:1], "none": whole}.get(str(given.get("reduction", "mean")), ())
        problems.tensor(result, "result", shape, dtype)
    elif call.target == "score_difference":
        problems.tensor(result, "result", tuple(given["x"].shape), given["x"].dtype)
    elif "logits" in given and call.target.endswith("weights"):
        problems.tensor(result, "result", tuple(given["logits"].shape[:1]), expected.computed_in(given["logits"]))


def _check_backward(
    call: Call, names: dict[str, Any], want: expected.Losses, leaves: list[str], problems: Problems
) -> None:
    kind = call.after.kind
    error = run_lines(after_lines(call), names)
    if error is not None:
        text = f"{type(error).__name__}: {message_of(error)}"
        if not _upstream_is_wrong(names) and not (_any_wrapper(call, names) and call.after.upstream):
            problems.add("backward", f"backward raises {text}")
        return
    upstream = numbers_of(names["upstream"])
    if upstream is None or _upstream_is_wrong(names) or (_any_wrapper(call, names) and call.after.upstream):
        return
    if kind.startswith("hook"):
        if not isinstance(names["failed"], KeyError):
            problems.add("backward", f"the hook's KeyError is lost: {names['failed']!r}")
        again = names["again"]
        if again is not None:
            if not isinstance(again, RuntimeError):
                problems.add("backward", f"the backward after it raises {again!r}")
            return
    elif kind in ("freed", "create_graph"):
        refused, words = names["refused"], "second time" if kind == "freed" else "differentiable once"
        if not isinstance(refused, RuntimeError) or words not in message_of(refused):
            problems.add("backward", f"the next backward gives {refused!r}, no RuntimeError with {words!r}")
    if kind == "unused" and any(value is not None for value in names["unused"]):
        problems.add("backward", "something flows to another argument", "sum(v is not None for v in unused)", "0")
    same = [other for other in ("teacher", "fake") if other in names and names[other] is names["x"]]
    for place, name in enumerate(leaves):
        if call.target == "score_identity_loss" and (same or names["teacher"] is names["fake"]):
            return  # one tensor in two places: its derivatives add up
        for list_name in ("gradients", "first") if kind == "twice" else ("gradients",):
            got = names[list_name][place]
            expected.check_gradient(problems, want, name, names[name], got, upstream, f"{list_name}[{place}]")


def _any_wrapper(call: Call, names: Mapping[str, Any]) -> bool:
    return any(is_wrapper(names[name]) for name in call.arguments)


def _upstream_is_wrong(names: Mapping[str, Any]) -> bool:
    """One that PyTorch itself refuses or converts."""
    upstream, loss = names.get("upstream"), names["loss"]
    return (
        not is_tensor(upstream) or upstream.shape != loss.shape or upstream.dtype != loss.dtype or is_wrapper(upstream)
    )


def _execute_other(call: Call, names: dict[str, Any]) -> Outcome:
    """Calls without samples (:mod:`.others`)."""
    given = {name: names[name] for name in call.arguments}
    verdict = others.judge(call, given)
    _judge_syntax(call, verdict)
    world = (choice(), registry(), torch.get_num_threads())
    with others.restored():
        error = run_lines(in_context(call, call_lines(call)), names)
        problems = Problems()
        outcome = Outcome(problems.found, sorted(verdict.wrong | verdict.doubtful), verdict.why)
        if error is not None:
            _judge_error(call, {}, verdict, error, outcome, problems)
            if (choice(), registry(), torch.get_num_threads()) != world:
                problems.add("changed", "after the error the chosen back end or the registry has changed")
        elif not verdict.legal:
            problems.add("accepted", f"accepted, although {'; '.join(verdict.why)}")
        else:
            others.check(call, given, names, world[0], problems)
    return outcome
