"""Swapping functions of an installed code base for ours, and back."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, ModuleType, TracebackType
from typing import Any, NamedTuple

from ._fingerprint import decorated, fingerprint


class Target(NamedTuple):
    """A function of a code base, and what takes its place.

    Attributes:
        module, name: where it is defined; ``name`` is ``"function"`` or ``"Class.method"``.
        parameters: the names of its parameters, separated by spaces.
        uses: every name its body refers to (globals, attributes, methods), and every float in it: how it is recognised
            where its patch knows no fingerprint of it. Two functions of one arithmetic may use the same and differ.
        replacement: what takes its place; None for a function that is only looked at, because a replacement does its
            work as well.
        inner: a method of the same class whose work the replacement does as well. Where a subclass has its own, the
            original goes on calling that.
        may_lack: modules, separated by spaces, without which its own cannot be imported and is left out: packages that
            only a part of the code base needs, or a part of the code base that other versions do not have.
    """

    module: str
    name: str
    parameters: str
    uses: str = ""
    replacement: Callable[..., Any] | None = None
    inner: str = ""
    may_lack: str = ""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Finding(NamedTuple):
    """What :meth:`Patch.check` finds of a target.

    Attributes:
        function: ``"module.name"``.
        replaced: whether it is to be replaced, or only looked at.
        versions: of the code base, in which it is the same; empty where it was recognised by other means.
        left_out: why it is left out, or empty.
        refusal: why it is refused, or empty.
    """

    function: str
    replaced: bool
    versions: str = ""
    left_out: str = ""
    refusal: str = ""


class Refused(RuntimeError):
    """A code base that does not look as expected."""


class _Swap(NamedTuple):
    owner: Any  # a module or a class
    name: str
    original: Any
    replacement: Any


class Patch:
    """The functions of one code base: :meth:`apply` swaps them, :meth:`revert` swaps them back.

    Args:
        project: what messages call the code base.
        targets: its functions.
        known: for functions, as ``"module.name"``, the fingerprints (:func:`fdistill_ops.integrations.fingerprint`)
            with which they are accepted, each with the versions that have it.
    """

    def __init__(
        self, project: str, targets: Sequence[Target], known: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        self.project, self.targets, self.known = project, tuple(targets), dict(known or {})
        self._swaps: list[_Swap] = []
        self._findings: list[Finding] = []

    def apply(self, strict: bool = True) -> Patched:
        """Swaps every target: where it is defined, and in every module of its package that has imported it by name.
        Nothing is swapped where something is refused. Where the targets are swapped already nothing happens, and
        leaving the result as a context keeps them.

        Args:
            strict: also refuse a function that is not known. Without it the names of its parameters alone are compared.

        Raises:
            ImportError: the code base is not installed, or cannot be imported itself.
            RuntimeError: a module or a function is missing or does not look as expected; the message says which and
                how.
        """
        if self._swaps:
            return Patched(self, owner=False)
        swaps, findings = self._examine(strict)
        for finding in findings:
            if finding.refusal:
                raise Refused(finding.refusal)
        self._findings = findings
        try:
            for swap in swaps:
                self._swaps.append(swap)
                _replace(swap.owner, swap.name, swap.original, swap.replacement)
        except BaseException:
            self.revert()
            raise
        return Patched(self, owner=True)

    def check(self, strict: bool = True) -> list[Finding]:
        """What :meth:`apply` would find, target by target; changes nothing.

        Raises:
            ImportError: as :meth:`apply`.
        """
        return list(self._findings) if self._swaps else self._examine(strict)[1]

    def revert(self) -> None:
        """Puts the originals back, wherever ours still stands. Does nothing where nothing is swapped."""
        swaps, self._swaps = self._swaps, []
        for swap in swaps:
            _replace(swap.owner, swap.name, swap.replacement, swap.original)

    @property
    def applied(self) -> tuple[str, ...]:
        """What is swapped at the moment, as ``"module.name"``."""
        return tuple(f"{_module_of(swap.owner)}.{swap.name}" for swap in self._swaps)

    def _examine(self, strict: bool) -> tuple[list[_Swap], list[Finding]]:
        absent = {}
        for target in self.targets:
            try:
                absent[target] = self._import(target)
            except Refused as error:
                return [], [Finding(str(target), target.replacement is not None, refusal=str(error))]
        if all(absent.values()):
            reasons = "; ".join(dict.fromkeys(f"{target.module}: {reason}" for target, reason in absent.items()))
            raise ImportError(f"{self.project} cannot be patched, it cannot be imported: {reasons}")
        swaps, findings = [], []
        for target in self.targets:
            finding = Finding(str(target), target.replacement is not None, left_out=absent[target])
            if not finding.left_out:
                try:
                    owner, name, original = self._find(target)
                    finding = finding._replace(versions=self._compare(target, original, strict))
                except Refused as error:
                    finding = finding._replace(refusal=str(error))
                else:
                    if target.replacement is not None:
                        ours = _unless_overridden(owner, target, original) if target.inner else target.replacement
                        swaps.append(_Swap(owner, name, original, ours))
            findings.append(finding)
        return swaps, findings

    def _import(self, target: Target) -> str:
        """Imports the module. Returns why it is left out, or nothing."""
        try:
            importlib.import_module(target.module)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing == target.module.partition(".")[0] or missing in target.may_lack.split():
                return str(error)
            if f"{target.module}.".startswith(f"{missing}."):
                where = getattr(sys.modules.get(target.module.partition(".")[0]), "__file__", None)
                found = f" (what is imported is {where})" if where else ""
                raise Refused(
                    f"{self.project} does not look as expected: it has no module {target.module}{found}"
                ) from error
            raise
        return ""

    def _find(self, target: Target) -> tuple[Any, str, Any]:
        """The module, or the class, whose own attribute the function is; its name there; the function."""
        owner: Any = sys.modules[target.module]
        *classes, name = target.name.split(".")
        for part in classes:
            owner = getattr(owner, part, None)
        for holder in getattr(owner, "__mro__", [owner]):
            if name in getattr(holder, "__dict__", {}):
                return holder, name, vars(holder)[name]
        raise Refused(f"{self.project} does not look as expected: {target.module} has no {target.name}")

    def _compare(self, target: Target, original: Any, strict: bool) -> str:
        """The versions which the function is known from."""
        where = f"{self.project} does not look as expected: {target}"
        function = inspect.unwrap(original) if callable(original) else original
        if not inspect.isfunction(function):
            raise Refused(f"{where} is {type(original).__name__}, not a Python function")
        parameters = list(inspect.signature(function).parameters)
        if parameters != target.parameters.split():
            raise Refused(f"{where} takes ({', '.join(parameters)}), not ({target.parameters.replace(' ', ', ')})")
        if not strict:
            return ""
        known = self.known.get(str(target))
        if known is None:
            _compare_uses(where, target, function)
            return ""
        try:
            found, wrapped = fingerprint(function), function is not original and not decorated(function)
        except ValueError as error:
            raise Refused(f"{where} cannot be recognised, {error}{_LOOSE}") from None
        if found not in known:
            listed = ", ".join(f"{print_} of {versions}" for print_, versions in known.items())
            raise Refused(f"{where} is none that is known (its fingerprint is {found}, not {listed}){_LOOSE}")
        if wrapped:
            raise Refused(f"{where} is wrapped in another function, which would be lost{_LOOSE}")
        return known[found]


_LOOSE = "; strict=False (--loose) compares no more than the names of its parameters"


class Patched:
    """A code base on our functions. As a context manager it puts the originals back on the way out, unless they had
    been swapped before it was made."""

    def __init__(self, patch: Patch, owner: bool) -> None:
        self._patch, self._owner = patch, owner
        self.functions = patch.applied
        self._left_out = [f"{finding.function} ({finding.left_out})" for finding in patch.check() if finding.left_out]

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owner:
            self._patch.revert()

    def __repr__(self) -> str:
        left_out = f"; left out: {', '.join(self._left_out)}" if self._left_out else ""
        return f"<{self._patch.project} on fdistill_ops: {', '.join(self.functions)}{left_out}>"


def _compare_uses(where: str, target: Target, function: Any) -> None:
    found, known = set(_uses(function.__code__)), set(target.uses.split())
    new, gone = sorted(found - known), sorted(known - found)
    if new or gone:
        changes = [f"uses {' '.join(new)}"] * bool(new) + [f"no longer uses {' '.join(gone)}"] * bool(gone)
        raise Refused(f"{where} {' and '.join(changes)}{_LOOSE}")


def _unless_overridden(owner: type, target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement, as a method that hands over to the original in subclasses with an inner method of their own."""
    replacement, inner = target.replacement, getattr(owner, target.inner)
    assert replacement is not None

    @functools.wraps(replacement)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = getattr(self, target.inner)
        chosen = replacement if getattr(bound, "__func__", bound) is inner else original
        return chosen(self, *args, **kwargs)

    return method


def _module_of(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"


def _replace(owner: Any, name: str, old: Any, new: Any) -> None:
    """In a class the attribute; for a function of a module, that and every module of the same package which holds the
    same function, under whatever name."""
    if not isinstance(owner, ModuleType):
        if vars(owner).get(name) is old:
            setattr(owner, name, new)
        return
    package = owner.__name__.partition(".")[0]
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] != package:
            continue
        for attribute in [key for key, value in vars(module).items() if value is old]:
            setattr(module, attribute, new)


def _uses(code: CodeType) -> Iterator[str]:
    """Names and floats of a function's code, the functions in it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, float):
            yield repr(constant)
        elif isinstance(constant, CodeType):
            yield from _uses(constant)
