"""Shows the progress of long work on a terminal; prints nothing elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Yields ``items`` under a progress bar."""
    console = Console(stderr=True)
    # A log file would get a line for every step of the bar.
    yield from rich_track(
        items, description, transient=True, console=console, disable=not sys.stderr.isatty()
    )
