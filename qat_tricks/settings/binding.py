"""Binds settings to the function or class that takes them, before anything runs.

Unknown keys, missing keys and values of a wrong type are all reported at once.
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
# get_origin gives collections.abc's classes, as imported here
_SEQUENCES = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)
_UNIONS = (Union, UnionType)


class Problems:
    """Gathers problems, to report them together."""

    def __init__(self) -> None:
        self.messages: list[str] = []  # one for each

    def of(self, check: Callable[[], T]) -> T | None:
        """Calls ``check`` and returns its result; None where it raises QatTricksError."""
        try:
            return check()
        except QatTricksError as error:
            self.messages.append(str(error))
            return None

    def report(self) -> None:
        """Raises QatTricksError with every problem, each once; does nothing if there is none."""
        if self.messages:
            raise QatTricksError("; ".join(dict.fromkeys(self.messages)))


def bind(
    where: str,
    target: Callable[..., Any],
    settings: Mapping[str, Any],
    *,
    without: Collection[str] = (),
) -> list[str]:
    """Compares ``settings`` with the parameters of ``target``.

    Args:
        where: the name of the settings in the messages, such as ``data``.
        target: a function or class whose parameters are annotated.
        settings: plain data by name.
        without: parameters that are not settings.

    Returns:
        A message for each problem.
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
    """Calls ``target`` with ``settings`` and returns its result.

    Args:
        where: the name of the settings in the messages.
        target: a function or class whose parameters are annotated.
        settings: plain data by name.

    Raises:
        QatTricksError: the settings do not bind, or ``target`` itself refuses them; one line with
            every error.
    """
    problems = bind(where, target, settings)
    parameters, hints = inspect.signature(target).parameters, _hints(target)
    # Those that bind are tried beside others that do not: all errors are told at once.
    bound = {
        name: value
        for name, value in settings.items()
        if name in parameters and _fits(value, hints.get(name, Any))
    }
    lacks = any(
        name not in bound and p.default is p.empty and p.kind is not p.VAR_KEYWORD
        for name, p in parameters.items()
    )
    try:
        if not (problems and lacks):
            made = target(**(bound if problems else settings))
    except QatTricksError as error:
        raise QatTricksError("; ".join([*problems, f"{where}: {error}"])) from error
    if problems:
        raise QatTricksError("; ".join(problems))
    return made


def unknown_keys(where: str, keys: Collection[str], allowed: Collection[str]) -> list[str]:
    """Returns a message for each key that is not ``allowed``."""
    return [
        f'{where} has no setting "{key}": {did_you_mean(str(key), allowed)}'
        for key in keys
        if key not in allowed
    ]


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):  # annotations that exist for type checkers only
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether ``value``, as YAML gives it, has the type ``hint``."""
    if hint is Any or isinstance(hint, TypeVar):
        return True
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in _UNIONS:
        return any(_fits(value, argument) for argument in arguments)
    if kind is Literal:
        # 1 == True to Python: the types have to agree as well
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if kind in _SEQUENCES:
        item_hint = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(_fits(item, item_hint) for item in value)
    if kind in _MAPPINGS:
        value_hint = arguments[1] if arguments else Any
        return isinstance(value, Mapping) and all(
            _fits(item, value_hint) for item in value.values()
        )
    return _is_instance(value, kind)


def _is_instance(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # a whole number to Python
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    # a hint that is no type, such as a string that names one, allows everything
    return not isinstance(kind, type) or isinstance(value, kind)


def _describe(hint: Any) -> str:
    """Returns the values that ``hint`` allows, in words that complete "give …"."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in _UNIONS:
        known = [_describe(argument) for argument in arguments if _is_plain(argument)]
        # two lists, for one, may have the same words
        return " or ".join(dict.fromkeys(" or ".join(known).split(" or ")))
    if kind is Literal:
        return " or ".join(str(choice) for choice in arguments)
    if kind in _SEQUENCES:
        return f"a list of {_describe(arguments[0])}" if arguments else "a list"
    if kind in _MAPPINGS:
        return "keys with values"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _is_plain(hint: Any) -> bool:
    """Returns whether YAML can hold a value of this type."""
    kind = get_origin(hint) or hint
    return kind in (Literal, *_NAMES, *_UNIONS, *_SEQUENCES) or get_origin(hint) in _MAPPINGS
