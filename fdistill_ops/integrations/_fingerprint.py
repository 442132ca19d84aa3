"""What a function computes, as a short hash: docstrings, comments, formatting and annotations do not change it,
anything else does. It is the same in every version of Python."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import itertools
import linecache
from collections.abc import Iterator
from types import CodeType
from typing import Any, NoReturn

# Not part of what is computed, or there in some versions of Python alone.
_LEFT_OUT = {"annotation", "returns", "type_comment", "type_params", "kind", "ctx"}
_BLOCKS = {"body", "orelse", "finalbody"}


def fingerprint(function: Any) -> str:
    """The fingerprint of a Python function, or lambda, from its source: 16 hexadecimal digits of a hash of its syntax
    tree, decorators included, without docstrings, comments, formatting and annotations.

    Raises:
        ValueError: it is no Python function; or its source cannot be read, is not what runs, or is one of several
            different lambdas in a line.
    """
    if not inspect.isfunction(function):
        raise ValueError(f"{type(function).__name__} is not a Python function")
    node = _node(function.__code__, function.__code__.co_filename)
    defaults = (function.__defaults__ or ()), (function.__kwdefaults__ or {})
    _compare_defaults(node.args, *defaults, function.__name__)
    return _hash(node)


def decorated(function: Any) -> bool:
    """Whether the source of a Python function has decorators, of which its fingerprint knows."""
    return bool(getattr(_node(function.__code__, function.__code__.co_filename), "decorator_list", ()))


def fingerprint_in(source: str, name: str) -> str | None:
    """The fingerprint of ``"function"`` or ``"Class.method"`` in the text of a module; None where it has none."""
    node: Any = ast.parse(source)
    for part in name.split("."):
        named = [entry for entry in node.body if getattr(entry, "name", None) == part]
        if not named:
            return None
        node = named[-1]
    return _hash(node)


@functools.lru_cache(maxsize=256)
def _node(code: CodeType, file: str) -> Any:
    """The syntax tree of a function in a file. (Code of another file may be equal.)"""
    lines = linecache.getlines(file) or _lines(code)
    try:
        tree = ast.parse("".join(lines))
        runs = any(other == code for other in _codes(compile(tree, file, "exec", dont_inherit=True)))
    except SyntaxError:
        _refuse(f"the source of {code.co_name} cannot be read")
    nodes = [node for node in ast.walk(tree) if _is_of(node, code)]
    if not nodes:
        _refuse(f"the source of {code.co_name} cannot be read")
    if not runs:
        _refuse(f"the source of {code.co_name} in {file} is not what runs: has it changed since?")
    if len({_hash(node) for node in nodes}) > 1:
        _refuse(f"there are several lambdas in line {code.co_firstlineno} of {file}")
    return nodes[0]


def _lines(code: CodeType) -> list[str]:
    try:
        return inspect.findsource(code)[0]
    except OSError:
        return []


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_of(node: Any, code: CodeType) -> bool:
    if isinstance(node, ast.Lambda):
        return code.co_name == "<lambda>" and node.lineno == code.co_firstlineno
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name != code.co_name:
        return False
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) == code.co_firstlineno


def _compare_defaults(args: ast.arguments, positional: Any, keywords: Any, name: str) -> None:
    """Whether the defaults are those in the source, as far as those are literals."""
    in_source = {a.arg: d for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True) if d is not None}
    pairs = itertools.zip_longest(
        [*args.defaults, *in_source.values()], [*positional, *(keywords.get(key) for key in in_source)]
    )
    for node, value in pairs:
        try:
            literal = ast.literal_eval(node)
        except (ValueError, TypeError):
            continue
        if type(literal) is not type(value) or literal != value:
            _refuse(f"the defaults of {name} are not those of its source")


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _hash(node: Any) -> str:
    return hashlib.sha256("".join(_text(node)).encode()).hexdigest()[:16]


def _text(node: Any) -> Iterator[str]:
    """The syntax tree as text. What is absent, or in _LEFT_OUT, is not named."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:  # "x: int = 1" is "x = 1"
        node = ast.Assign([node.target], node.value)
    if isinstance(node, ast.AST):
        yield f"{type(node).__name__}("
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and name in _BLOCKS:
                value = [statement for statement in value if not _says_nothing(statement)]
            if isinstance(node, ast.JoinedStr):
                value = list(_joined(value))
            if name not in _LEFT_OUT and value is not None and value != []:
                yield f"{name}="
                yield from _text(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for entry in node:
            yield from _text(entry)
            yield ","
        yield "]"
    else:
        yield f"{type(node).__name__}:{node!r}"


def _joined(parts: list[Any]) -> Iterator[Any]:
    """The parts of an f-string, whose texts versions of Python split differently."""
    text = ""
    for part in [*parts, None]:
        if isinstance(part, ast.Constant):
            text += str(part.value)
            continue
        if text:
            yield ast.Constant(text)
        if part is not None:
            yield part
        text = ""


def _says_nothing(node: Any) -> bool:
    """A docstring or another text that is a statement, a bare annotation, "pass"."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return isinstance(node, ast.Pass) or (isinstance(node, ast.AnnAssign) and node.value is None)
