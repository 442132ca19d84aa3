"""The fuzzer (tests/fuzz): what it finds nothing in, and that it finds what is planted."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.campaign import attempt
from fuzz.compare import Problem
from fuzz.contract import names_one
from fuzz.execute import Outcome
from fuzz.generate import generate, level_of
from fuzz.process import in_child
from fuzz.script import script
from fuzz.shrink import fault_of
from fuzz.specs import Call, Lit, Tens

import fdistill_ops as fd

pytestmark = [pytest.mark.no_poison, pytest.mark.filterwarnings("ignore::UserWarning")]

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_is_found(backend: str, one_thread: None) -> None:
    if backend not in fd.available_backends():
        pytest.skip("not compiled")
    calls = [generate(1, backend, number) for number in range(200)]
    found = {str(call): outcome for call in calls if isinstance(outcome := attempt(call), Outcome)}
    assert not found


def test_the_same_seed_gives_the_same_calls() -> None:
    calls = [generate(5, "cpu", number) for number in range(200)]
    assert str(calls) == str([generate(5, "cpu", number) for number in range(200)])  # NaN is not NaN
    assert str(calls) != str([generate(6, "cpu", number) for number in range(200)])
    assert [call.level for call in calls] == [level_of(5, "cpu", number) for number in range(200)]
    shares = [sum(call.level == level for call in calls) / 200 for level in ("one", "wild")]
    assert 0.15 < shares[0] < 0.35
    assert 0.05 < shares[1] < 0.2


PLANTED = """
import os, pathlib, runpy, sys
sys.path.insert(0, "tests")
import fdistill_ops as fd

def larger(*arguments, right=fd.score_difference, **more):
    return right(*arguments, **more) * 1.001

def another_error(*arguments, right=fd.f_weights, **more):
    try:
        return right(*arguments, **more)
    except (TypeError, ValueError) as error:
        raise KeyError(str(error))

def dies(*arguments, right=fd.score_identity_loss, **more):
    if isinstance(more.get("reduction"), str) and more["reduction"] == "sample":
        os.abort()
    return right(*arguments, **more)

fd.score_difference, fd.f_weights, fd.score_identity_loss = larger, another_error, dies
from fuzz import campaign
from fuzz.specs import Call, Lit, Tens

three = {"x": Tens(seed=1), "teacher": Tens(seed=2, layout="stepped"), "fake": Tens(seed=3, dtype="float64")}
more = {"mask": Tens(dtype="bool", seed=4), "eps": Lit("0.1"), "reduction": Lit("'sample'")}
calls = [
    Call("f_weights", arguments={"logits": Lit("[1.0]"), "normalize": Lit("None")}),
    Call("score_difference", shape=(2, 3, 1, 2), arguments=three | {"mask": more["mask"]}),
    Call("distribution_matching_loss", shape=(2, 3), arguments=three | more),
    Call("score_identity_loss", shape=(2, 3, 4), arguments=three | more),
    Call("gan_generator_loss", shape=(2,), arguments={"logits": Tens()}),
]
campaign.LATE = ()
run = campaign.Campaign(["reference"], 0, pathlib.Path(sys.argv[1]), make=lambda seed, backend, number: calls[number])
run.run(calls=len(calls))
print(run.summary())
status = len(run.findings)
for path in sorted(os.listdir(sys.argv[1])):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.path.join(sys.argv[1], path + ".txt"), os.O_CREAT | os.O_WRONLY), 1)
        runpy.run_path(os.path.join(sys.argv[1], path), run_name="__main__")
        os._exit(0)
    print(path, os.waitpid(child, 0)[1] != 0)
sys.exit(status)
"""


@pytest.mark.slow
def test_what_is_planted_is_found(tmp_path: Path) -> None:
    """A wrong number, a wrong type of error and a crash; and each one's script shows it."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLANTED, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "elements of result are wrong" in done.stdout
    assert "type: KeyError is none of" in done.stdout
    assert "crash: the process ends by SIGABRT" in done.stdout
    scripts = sorted(tmp_path.glob("finding-*.py"))
    assert len(scripts) == 3
    texts = [path.read_text() for path in scripts]
    assert all(f"{path.name} True" in done.stdout for path in scripts), done.stdout
    (crash,) = [text for text in texts if "SIGABRT" in text]
    assert "reduction = 'sample'" in crash
    assert "mask" not in crash  # shrunk
    outputs = "".join(path.read_text() for path in tmp_path.glob("*.txt"))
    assert "expected" in outputs


def test_a_script_stands_alone(tmp_path: Path) -> None:
    """It needs nothing of the fuzzer, and its status says whether the fault is there."""
    arguments = {"logits": Tens((3,), seed=4, layout="negated"), "nonfinite": Lit("StrSubclass('zero')")}
    call = Call("f_weights", shape=(3,), arguments=arguments, positional=1)
    want = fd.f_weights(eval_operand(call, "logits")).tolist()
    for expected, status in ((want, 0), ([2.0, *want[1:]], 1)):
        problem = Problem("value", "result is wrong", "result", expected, [1e-6] * 3)
        path = tmp_path / f"finding-{status}.py"
        path.write_text(script(call, Outcome([problem]), "make fuzz"))
        with fd.use_backend(None), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path))
        assert bool(ended.value.code) == bool(status)
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "element 0: got" in done.stdout


def eval_operand(call: Call, name: str):  # type: ignore[no-untyped-def]
    from fuzz.specs import namespace, operand_lines

    return eval(dict(operand_lines(call))[name], namespace())


def test_a_child_that_dies_or_hangs() -> None:
    def work(item: str) -> str | None:
        if item == "abort":
            os.abort()
        while item == "hang":
            pass
        return item.upper() if item == "found" else None

    results, death = in_child(work, ["", "found", "abort", "found"], 20.0)
    assert results == [(1, "FOUND")]
    assert (death.place, death.reason) == (2, "SIGABRT")
    results, death = in_child(work, ["hang"], 0.5)
    assert (death.place, death.reason) == (0, "hang")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        in_child(lambda item: 1 / item, [0], 20.0)


def test_names_in_messages() -> None:
    assert names_one("x must be a tensor", {"x"})
    assert names_one("but x's shape is", {"x"})
    assert names_one("missing argument: 'fake'", {"fake"})
    for message in ("mx must be", "x_t must be", "fd.x must"):
        assert not names_one(message, {"x"})
    assert not names_one("it doesn't matter", {"t"})


def test_faults_of_the_same_kind_are_one() -> None:
    same = [Outcome([Problem("value", f"{n} elements", "gradients[0]")]) for n in (1, 2)]
    assert fault_of(same[0]) == fault_of(same[1])
    assert fault_of(same[0]) != fault_of(Outcome([Problem("crash", "the process ends by SIGSEGV")]))
