"""Name patterns (``fnmatch``) by which users choose convs and linears."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from qat_tricks.errors import QatTricksError, did_you_mean


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of ``patterns``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raises QatTricksError if a pattern matches none of ``names``, those of convs and linears."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise QatTricksError(
                f'pattern "{pattern}" matches no conv or linear layer: '
                f"{did_you_mean(pattern, names)}"
            )
