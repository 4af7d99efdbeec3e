"""Checks the order of tricks; the error names an order that works."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from qat_tricks.errors import QatTricksError


class Ordered(Protocol):
    """The part of a trick that its order depends on."""

    requires: ClassVar[tuple[type[Any], ...]]  # tricks without which it cannot work
    after: ClassVar[tuple[str, ...]]  # names of those that come earlier where a recipe has them


def trick_name(kind: type) -> str:
    """The name of a trick's class as its file and its YAML have it: ``FoldBatchnorm`` is
    ``fold_batchnorm``.
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def check_order(tricks: Sequence[Ordered], done: Sequence[str] = ()) -> None:
    """Checks that each trick finds before it what it needs.

    Args:
        tricks: in the order in which they will be done.
        done: names of tricks done before, in this stage or an earlier one.

    Raises:
        QatTricksError: a trick comes twice, before one that it must follow, or without one that it
            requires.
    """
    names = [trick_name(type(trick)) for trick in tricks]
    problems = []
    for i, (name, trick) in enumerate(zip(names, tricks, strict=True)):
        required = [trick_name(kind) for kind in trick.requires]
        if name in names[:i]:
            problems.append(f"{name} comes twice")
        missing = [earlier for earlier in required if earlier not in (*names, *done)]
        if missing:
            problems.append(f"{name} needs {' and '.join(missing)} before it")
        late = [e for e in (*required, *trick.after) if e in names[i:] and e not in done]
        if late:
            problems.append(f"{name} must come after {' and '.join(dict.fromkeys(late))}")
    if problems:
        raise QatTricksError(
            f"these tricks cannot work in the order {', '.join(names)}: {'; '.join(problems)}; "
            f"an order that works: {', '.join(working_order(tricks, done))}"
        )


def working_order(tricks: Sequence[Ordered], done: Sequence[str] = ()) -> list[str]:
    """The names of ``tricks``, and of those they require, in an order in which all can work; it is
    theirs where that works.
    """
    kinds = {trick_name(type(trick)): type(trick) for trick in tricks}
    ordered: list[str] = []

    def visit(kind: type[Ordered]) -> None:
        name = trick_name(kind)
        if name in ordered or name in done:
            return
        for earlier in (*kind.requires, *(kinds[name] for name in kind.after if name in kinds)):
            visit(earlier)
        ordered.append(name)

    for kind in kinds.values():
        visit(kind)
    return ordered
