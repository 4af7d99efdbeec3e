"""One live display on a terminal for all long work; prints nothing elsewhere.

A run keeps the display open (``live``). It says where the run is: the stage, the trick, and what
the newest trick was measured at. Below it are the bars of what is being done, with the time left.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import length_hint
from typing import TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

T = TypeVar("T")

REFRESH = 0.1  # seconds at least from one drawing to the next


@dataclass
class _Heading:
    """Where a run is."""

    stage: str = ""  # such as "stage 1 of 2, ptq"
    trick: str = ""
    figures: str = ""  # of the newest trick

    def __str__(self) -> str:
        if not (self.stage or self.trick):
            return ""  # figures of what is over
        return " · ".join(filter(None, (self.stage, self.trick, self.figures)))


class _Display(Progress):
    """Bars under a heading, drawn when something moves.

    No thread draws: it would run beside latencies that are timed, and could hold a lock while a
    loader forks its workers.
    """

    def __init__(self) -> None:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
        ]
        super().__init__(
            *columns,
            console=Console(stderr=True),
            transient=True,
            auto_refresh=False,
            # What is printed appears above the bars. A pipe gets it as it is.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._drawn = -math.inf

    def get_renderables(self) -> Iterator[RenderableType]:
        """The heading, then the bars."""
        # A line even where there is nothing to say: rich does not clear what was above no line.
        if str(_heading) or not self.tasks:
            yield Text(str(_heading), overflow="ellipsis", no_wrap=True)
        yield self.make_tasks_table(self.tasks)

    @property
    def is_due(self) -> bool:
        """Whether it was not drawn just now."""
        return time.monotonic() - self._drawn >= REFRESH

    def draw(self) -> None:
        """Draws the display anew."""
        self._drawn = time.monotonic()
        self.refresh()


_heading = _Heading()
_display: _Display | None = None
_users = 0  # that keep the display open


def is_watched() -> bool:
    """Whether somebody looks at a terminal, and this process is the one that draws on it."""
    # Without a rank as long as there is one process. A dumb terminal draws nothing in place.
    is_first = not getattr(rank_zero_only, "rank", None)
    return is_first and sys.stderr.isatty() and Console(stderr=True).is_interactive


@contextmanager
def live() -> Iterator[None]:
    """Keeps the display open, so that all that is done inside shares it."""
    display = _open()
    try:
        yield
    finally:
        enter("")  # also where a stage has failed
        if display is not None:
            _close()


def console(*, stderr: bool = False) -> Console:
    """The console to print on, above the display where there is one.

    Rich's other consoles write past the display, and so into the middle of it.
    """
    if _display is not None and (stderr or sys.stdout.isatty()):
        return _display.console
    return Console(stderr=stderr)


def enter(stage: str) -> None:
    """Says where in a run it is from here on, such as ``stage 1 of 2, ptq``; or nowhere, ``""``."""
    _say(stage=stage, trick="", figures="")


def begin(trick: str) -> None:
    """Says which trick acts from here on; none with ``""``."""
    _say(trick=trick)


def measured(figures: str) -> None:
    """Says what the newest trick was measured at."""
    _say(figures=figures)


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Yields ``items`` under a progress bar."""
    bar = Bar(description, length_hint(items) or math.inf)
    try:
        for item in items:
            yield item
            bar.advance()
    finally:
        bar.close()


class Bar:
    """A progress bar for work that somebody else goes through.

    Args:
        description: what is done.
        total: number of steps; infinite where it is not known.
    """

    def __init__(self, description: str, total: float) -> None:
        self._own = _open()
        if self._own is not None:
            known = total if math.isfinite(total) else None
            self._task = self._own.add_task(description, total=known, figures="")

    def advance(self) -> None:
        """One step is done."""
        if self._own is not None:
            self._own.advance(self._task)
            if self._own.is_due:
                self._own.draw()

    def show(self, description: str, done: int, figures: Callable[[], str]) -> None:
        """Tells what is done now, how many steps of it are, and what it is measured at.

        The figures are asked for only where they are drawn: a GPU would be waited for.
        """
        if self._own is not None:
            self._own.update(self._task, description=description, completed=done)
            if self._own.is_due:
                self._own.update(self._task, figures=figures())
                self._own.draw()

    def close(self) -> None:
        """Takes the bar away."""
        if self._own is not None:
            self._own.remove_task(self._task)
            self._own = None
            _close()


def _say(**parts: str) -> None:
    for name, value in parts.items():
        setattr(_heading, name, value)
    if _display is not None:
        _display.draw()


def _open() -> _Display | None:
    """The display, with one user more; None where nobody watches."""
    global _display, _users
    if _display is None:
        if not is_watched():
            return None
        _display = _Display()
        _display.start()
    _users += 1
    return _display


def _close() -> None:
    """The display has one user less, and goes with the last one."""
    global _display, _users
    _users -= 1
    if _users == 0 and _display is not None:
        _display.stop()
        _display = None
