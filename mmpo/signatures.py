"""What a room's function may be given, read from its file: `mmpo config explain` tells it without torch."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_origin

from mmpo import find, limits

_NAMES: dict[str, Any] = {t.__name__: t for t in (bool, int, float, str, list, dict, tuple, Path)}
_NAMES |= {name: kind for name, kind in vars(limits).items() if get_origin(kind) is Annotated}
_NAMES |= {"Any": Any, "Literal": Literal, "Sequence": Sequence, "__builtins__": {}}


class Parameter(NamedTuple):
    """kind: Any where it cannot be told without imports. default: ... where there is none."""

    kind: Any
    default: Any


def options(room: str, name: str, without: frozenset[str] = frozenset()) -> dict[str, Parameter] | None:
    """The keyword-only parameters of a room's function, of a plugin all but `without`; None where it takes any.

    Raises RecipeError for a name that there is not.
    """
    if ":" in name:
        return _imported(find.find(room, name), without)
    find.require(room, name)
    spec = importlib.util.find_spec(f"mmpo.{room}.{name}")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.Module([], [])
    function = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name), None)
    if function is None or function.args.kwarg:
        return None
    given = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {argument.arg: _parameter(argument.annotation, default) for argument, default in given}


def _imported(function: Any, without: frozenset[str]) -> dict[str, Parameter] | None:
    found = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in found):
        return None
    return {p.name: Parameter(Any, ... if p.default is p.empty else p.default) for p in found if p.name not in without}


def _kind(annotation: ast.expr | None) -> Any:
    if annotation is None:
        return Any
    try:
        return eval(compile(ast.Expression(annotation), "annotation", "eval"), dict(_NAMES))  # of a file that mmpo ships
    except (NameError, TypeError, AttributeError):
        return Any


def _parameter(annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    """A default that is not written out counts as None, of which no kind can be asked."""
    try:
        return Parameter(_kind(annotation), ... if default is None else ast.literal_eval(default))
    except ValueError:
        return Parameter(Any, None)
