"""Shows the progress of long work on a terminal; prints nothing elsewhere."""

import math
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.progress import track as rich_track

T = TypeVar("T")

_where = ""  # in a run of several stages, before the description of each bar


def enter(where: str) -> None:
    """Says of all bars from here on where in a run they are, such as ``stage 1 of 2, ptq``."""
    global _where
    _where = where


def _placed(description: str) -> str:
    return f"{_where}: {description}" if _where else description


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Yields ``items`` under a progress bar."""
    console = Console(stderr=True)
    # A log file would get a line for every step of the bar.
    yield from rich_track(
        items,
        _placed(description),
        transient=True,
        console=console,
        disable=not sys.stderr.isatty(),
    )


class Bar:
    """A progress bar for work that somebody else goes through.

    Args:
        description: what is done.
        total: number of steps; infinite where it is not known.
    """

    def __init__(self, description: str, total: float) -> None:
        disable = not sys.stderr.isatty()
        self._progress = Progress(transient=True, console=Console(stderr=True), disable=disable)
        self._progress.start()
        known = total if math.isfinite(total) else None
        self._task = self._progress.add_task(_placed(description), total=known)

    def advance(self) -> None:
        """One step is done."""
        self._progress.advance(self._task)

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.stop()
