"""Errors for the user: one line with the value, the allowed values and the remedy."""

from collections.abc import Iterable
from difflib import get_close_matches

SHOWN = 40  # names listed in an error
LINE = 200  # characters of somebody else's error that are quoted in ours


class QatTricksError(Exception):
    """Bad input.

    Its text is one line for the user. The command line prints it without a traceback and exits
    with 2.
    """


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Returns a hint: the nearest names, or the list of allowed names if none is near.

    Args:
        given: the wrong name.
        allowed: all names to choose from.
    """
    names = sorted(set(allowed))
    near = get_close_matches(given, names, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(f'"{name}"' for name in near) + "?"
    more = f" and {len(names) - SHOWN:,} others" if len(names) > SHOWN else ""
    return "allowed: " + (", ".join(names[:SHOWN]) + more if names else "nothing")


def one_line(error: BaseException, limit: int | None = LINE) -> str:
    """Returns the text of ``error`` on one line, or the name of its type where it has none.

    Args:
        error: an error of any library; its text may have many lines.
        limit: characters to cut the text to; None leaves its length.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if limit is None else cut(text, limit)


def cut(text: str, limit: int = LINE) -> str:
    """Returns ``text``, cut to ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
