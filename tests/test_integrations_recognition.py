"""What the drop-ins accept and refuse: fingerprints, moved modules, the table of weightings, the command line."""

from __future__ import annotations

import importlib
import linecache
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_cases import CASES, CHECKOUTS, RESTATED, importable
from test_integrations import batch, fdistill_model
from test_integrations_patching import INTEGRATIONS, define
from test_readme import run_python
from upstream_fingerprints import rows

from fdistill_ops.integrations import Patch, Target, fastgen, fingerprint
from fdistill_ops.integrations.__main__ import _split, main
from fdistill_ops.integrations._fingerprint import fingerprint_in
from fdistill_ops.integrations._known import FASTGEN_WEIGHTINGS, KNOWN
from fdistill_ops.testing import assert_close

# -------------------------------------------------------------------------------------------------------- fingerprints

LOSS = """
def loss(x, teacher, *, alpha=1.2, text="a"):
    sigma_max = 80
    weight = 1 / (x - teacher)
    return alpha * weight + sigma_max
"""
SAME = {
    "comment": LOSS.replace("sigma_max = 80", "sigma_max = 80  # of EDM"),
    "docstring": LOSS.replace("    sigma_max = 80", '    """What it is."""\n\n    sigma_max = 80'),
    "format": LOSS.replace("1 / (x - teacher)", "(\n        1\n        / (x-teacher))"),
    "quotes": LOSS.replace('"a"', "'a'"),
    "annotations": LOSS.replace("x, teacher,", "x: Tensor, teacher: Tensor,").replace("):\n", ") -> Tensor:\n", 1),
    "annotated variable": LOSS.replace("sigma_max = 80", "sigma_max: int = 80\n    other: float"),
}
OTHER = {
    "operands": LOSS.replace("x - teacher", "teacher - x"),
    "numerator": LOSS.replace("1 /", "2 /"),
    "integer": LOSS.replace("= 80", "= 40"),
    "default": LOSS.replace("1.2", "1.1"),
    "text": LOSS.replace('"a"', '"b"'),
    "kind of parameter": LOSS.replace("*, ", ""),
    "name": LOSS.replace("sigma_max", "sigma_min"),
    "operator": LOSS.replace("* weight", "/ weight"),
    "decorator": f"import torch\n@torch.no_grad(){LOSS}",
    "type of number": LOSS.replace("= 80", "= 80.0"),
    "statement": LOSS.replace("    return", "    weight = weight * 2\n    return"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_says_the_same_has_the_same_fingerprint(name: str) -> None:
    assert SAME[name] != LOSS
    assert fingerprint(define(SAME[name])["loss"]) == fingerprint_in(LOSS, "loss")


@pytest.mark.parametrize("name", OTHER)
def test_what_says_something_else_has_another_fingerprint(name: str) -> None:
    assert OTHER[name] != LOSS
    assert fingerprint_in(OTHER[name], "loss") != fingerprint_in(LOSS, "loss")


def test_fingerprints_are_the_same_in_every_python() -> None:
    """Checked with 3.10 to 3.13; the constant holds it for whichever runs the tests."""
    assert fingerprint_in(LOSS, "loss") == "86dca8feff2c87b8"
    everything = (
        "async def f(a, /, b=(), *c, d=None, **e):\n"
        "    with a as x, b: y = [i async for i in a if i]\n"
        "    match a:\n        case [1, *_] | {'k': None}: pass\n"
        "    return f'{a!r:>{b}} {{{c}}}' 'd' if a else a[1:, ..., ::2] @ (lambda z: -z ** 2j)(b'')\n"
    )
    assert fingerprint_in(everything, "f") == "590051664e06c3f5"


def test_functions_without_a_fingerprint() -> None:
    namespace: dict[str, Any] = {}
    exec("def made(): pass", namespace)
    two = define("pair = [lambda r: r, lambda r: 2 * r]\n")["pair"]
    changed = define(LOSS)["loss"]
    changed.__kwdefaults__["alpha"] = 1.0
    for function, message in (
        (len, "builtin_function_or_method is not a Python function"),
        (namespace["made"], "the source of made cannot be read"),
        (two[0], "several lambdas in line 1"),
        (changed, "the defaults of loss are not those of its source"),
    ):
        with pytest.raises(ValueError, match=message):
            fingerprint(function)


def test_a_source_that_has_changed_since_it_was_imported() -> None:
    function = define(LOSS)["loss"]
    file = function.__code__.co_filename
    lines = [line.replace("80", "40") for line in linecache.cache[file][2]]  # type: ignore[misc]
    linecache.cache[file] = (1, None, lines, file)
    with pytest.raises(ValueError, match="is not what runs"):
        fingerprint(function)


# --------------------------------------------------------------------------------------------- mutations of code bases


@pytest.mark.parametrize("project", INTEGRATIONS)
def test_the_table_names_every_function(project: str) -> None:
    patch = INTEGRATIONS[project]._PATCH
    assert patch.known is KNOWN[patch.project] or patch.known == KNOWN[patch.project]
    assert sorted(patch.known) == sorted(str(target) for target in patch.targets)
    for known in patch.known.values():
        assert known and all(re.fullmatch("[0-9a-f]{16}", print_) for print_ in known)


@pytest.mark.skipif(not CHECKOUTS, reason="FDISTILL_CODEBASES is not set")
@pytest.mark.parametrize("project", INTEGRATIONS)
def test_checkouts_are_known(project: str) -> None:
    """From the files, without importing them."""
    for name, known in INTEGRATIONS[project]._PATCH.known.items():
        target = next(target for target in INTEGRATIONS[project]._PATCH.targets if str(target) == name)
        file, function = Path(str(CHECKOUTS)) / project / f"{target.module.replace('.', '/')}.py", target.name
        if function == "get_x0_from_noise":  # imported there
            file = file.with_name("utils.py")
        assert fingerprint_in(file.read_text(), function) in known


# What is changed in a checkout: file, old, new.
MUTATIONS = {
    "swapped": (
        "FastGen",
        "fastgen/methods/common_loss.py",
        "fake_score_x0 - teacher_x0",
        "teacher_x0 - fake_score_x0",
    ),
    "numerator": ("FastGen", "fastgen/methods/common_loss.py", "1 / (diff_abs_mean", "2 / (diff_abs_mean"),
    "sigma_max": ("SiD", "training/sid_loss.py", "sigma_max = 80", "sigma_max = 40"),
    "alpha": ("SiD", "training/sid_loss.py", "alpha=1.2", "alpha=1.0"),
    "guidance": (
        "CausVid",
        "causvid/dmd.py",
        "pred_real_image_cond - pred_real_image_uncond\n",
        "pred_real_image_cond\n",
    ),
}


@pytest.mark.skipif(not CHECKOUTS, reason="FDISTILL_CODEBASES is not set")
@pytest.mark.parametrize("name", MUTATIONS)
def test_changed_checkouts_are_refused(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project, file, old, new = MUTATIONS[name]
    top = file.split("/")[0]
    for folder in {top, "torch_utils"}:
        if (Path(str(CHECKOUTS)) / project / folder).is_dir():
            shutil.copytree(Path(str(CHECKOUTS)) / project / folder, tmp_path / project / folder)
    changed = tmp_path / project / file
    assert old in changed.read_text()
    changed.write_text(changed.read_text().replace(old, new))
    monkeypatch.setattr("integration_cases.CHECKOUTS", str(tmp_path))
    monkeypatch.setattr("integration_cases._imported", {})
    integration = INTEGRATIONS[project]
    with importable(project, "checkouts"):
        with pytest.raises(RuntimeError, match="is none that is known"):
            integration.patch()
        assert integration._PATCH.applied == ()
        with integration.patch(strict=False) as patched:
            assert patched.functions


# ---------------------------------------------------------------------------------------------- modules that have moved


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / (name.replace("__", "/") + ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    importlib.invalidate_caches()


ONE, TWO = "def one(x):\n    return x\n", "def two(x):\n    return -x\n"


def ours(x: Any) -> str:
    return "ours"


def two_functions(may_lack: str = "") -> Patch:
    return Patch(
        "the code base",
        [
            Target("fd_pack.first", "one", "x", replacement=ours),
            Target("fd_pack.second", "two", "x", replacement=ours, may_lack=may_lack),
        ],
        {"fd_pack.first.one": {"2a2a82bbf0ab65bc": "1.0"}, "fd_pack.second.two": {"b4908bf22d27a004": "1.0"}},
    )


def test_a_module_that_has_moved_is_refused(packages: Path) -> None:
    write(packages, fd_pack__first=ONE, fd_pack__renamed=TWO)
    first = importlib.import_module("fd_pack.first")
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"does not look as expected: it has no module fd_pack\.second"):
            two_functions().apply(strict)
        assert first.one(1) == 1
    assert "no module" in two_functions().check()[0].refusal


def test_fastgen_whose_f_distill_has_moved(packages: Path) -> None:
    shutil.copytree(RESTATED / "FastGen" / "fastgen", packages / "fastgen")
    methods = packages / "fastgen" / "methods" / "distribution_matching"
    (methods / "f_distill.py").rename(methods / "f_div.py")
    with importable("FastGen", f"moved to {packages}"):
        sys.path.insert(0, str(packages))
        with pytest.raises(RuntimeError, match=r"no module fastgen\.methods\.distribution_matching\.f_distill"):
            fastgen.patch(strict=False)
        loss = importlib.import_module("fastgen.methods.common_loss").variational_score_distillation_loss
        assert loss.__module__ == "fastgen.methods.common_loss"


@pytest.mark.parametrize("line", ["import fd_not_there", "from os import fd_not_there", "import fd_pack.not_there"])
def test_an_import_error_inside_is_passed_on(packages: Path, line: str) -> None:
    write(packages, fd_pack__first=ONE, fd_pack__second=f"{line}\n{TWO}")
    with pytest.raises(ImportError, match="not_there") as raised:
        two_functions().apply()
    assert "cannot be patched" not in str(raised.value)
    assert importlib.import_module("fd_pack.first").one(1) == 1


def test_what_a_part_may_lack(packages: Path) -> None:
    write(packages, fd_pack__first=ONE, fd_pack__second=f"import fd_not_there\n{TWO}")
    patch = two_functions("fd_not_there")
    with patch.apply() as patched:
        assert patched.functions == ("fd_pack.first.one",)
        assert "left out: fd_pack.second.two (No module named 'fd_not_there')" in repr(patched)
    assert patch.check()[1].left_out == "No module named 'fd_not_there'"


def test_what_is_wrapped_is_refused(packages: Path) -> None:
    twice = "def twice(f):\n    g = lambda x: 2 * f(x)\n    g.__wrapped__ = f\n    return g\n"
    write(packages, fd_pack__first=f"{twice}{ONE}one = twice(one)\n", fd_pack__second=TWO)
    with pytest.raises(RuntimeError, match=r"fd_pack\.first\.one is wrapped in another function"):
        two_functions().apply()
    assert importlib.import_module("fd_pack.first").one(1) == 2


def test_nothing_stays_swapped_where_swapping_fails(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(packages, fd_pack__first=ONE, fd_pack__second=TWO)
    patch, done = two_functions(), []
    replace = importlib.import_module("fdistill_ops.integrations._patching")._replace

    def failing(*arguments: Any) -> None:
        done.append(arguments)
        if len(done) == 2:
            raise KeyboardInterrupt
        replace(*arguments)

    monkeypatch.setattr("fdistill_ops.integrations._patching._replace", failing)
    with pytest.raises(KeyboardInterrupt):
        patch.apply()
    assert patch.applied == ()
    assert importlib.import_module("fd_pack.first").one(1) == 1


def test_rows_of_the_table_from_a_clone(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=tests", "-c", "user.email=tests@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    git("init")
    for text in (ONE, f"# comment\n{ONE}", ONE.replace("return x", "return 2 * x"), TWO):
        (tmp_path / "loss.py").write_text(text)
        git("add", ".")
        git("commit", "-m", "change")
    found = rows(str(tmp_path), "loss.py", "one")
    assert [row[0] for row in found] == [
        fingerprint_in(ONE, "one"),
        fingerprint_in(ONE.replace("return x", "return 2 * x"), "one"),
        "no one",
    ]
    assert found[0][1] != found[0][2]


# ------------------------------------------------------------------------------------------- FastGen's own weightings


@pytest.fixture
def f_distill() -> Iterator[Any]:
    with importable("FastGen", "restated"):
        yield importlib.import_module("fastgen.methods.distribution_matching.f_distill")


def test_fastgens_weightings_are_recognised(f_distill: Any) -> None:
    table = f_distill.all_f_div_weighting_function
    found = {name: FASTGEN_WEIGHTINGS[fingerprint(table[name])] for name in fastgen._DIVERGENCES}
    assert found == fastgen._DIVERGENCES


class Own(torch.nn.Module):
    def forward(self, r: torch.Tensor) -> torch.Tensor:
        return r.square() / (1 + r)


OWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "lambda": lambda r: 3 * r**0.25,
    "module": Own(),
    "another of FastGen's": None,  # type: ignore[dict-item]
    "constant": torch.ones_like,
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("name", ["js", "rkl", "kl"])
def test_a_built_in_that_was_replaced(f_distill: Any, name: str, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = f_distill.all_f_div_weighting_function
    monkeypatch.setitem(table, name, OWN[own] or table["sf"])
    theirs, mine = fdistill_model(f_distill, name), fdistill_model(f_distill, name)
    want = theirs._get_f_div_weighting_h(*batch(0))
    with fastgen.patch(strict=False):
        got = mine._get_f_div_weighting_h(*batch(0))
    torch.testing.assert_close(got, want, rtol=4e-6, atol=1e-7)


def test_a_model_without_a_weighting_function(f_distill: Any) -> None:
    model = fdistill_model(f_distill, "js")
    del model.f_div_weighting_function
    assert_close(
        fastgen.f_div_weighting_h(model, *batch(0)),
        fastgen.f_div_weighting_h(fdistill_model(f_distill, "js"), *batch(0)).double(),
        ulps=1,
    )
    model.config.f_distill.f_div = "mine"
    with pytest.raises(ValueError, match="f_div is 'mine', and the model has no f_div_weighting_function"):
        fastgen.f_div_weighting_h(model, *batch(0))


# ------------------------------------------------------------------------------------------------------------- compile


@pytest.mark.no_poison
@pytest.mark.parametrize("name", ["causvid", "causvid masked", "self-forcing dmd masked, fake guided"])
def test_video_losses_compile_without_a_graph_break(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    with importable(case.project, "restated"), case.integration.patch(strict=False):
        tensors = case.tensors(torch.float32)

        def run(compiled: bool) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            model = case.build(tensors)
            x = tensors["x"].clone().requires_grad_()
            torch.manual_seed(0)
            function = torch.compile(model.loss, fullgraph=True, backend="aot_eager") if compiled else model.loss
            loss, log = function(x)
            return loss, torch.autograd.grad(loss, x)[0], log

        torch._dynamo.reset()
        loss, gradient, log = run(True)
        want, want_gradient, want_log = run(False)
    assert torch.equal(loss, want)
    assert torch.equal(gradient, want_gradient)
    for key, value in want_log.items():
        assert type(log[key]) is torch.Tensor
        assert torch.equal(log[key], value.clone()), key


# --------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("line", "own", "program"),
    [
        ("fastgen --loose train.py --loose", "fastgen --loose", "train.py --loose"),
        ("--loose fastgen train.py", "--loose fastgen", "train.py"),
        ("fastgen --check", "fastgen --check", ""),
        ("fastgen -m pytest -m x", "fastgen", "-m pytest -m x"),
        ("fastgen -mpytest -x", "fastgen", "-m pytest -x"),
        ("fastgen --check -m pytest", "fastgen --check", "-m pytest"),
        ("fastgen -- train.py --check", "fastgen", "train.py --check"),
        ("fastgen train.py -- a", "fastgen", "train.py -- a"),
    ],
)
def test_what_belongs_to_the_program(line: str, own: str, program: str) -> None:
    assert _split(line.split()) == (own.split(), program.split())


def run_main(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    output = capsys.readouterr()
    return stopped.value.code, output.out, output.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fastgen", "--lose", "x.py"], "--lose"),
        (["fastgen", "no_such_file.py"], "there is no no_such_file.py"),
        (["--loose"], "code_base"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run_main(capsys, *arguments)
    assert status == 2
    assert message in error
    assert "Traceback" not in error


def one_sentence(error: str) -> str:
    lines = error.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("python -m fdistill_ops.integrations: error: ")
    return lines[0]


def test_refusals_are_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("raise SystemError('must not run')")
    program = str(tmp_path / "train.py")
    with importable("FastGen", "nowhere"):
        status, _, error = run_main(capsys, "fastgen", program)
        assert status == 1
        assert "NVlabs/FastGen cannot be patched, it cannot be imported" in one_sentence(error)
    with importable("FastGen", "restated"):
        sys.path.insert(0, "")  # which becomes the folder of the program
        status, _, error = run_main(capsys, "fastgen", program)
        assert status == 1
        assert "is none that is known" in one_sentence(error)
        assert fastgen._PATCH.applied == ()
        status, _, error = run_main(capsys, "fastgen", "--loose", "-m", "fd_no_such_module")
        assert status == 1
        assert error.endswith("error: there is no module fd_no_such_module\n")
        assert fastgen._PATCH.applied == ()


def test_an_import_error_inside_a_code_base_is_one_sentence_with_its_place(
    capsys: pytest.CaptureFixture[str], packages: Path
) -> None:
    with importable("SiD", f"broken in {packages}"):
        write(packages, training__sid_loss="import os\nimport fd_not_there\n")
        sys.path.insert(0, str(packages))
        status, _, error = run_main(capsys, "sid", "--check")
    assert status == 1
    place = os.path.join("training", "sid_loss.py")
    assert re.search(rf"No module named 'fd_not_there' \(imported in .*{place}, line 2\)", one_sentence(error))


def test_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with importable("SiD", "restated"):
        loss_class = importlib.import_module("training.sid_loss").SID_EDMLoss
        original = loss_class.generator_loss
        status, output, _ = run_main(capsys, "sid", "--check")
        assert status == 1
        assert "training.sid_loss.SID_EDMLoss.generator_loss: refused: " in output
        assert "would be refused: nothing would be patched" in output
        status, output, _ = run_main(capsys, "sid", "--check", "--loose")
        assert status == 0
        assert "generator_loss: has the parameters that are expected, would be replaced" in output
        name = str(INTEGRATIONS["SiD"]._PATCH.targets[0])
        known = {name: {fingerprint(original): "abc..def"}}
        monkeypatch.setattr(INTEGRATIONS["SiD"]._PATCH, "known", known)
        status, output, _ = run_main(capsys, "sid", "--check")
        assert status == 0
        assert "generator_loss: known from abc..def, would be replaced" in output
        assert output.endswith("would be patched\n")
        assert loss_class.generator_loss is original


@pytest.mark.slow
def test_options_after_the_code_base_and_those_of_the_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys\nprint(*sys.argv[1:])\n")
    shutil.copytree(RESTATED / "SiD" / "training", tmp_path / "training")
    line = ["-m", "fdistill_ops.integrations", "sid", "--loose", tmp_path / "program.py", "--check", "--loose"]
    assert run_python(line, tmp_path) == "--check --loose\n"
