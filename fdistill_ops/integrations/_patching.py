"""Swapping functions of an installed code base for ours, and back."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import CodeType, ModuleType, TracebackType
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A function of a code base, how it looks in the version this package was written for, and what takes its place.

    Attributes:
        module, name: where it is defined; ``name`` is ``"function"`` or ``"Class.method"``.
        parameters: the names of its parameters, separated by spaces.
        uses: every name its body refers to (globals, attributes, methods), and every float in it.
        replacement: what takes its place; None for a function that is only looked at, because a replacement does its
            work as well.
        inner: a method of the same class whose work the replacement does as well. Where a subclass has its own, the
            original goes on calling that.
    """

    module: str
    name: str
    parameters: str
    uses: str
    replacement: Callable[..., Any] | None = None
    inner: str = ""


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
    """

    def __init__(self, project: str, targets: Sequence[Target]) -> None:
        self.project, self.targets = project, tuple(targets)
        self._swaps: list[_Swap] = []

    def apply(self, strict: bool = True) -> Patched:
        """Swaps every target in the modules that can be imported: where it is defined, and in every module of its
        package that has imported it by name. Nothing is swapped where something is refused. Where the targets are
        swapped already nothing happens, and leaving the result as a context keeps them.

        Args:
            strict: also refuse a function whose body refers to other names or floats than expected. Without it the
                names of its parameters alone are compared.

        Raises:
            ImportError: none of the modules can be imported.
            RuntimeError: a function is missing or does not look as expected; the message says which and how.
        """
        if self._swaps:
            return Patched(self, owner=False)
        swaps, looked_at, absent = [], 0, {}
        for target in self.targets:
            if target.module not in absent:
                try:
                    importlib.import_module(target.module)
                except ImportError as error:
                    absent[target.module] = f"{target.module}: {error}"
            if target.module in absent:
                continue
            looked_at += 1
            owner, name, original = self._find(target)
            self._compare(target, original, strict)
            if target.replacement is not None:
                replacement = _unless_overridden(owner, target, original) if target.inner else target.replacement
                swaps.append(_Swap(owner, name, original, replacement))
        if not looked_at:
            raise ImportError(f"{self.project} cannot be patched, it cannot be imported: {'; '.join(absent.values())}")
        for swap in swaps:
            _replace(swap.owner, swap.name, swap.original, swap.replacement)
        self._swaps = swaps
        return Patched(self, owner=True)

    def revert(self) -> None:
        """Puts the originals back, wherever ours still stands. Does nothing where nothing is swapped."""
        swaps, self._swaps = self._swaps, []
        for swap in swaps:
            _replace(swap.owner, swap.name, swap.replacement, swap.original)

    @property
    def applied(self) -> tuple[str, ...]:
        """What is swapped at the moment, as ``"module.name"``."""
        return tuple(f"{_module_of(swap.owner)}.{swap.name}" for swap in self._swaps)

    def _find(self, target: Target) -> tuple[Any, str, Any]:
        """The module, or the class, whose own attribute the function is; its name there; the function."""
        owner: Any = sys.modules[target.module]
        *classes, name = target.name.split(".")
        for part in classes:
            owner = getattr(owner, part, None)
        for holder in getattr(owner, "__mro__", [owner]):
            if name in getattr(holder, "__dict__", {}):
                return holder, name, vars(holder)[name]
        raise RuntimeError(f"{self.project} does not look as expected: {target.module} has no {target.name}")

    def _compare(self, target: Target, original: Any, strict: bool) -> None:
        where = f"{self.project} does not look as expected: {target.module}.{target.name}"
        function = inspect.unwrap(original) if callable(original) else original
        if not inspect.isfunction(function):
            raise RuntimeError(f"{where} is {type(original).__name__}, not a Python function")
        code = function.__code__
        parameters = list(inspect.signature(function).parameters)
        if parameters != target.parameters.split():
            raise RuntimeError(f"{where} takes ({', '.join(parameters)}), not ({target.parameters.replace(' ', ', ')})")
        if strict:
            found, known = set(_uses(code)), set(target.uses.split())
            new, gone = sorted(found - known), sorted(known - found)
            if new or gone:
                changes = [f"uses {' '.join(new)}"] * bool(new) + [f"no longer uses {' '.join(gone)}"] * bool(gone)
                raise RuntimeError(
                    f"{where} {' and '.join(changes)}. If it computes the same all the same, pass strict=False"
                )


class Patched:
    """A code base on our functions. As a context manager it puts the originals back on the way out, unless they had
    been swapped before it was made."""

    def __init__(self, patch: Patch, owner: bool) -> None:
        self._patch, self._owner = patch, owner
        self.functions = patch.applied

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._owner:
            self._patch.revert()

    def __repr__(self) -> str:
        return f"<{self._patch.project} on fdistill_ops: {', '.join(self.functions)}>"


def _unless_overridden(owner: type, target: Target, original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement, as a method that hands over to the original in subclasses with an inner method of their own."""
    replacement, inner = target.replacement, getattr(owner, target.inner)
    assert replacement is not None

    @functools.wraps(replacement)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = replacement if getattr(type(self), target.inner) is inner else original
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
