"""Matches the keys of a state dict with a module's, whichever of them were compiled.

``torch.compile`` wraps a module, and puts ``_orig_mod.`` into the names of all that is in it.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

_WRAPPED = "_orig_mod."


def bare(key: str) -> str:
    """A key without what ``torch.compile`` has put into it."""
    return key.replace(_WRAPPED, "")


def matched(state: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
    """The state with the module's own keys, where only the wrapping tells them apart."""
    own = list(module.state_dict())
    if not any(_WRAPPED in key for key in (*state, *own)):
        return state
    by_bare = {bare(key): key for key in own}
    return {
        key if key in own else by_bare.get(bare(key), key): value for key, value in state.items()
    }


def differing(state: Mapping[str, Any], module: nn.Module) -> str:
    """In what a state and a module's own differ, in words; nothing if the one fits the other."""
    own = module.state_dict()
    problems = {
        "it lacks": [key for key in own if key not in state],
        "it has besides": [key for key in state if key not in own],
        "of another shape": [
            key
            for key in own
            if key in state and getattr(own[key], "shape", 0) != getattr(state[key], "shape", 0)
        ],
    }
    return "; ".join(
        f"{what} {', '.join(keys[:2])}" + (f" and {len(keys) - 2} others" if keys[2:] else "")
        for what, keys in problems.items()
        if keys
    )
