"""patch() and unpatch(): what is swapped, what is refused, and that nothing else is touched."""

from __future__ import annotations

import linecache
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from integration_cases import RESTATED, SOURCES, importable
from test_readme import run_python

import fdistill_ops as fd
from fdistill_ops.integrations import Patch, Target, causvid, dmd2, fastgen, fastvideo, fingerprint, self_forcing, sid
from fdistill_ops.integrations.__main__ import main

INTEGRATIONS = {
    "FastGen": fastgen,
    "DMD2": dmd2,
    "CausVid": causvid,
    "Self-Forcing": self_forcing,
    "SiD": sid,
    "FastVideo": fastvideo,
}


def function(target: Target, source: str = "return 'original'", defaults: str = "") -> Any:
    """A function with the parameters that the target asks for and a source that can be read."""
    name = target.name.split(".")[-1]
    text = f"def {name}({', '.join(target.parameters.split())}{defaults}):\n    {source}\n"
    return define(text)[name]


def define(text: str) -> dict[str, Any]:
    """What a text defines, as if it had been read from a file."""
    file = f"<{len(linecache.cache)} of the tests>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"torch": torch, "Tensor": torch.Tensor}
    exec(compile(text, file, "exec", dont_inherit=True), namespace)
    return namespace


def install(monkeypatch: pytest.MonkeyPatch, targets: tuple[Target, ...]) -> dict[str, Any]:
    """Puts modules with such functions into sys.modules. Returns the functions by module and name."""
    made = {}
    for target in targets:
        if target.module not in sys.modules:
            monkeypatch.setitem(sys.modules, target.module, ModuleType(target.module))
        owner: Any = sys.modules[target.module]
        *classes, name = target.name.split(".")
        for part in classes:
            if not hasattr(owner, part):
                setattr(owner, part, type(part, (), {"__module__": target.module}))
            owner = getattr(owner, part)
        setattr(owner, name, function(target))
        made[f"{target.module}.{target.name}"] = getattr(owner, name)
    return made


def now(targets: tuple[Target, ...]) -> dict[str, Any]:
    found = {}
    for target in targets:
        owner: Any = sys.modules[target.module]
        for part in target.name.split("."):
            owner = getattr(owner, part)
        found[f"{target.module}.{target.name}"] = owner
    return found


