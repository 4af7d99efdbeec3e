"""Progress of long work on the terminal, gone when it is done; silent where nobody watches."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Yields ``items`` under a progress bar."""
    console = Console(stderr=True)
    yield from rich_track(
        items, description, transient=True, console=console, disable=not sys.stderr.isatty()
    )
