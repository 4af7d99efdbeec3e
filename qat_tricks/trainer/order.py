"""Checks the order of tricks; the error names an order that works."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from qat_tricks.errors import QatTricksError

Trick = TypeVar("Trick", bound="Ordered")


class Ordered(Protocol):
    """The part of a trick that its order depends on."""

    requires: ClassVar[tuple[type[Any], ...]]  # tricks without which it cannot work
    after: ClassVar[tuple[str, ...]]  # names of those that come earlier where a recipe has them


def trick_name(kind: type) -> str:
    """The name of a trick in its file and its YAML: ``FoldBatchnorm`` is ``fold_batchnorm``."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def check_order(tricks: Sequence[Ordered], done: Sequence[str] = ()) -> None:
    """Checks that each trick comes after the tricks that it needs.

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
        # A trick that an earlier stage has done is not late where it comes again.
        late = [e for e in (*required, *trick.after) if e in names[i:] and e not in done]
        if late:
            problems.append(f"{name} must come after {' and '.join(dict.fromkeys(late))}")
    if problems:
        order = ", ".join(working_order(tricks, done))
        raise QatTricksError(
            f"these tricks cannot work in the order {', '.join(names)}: {'; '.join(problems)}"
            + (f"; an order that works: {order}" if order else "")
        )


def put_in_order(tricks: Sequence[Trick], done: Sequence[str] = ()) -> list[Trick]:
    """``tricks`` in an order that works, as far as it depends on them.

    An override adds a trick behind all others of its stage, and cannot name another place.

    Args:
        tricks: those that are in a working order keep it.
        done: names of tricks done before; one that comes again keeps its place.
    """
    names = working_order(tricks, done)
    fresh = [trick for trick in tricks if trick_name(type(trick)) in names]
    in_order = iter(sorted(fresh, key=lambda trick: names.index(trick_name(type(trick)))))
    return [next(in_order) if trick in fresh else trick for trick in tricks]


def working_order(tricks: Sequence[Ordered], done: Sequence[str] = ()) -> list[str]:
    """The names of ``tricks``, and of those they require, in an order that works.

    Tricks that are in a working order keep it.
    """
    kinds = {trick_name(type(trick)): type(trick) for trick in tricks}
    ordered: list[str] = []
    begun: set[str] = set()  # two of the user's own tricks may wait for one another

    # Depth first: a trick is listed behind everything that it waits for.
    def visit(kind: type[Ordered]) -> None:
        name = trick_name(kind)
        if name in begun or name in done:
            return
        begun.add(name)
        # A required trick is added where it is missing; one in ``after`` is only moved.
        for earlier in (*kind.requires, *(kinds[name] for name in kind.after if name in kinds)):
            visit(earlier)
        ordered.append(name)

    for kind in kinds.values():
        visit(kind)
    return ordered