@pytest.fixture(params=INTEGRATIONS, ids=str)
def integration(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Each integration, with functions in place that look as it expects."""
    with importable(request.param, "nowhere"):
        module = INTEGRATIONS[request.param]
        with monkeypatch.context() as patcher:
            made = install(patcher, module._PATCH.targets)
            known = {name: {fingerprint(original): "the version of the tests"} for name, original in made.items()}
            patcher.setattr(module._PATCH, "known", known)
            yield module
        module.unpatch()


def replaced(integration: Any) -> list[str]:
    return [f"{t.module}.{t.name}" for t in integration._PATCH.targets if t.replacement is not None]


def test_patch_and_unpatch(integration: Any) -> None:
    targets = integration._PATCH.targets
    before = now(targets)
    patched = integration.patch()
    assert sorted(patched.functions) == sorted(replaced(integration))
    assert all(name in repr(patched) for name in patched.functions)
    during = now(targets)
    for name, original in before.items():
        assert (during[name] is not original) == (name in replaced(integration))
    integration.unpatch()
    assert now(targets) == before
    integration.unpatch()  # nothing is left to undo
    assert now(targets) == before


def test_context_manager(integration: Any) -> None:
    targets = integration._PATCH.targets
    before = now(targets)
    with pytest.raises(KeyError), integration.patch():
        assert now(targets) != before
        raise KeyError
    assert now(targets) == before
    integration.patch()
    during = now(targets)
    with integration.patch() as again:  # patched already: this context has nothing to undo
        assert sorted(again.functions) == sorted(replaced(integration))
        assert now(targets) == during
    assert now(targets) == during


def test_other_parameters_are_refused(integration: Any) -> None:
    for target in integration._PATCH.targets:
        install_one(target, function(target._replace(parameters=f"{target.parameters} another")))
        before = now(integration._PATCH.targets)
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=rf"{target.name} takes \(.*another\), not"):
                integration.patch(strict)
            assert now(integration._PATCH.targets) == before
        install_one(target, function(target))


def test_another_body_is_refused(integration: Any) -> None:
    for target in integration._PATCH.targets:
        other = function(target, "return 'another'")
        install_one(target, other)
        before = now(integration._PATCH.targets)
        with pytest.raises(
            RuntimeError,
            match=f"{target.name} is none that is known .*{fingerprint(other)}.* of the version of the tests",
        ):
            integration.patch()
        assert now(integration._PATCH.targets) == before
        with integration.patch(strict=False):
            assert now(integration._PATCH.targets) != before
        install_one(target, function(target))


@pytest.mark.parametrize("wrong", [None, len, "text", torch.nn.Identity()], ids=["gone", "builtin", "text", "module"])
def test_what_is_no_function_is_refused(integration: Any, wrong: Any) -> None:
    target = integration._PATCH.targets[-1]
    install_one(target, wrong)
    with pytest.raises(RuntimeError, match=r"does not look as expected.*" + target.name):
        integration.patch()
    assert integration._PATCH.applied == ()


def install_one(target: Target, value: Any) -> None:
    owner: Any = sys.modules[target.module]
    *classes, name = target.name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    if value is None:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


@pytest.mark.parametrize("project", INTEGRATIONS)
def test_code_bases_that_are_not_there(project: str) -> None:
    with importable(project, "nowhere"), pytest.raises(ImportError, match=r"cannot be patched.*No module named"):
        INTEGRATIONS[project].patch()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("project", INTEGRATIONS)
def test_code_bases(project: str, source: str) -> None:
    """Every attribute of every module and class is what it was, but for the functions that are swapped."""

    def everything() -> dict[str, Any]:
        tops = {target.module.split(".")[0] for target in integration._PATCH.targets}
        found = {}
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] in tops:
                for key, value in vars(module).items():
                    found[f"{name}.{key}"] = value
                    if isinstance(value, type) and value.__module__ == name:
                        for owner in value.__mro__[:-1]:
                            found |= {f"{name}.{key}.{owner.__name__}.{k}": v for k, v in vars(owner).items()}
        return found

    integration = INTEGRATIONS[project]
    with importable(project, source):
        try:
            integration.patch(strict=source != "restated")
        except ImportError as error:
            pytest.skip(str(error))
        during = everything()
        integration.unpatch()
        before = everything()
        with integration.patch(strict=source != "restated"):
            assert everything().keys() == during.keys()
        changed = {name for name, value in before.items() if during[name] is not value}
    names = {target.name.split(".")[-1] for target in integration._PATCH.targets if target.replacement is not None}
    assert changed
    assert {name.split(".")[-1] for name in changed} == names
    if project == "FastGen":
        loss = "variational_score_distillation_loss"
        methods = "fastgen.methods.distribution_matching"
        wanted = {f"fastgen.methods.common_loss.{loss}", f"{methods}.dmd2.{loss}", f"{methods}.f_distill.{loss}"}
        assert wanted <= changed


# ----------------------------------------------------------------------------------------------------------- mechanics


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """A package whose function is imported by name inside and outside."""
    modules = {name: ModuleType(name) for name in ("pack", "pack.loss", "pack.train", "outside", "package")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    exec("def loss(x): return x.sum()\ndef other(x): return x", vars(modules["pack.loss"]))
    for name in ("pack.train", "outside", "package"):
        modules[name].loss = modules["pack.loss"].loss  # type: ignore[attr-defined]
    modules["pack.train"].renamed = modules["pack.loss"].loss  # type: ignore[attr-defined]
    return modules


def ours(x: Any) -> str:
    return "ours"


def patch_of(uses: str = "sum") -> Patch:
    return Patch("the package", [Target("pack.loss", "loss", "x", uses, ours)])


def test_imports_by_name_are_reached(package: dict[str, ModuleType]) -> None:
    original = package["pack.loss"].loss
    patch = patch_of()
    with patch.apply():
        assert package["pack.loss"].loss is ours
        assert package["pack.train"].loss is ours
        assert package["pack.train"].renamed is ours
        assert package["outside"].loss is package["package"].loss is original
        late = ModuleType("pack.late")
        late.loss = package["pack.loss"].loss  # imported while the patch is on
        sys.modules["pack.late"] = late
    del sys.modules["pack.late"]
    assert late.loss is package["pack.train"].renamed is package["pack.loss"].loss is original


def test_what_others_swapped_in_stays(package: dict[str, ModuleType]) -> None:
    patch = patch_of()
    with patch.apply():
        package["pack.train"].loss = "theirs"
    assert package["pack.train"].loss == "theirs"


def test_nothing_is_swapped_where_one_is_refused(package: dict[str, ModuleType]) -> None:
    original = package["pack.loss"].loss
    patch = Patch("the package", [*patch_of().targets, Target("pack.loss", "other", "x y", "", ours)])
    with pytest.raises(RuntimeError, match=r"other takes \(x\), not \(x, y\)"):
        patch.apply()
    assert package["pack.loss"].loss is package["pack.train"].loss is original


def test_modules_that_are_not_there_are_left_out(package: dict[str, ModuleType]) -> None:
    patch = Patch("the package", [*patch_of().targets, Target("pack_not_there", "other", "x", "", ours)])
    with patch.apply() as patched:
        assert patched.functions == ("pack.loss.loss",)


class Base:
    def inner(self) -> str:
        return "inner"

    def outer(self) -> str:
        return f"original {self.inner()}"


class Same(Base):
    pass


class Own(Base):
    def inner(self) -> str:
        return "own"


def test_subclasses_with_an_inner_method_of_their_own_keep_the_original() -> None:
    def outer(self: Any) -> str:
        return "ours"

    patch = Patch("these classes", [Target(__name__, "Same.outer", "self", "inner", outer, inner="inner")])
    with patch.apply() as patched:
        assert patched.functions == (f"{__name__}.Base.outer",)  # where the method is
        assert Base().outer() == Same().outer() == "ours"
        assert Own().outer() == "original own"
    assert Same().outer() == "original inner"
    assert "outer" not in vars(Same)


def test_reachable_from_the_package() -> None:
    assert fd.integrations.fastgen is fastgen


# --------------------------------------------------------------------------------------------------- the command line


PROGRAM = """
import sys
from fastgen.methods.distribution_matching import dmd2
print(dmd2.variational_score_distillation_loss.__module__, *sys.argv[1:])
"""


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    """A script, and a module, with arguments of their own; the code base is where the script is, or on the path."""
    (tmp_path / "program.py").write_text(PROGRAM)
    shutil.copytree(RESTATED / "FastGen" / "fastgen", tmp_path / "fastgen")
    command = ["-m", "fdistill_ops.integrations", "--loose", "fastgen"]
    for program in ([tmp_path / "program.py"], ["-m", "program"]):
        output = run_python([*command, *program, "--config", "a b"], tmp_path)
        assert output == "fdistill_ops.integrations.fastgen --config a b\n"


@pytest.mark.parametrize("arguments", [[], ["no-such-code-base", "x.py"], ["fastgen"], ["fastgen", "-m"]])
def test_wrong_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err
