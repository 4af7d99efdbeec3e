"""Binds settings to what takes them: unknown keys, missing ones and wrong types, before anything
runs.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from qat_tricks.errors import QatTricksError, did_you_mean

T = TypeVar("T")

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}
_SEQUENCES = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)


class Problems:
    """Gathers all that is wrong, to be told at once."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def of(self, check: Callable[[], T]) -> T | None:
        """Returns what ``check`` returns, or None once it has found fault."""
        try:
            return check()
        except QatTricksError as error:
            self.found.append(str(error))
            return None

    def report(self) -> None:
        """Raises QatTricksError with every different problem, if there is any."""
        if self.found:
            raise QatTricksError("; ".join(dict.fromkeys(self.found)))


def bind(
    where: str,
    target: Callable[..., Any],
    settings: Mapping[str, Any],
    *,
    without: Collection[str] = (),
) -> list[str]:
    """Returns what is wrong with ``settings`` as the arguments of ``target``, a message each.

    Args:
        where: what the messages call the settings, such as ``data``.
        target: a function or class whose parameters are annotated.
        settings: plain data by name.
        without: parameters that are not settings.
    """
    parameters = {
        name: p
        for name, p in inspect.signature(target).parameters.items()
        if name not in without and p.kind is not p.VAR_KEYWORD
    }
    problems = unknown_keys(where, settings, parameters)
    missing = [
        name for name, p in parameters.items() if p.default is p.empty and name not in settings
    ]
    problems += [f'{where} lacks "{name}"' for name in missing]
    hints = _hints(target)
    for name, value in settings.items():
        if name in parameters and not _fits(value, hints.get(name, Any)):
            problems.append(
                f"{where}.{name}={value!r} is not allowed: give {_describe(hints[name])}"
            )
    return problems


def make(where: str, target: Callable[..., T], settings: Mapping[str, Any]) -> T:
    """Calls ``target`` with ``settings`` once they bind.

    Raises:
        QatTricksError: settings that do not bind, or that ``target`` itself refuses.
    """
    problems = bind(where, target, settings)
    if problems:
        raise QatTricksError("; ".join(problems))
    try:
        return target(**settings)
    except QatTricksError as error:
        raise QatTricksError(f"{where}: {error}") from error


def unknown_keys(where: str, given: Collection[str], allowed: Collection[str]) -> list[str]:
    """Returns a message for each of the ``given`` keys that is not ``allowed``."""
    return [
        f'{where} has no setting "{key}": {did_you_mean(str(key), allowed)}'
        for key in given
        if key not in allowed
    ]


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == argument and type(value) is type(argument) for argument in arguments)
    if (origin or hint) in _SEQUENCES:
        return isinstance(value, list | tuple) and all(
            _fits(item, (*arguments, Any)[0]) for item in value
        )
    if (origin or hint) in _MAPPINGS:
        return isinstance(value, Mapping) and all(
            _fits(item, (*arguments, Any, Any)[1]) for item in value.values()
        )
    if isinstance(value, bool) and hint is not bool:
        return False
    kind = {float: (int, float)}.get(hint, origin or hint)
    return not isinstance(kind, type | tuple) or isinstance(value, kind)


def _describe(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        known = [_describe(argument) for argument in get_args(hint) if _is_plain(argument)]
        return " or ".join(dict.fromkeys(" or ".join(known).split(" or ")))
    if get_origin(hint) is Literal:
        return " or ".join(str(argument) for argument in get_args(hint))
    if (get_origin(hint) or hint) in _SEQUENCES:
        return f"a list of {_describe(get_args(hint)[0])}" if get_args(hint) else "a list"
    if (get_origin(hint) or hint) in _MAPPINGS:
        return "keys with values"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _is_plain(hint: Any) -> bool:
    """Whether YAML can hold a value of this type."""
    return (
        hint in _NAMES
        or get_origin(hint) in (Literal, Union, UnionType, *_SEQUENCES, *_MAPPINGS)
        or hint in _SEQUENCES
    )
