"""Renames settings: an old name works, with a warning, until the next release."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from qat_tricks.errors import QatTricksError

RENAMED = {
    "preflight": "forecast",
    "recipe.whole": "recipe.untraced",
}
"""New dotted keys by the old ones."""


def rename_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns Hydra's overrides with the new names, and warns of each old one.

    An override without a mark becomes one that may add its key, because a user's own YAML may know
    only the old name.
    """
    keys = {_parts(override)[1] for override in overrides}
    for old, new in RENAMED.items():
        if old in keys and new in keys:
            raise QatTricksError(
                f"{old} and {new} are one setting, which has a new name: leave out {old}"
            )
    return [_rename_override(override) for override in overrides]


def rename_keys(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings from a YAML file with the new names, and warns of each old one.

    Args:
        where: the dotted key of ``settings``, such as ``recipe``.
        settings: plain data by name; not changed.

    Raises:
        QatTricksError: a setting has values under both names.
    """
    renamed = dict(settings)
    for old, new in RENAMED.items():
        group, _, old_key = old.rpartition(".")
        new_key = new.rpartition(".")[2]
        if group != where or old_key not in renamed:
            continue
        value = renamed.pop(old_key)
        # an empty one is the default of the recipe that the user's own began from
        if value and renamed.get(new_key):
            raise QatTricksError(
                f"{old}={value} and {new}={renamed[new_key]} are two values of one setting, which "
                f"has a new name: leave out {old}"
            )
        renamed[new_key] = value or renamed.get(new_key)
        _warn(old, new)
    return renamed


def _parts(override: str) -> tuple[str, str, str]:
    """Mark, key and the rest of an override, which begins with "=" if there is any."""
    # the marks add, force or delete; the key ends at the first "="
    match = re.fullmatch(r"([+~]*)([^=]*)(.*)", override, flags=re.S)
    assert match is not None  # the expression fits any text
    return match[1], match[2], match[3]


def _rename_override(override: str) -> str:
    mark, key, rest = _parts(override)
    if key not in RENAMED:
        return override
    _warn(key, RENAMED[key])
    return f"{mark or '++'}{RENAMED[key]}{rest}"


@cache  # a config is read more than once: one warning is enough
def _warn(old: str, new: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":  # Lightning's other processes
        return
    print(
        f"warning: the setting {old} is now called {new}; the old name works in this release only",
        file=sys.stderr,
        flush=True,
    )
