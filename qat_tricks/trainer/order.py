"""The order of tricks: refused where it cannot work, with the order that can."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qat_tricks.errors import QatTricksError

if TYPE_CHECKING:
    from qat_tricks.trainer.trick import Trick


def check_order(tricks: Sequence["Trick"], done: Sequence[str] = ()) -> None:
    """Checks that each trick finds before it what it needs.

    Args:
        tricks: in the order in which they will be done.
        done: names of tricks done before, in this stage or an earlier one.

    Raises:
        QatTricksError: a trick comes twice, before one that it must follow, or without one that it
            requires.
    """
    names = [trick.name for trick in tricks]
    problems = []
    for i, trick in enumerate(tricks):
        if trick.name in names[:i]:
            problems.append(f"{trick.name} comes twice")
        missing = [name for name in trick.requires if name not in (*names, *done)]
        if missing:
            problems.append(f"{trick.name} needs {' and '.join(missing)} before it")
        late = [
            name
            for name in (*trick.requires, *trick.after)
            if name in names[i:] and name not in done
        ]
        if late:
            problems.append(f"{trick.name} must come after {' and '.join(dict.fromkeys(late))}")
    if problems:
        raise QatTricksError(
            f"these tricks cannot work in the order {', '.join(names)}: {'; '.join(problems)}; "
            f"an order that works: {', '.join(working_order(tricks, done))}"
        )


def working_order(tricks: Sequence["Trick"], done: Sequence[str] = ()) -> list[str]:
    """The names of ``tricks``, and of those they require, with the least change of order such that
    all can work.
    """
    from qat_tricks.recipes.recipe import trick_class

    known = {trick.name: type(trick) for trick in tricks}
    ordered: list[str] = []

    def visit(name: str) -> None:
        if name in ordered or name in done:
            return
        kind = known.get(name) or trick_class(name)
        for earlier in (*kind.requires, *(a for a in kind.after if a in known)):
            visit(earlier)
        ordered.append(name)

    for trick in tricks:
        visit(trick.name)
    return ordered
