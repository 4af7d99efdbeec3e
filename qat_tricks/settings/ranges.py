"""Ranges of numeric settings, and the one-line error of a value outside them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qat_tricks.errors import QatTricksError


@dataclass(frozen=True)
class Range:
    """The values that a setting may have."""

    contains: Callable[[Any], bool]
    text: str  # completes "give …"

    def or_null(self) -> "Range":
        """Returns this range with None in it."""
        return Range(lambda value: value is None or self.contains(value), f"{self.text}, or null")


def at_least(lowest: float, unit: str = "") -> Range:
    """``lowest`` and everything above; the error names ``unit``, as in "0 or more points"."""
    return Range(lambda value: value >= lowest, f"{lowest} or more {unit}".strip())


def between(lowest: float, highest: float) -> Range:
    """``lowest`` to ``highest``, both of them allowed."""
    return Range(lambda value: lowest <= value <= highest, f"{lowest} to {highest}")


def below(lowest: float, limit: float) -> Range:
    """``lowest`` to ``limit``, which is not allowed itself."""
    return Range(lambda value: lowest <= value < limit, f"{lowest} to below {limit}")


def counts(each: Range, example: str) -> Range:
    """Lists of at least one number, ``each`` in a range; the error shows ``example``."""

    def contains(values: Sequence[int]) -> bool:
        return len(values) > 0 and all(map(each.contains, values))

    return Range(contains, f"a list of whole numbers, each {each.text}, as in {example}")


POSITIVE = Range(lambda value: 0 < value < math.inf, "a number above 0")
NOT_NEGATIVE = Range(lambda value: 0 <= value < math.inf, "0 or more")

# Libraries in C and Python's own floats fail at larger numbers, each with a traceback.
SEED = between(0, 2**32 - 1)  # what NumPy takes
THREADS = between(1, 1024)  # more than any processor runs at once
BATCH = between(1, 4096)  # images of 224 px take 2.5 GB then

# of the stages of a recipe, and of the settings that replace theirs
EPOCHS = between(0, 10**6)
MAX_DROP = at_least(0, "points of accuracy").or_null()
AUTO = "auto"  # a learning rate that is measured
LEARNING_RATE = Range(
    lambda value: value in (None, AUTO) or POSITIVE.contains(value),
    f"{POSITIVE.text}, {AUTO}, or null",
)


def check_ranges(settings: Any, **ranges: Range) -> None:
    """Checks attributes of ``settings``, each against the range of its name.

    Raises:
        QatTricksError: one line with every value that is not allowed.
    """
    problems = [
        f"{name}={getattr(settings, name)} is not allowed: give {allowed.text}"
        for name, allowed in ranges.items()
        if not allowed.contains(getattr(settings, name))
    ]
    if problems:
        raise QatTricksError("; ".join(problems))
