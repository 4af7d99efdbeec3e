"""Loads a network's weights from a file, strictly; an error names the keys that do not fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_tricks.errors import QatTricksError, did_you_mean

SHOWN = 3  # keys named in an error


def load_weights(
    network: nn.Module, path: str, num_classes: int, names: Sequence[str] = ()
) -> nn.Module:
    """Loads the ``state_dict`` in a file into ``network``, strictly.

    The file holds the ``state_dict`` itself, or a Lightning checkpoint whose keys may share a
    prefix (``net.``, ``model.``).

    Args:
        network: gets the weights.
        path: of the file.
        num_classes: of ``network``.
        names: weights that can be asked for by name, for the error of a path that is not a file.

    Returns:
        ``network``.

    Raises:
        QatTricksError: the file is missing, damaged or foreign, holds two such networks, or does
            not fit.
    """
    file = weights_file(path, names)
    expected = network.state_dict()
    state = _without_prefix(_read(file), expected, file)
    _check_fit(state, expected, file, num_classes)
    for key in expected:
        if _is_counter(key):  # absent from the files of older PyTorch versions
            state.setdefault(key, torch.tensor(0))
    network.load_state_dict(state)
    return network


def weights_file(path: str, names: Sequence[str] = ()) -> Path:
    """Returns the file at ``path``; raises QatTricksError if there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        hint = f", nor weights by name: {did_you_mean(path, names)}" if names else ""
        raise QatTricksError(
            f"model.weights={path} is not a file{hint or ': give the path of a state_dict'}"
        )
    return file


def _read(file: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        reason = " ".join(str(error).split())[:120]
        raise QatTricksError(
            f"{file} cannot be read as a state_dict ({type(error).__name__}: {reason}): "
            "it is truncated or foreign; write it with torch.save(net.state_dict(), path)"
        ) from error
    # a Lightning checkpoint holds the weights under this key
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if (
        isinstance(content, Mapping)
        and content
        and all(isinstance(value, Tensor) for value in content.values())
    ):
        return dict(content)
    raise QatTricksError(
        f"{file} holds a {type(content).__name__} that is no state_dict: write it with "
        "torch.save(net.state_dict(), path)"
    )


def _without_prefix(
    state: dict[str, Tensor], expected: Mapping[str, Tensor], file: Path
) -> dict[str, Tensor]:
    """Returns the part of ``state`` whose prefix leads to the most expected keys, without it."""
    wanted = {key for key in expected if not _is_counter(key)}
    # a prefix stands before an expected key in one of the file's keys
    candidates = (key.removesuffix(want) for key in state for want in wanted if key.endswith(want))
    prefixes = {prefix for prefix in candidates if prefix == "" or prefix.endswith(".")}
    matches = {
        prefix: sum(prefix + want in state for want in wanted) for prefix in sorted(prefixes)
    }
    if matches.get("") == len(wanted) or not matches:
        return state
    complete = [prefix for prefix, count in matches.items() if count == len(wanted)]
    if len(complete) > 1:  # such as a network and its teacher
        raise QatTricksError(
            f"{file} holds several such networks ({', '.join(complete)}): save the state_dict of "
            "the one you mean"
        )
    best = max(matches, key=lambda prefix: matches[prefix])
    return {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}


def _check_fit(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: Path, num_classes: int
) -> None:
    missing = [key for key in expected if key not in state and not _is_counter(key)]
    unexpected = [key for key in state if key not in expected]
    shapes = {
        key: (tuple(state[key].shape), tuple(expected[key].shape))
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    }
    # weights for other classes differ in the first dimension of the last layer, and in nothing else
    is_head = all(
        ours[:1] == (num_classes,) and theirs[1:] == ours[1:] for theirs, ours in shapes.values()
    )
    if shapes and is_head and not missing and not unexpected:
        theirs, _ = next(iter(shapes.values()))
        raise QatTricksError(
            f"{file} is a network for {theirs[0]} classes, the data has {num_classes}: "
            "use data with the same classes, or weights trained on these"
        )
    mismatched = [
        f"{key} {list(theirs)} instead of {list(ours)}" for key, (theirs, ours) in shapes.items()
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    if any(faults.values()):
        summary = "; ".join(
            f"{len(keys)} {kind} ({_shortened(keys)})" for kind, keys in faults.items() if keys
        )
        raise QatTricksError(
            f"{file} does not fit the network: {summary}; choose the model it was trained as"
        )


def _is_counter(key: str) -> bool:
    """Whether ``key`` is BatchNorm's count of batches."""
    return key.endswith("num_batches_tracked")


def _shortened(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", …" if len(keys) > SHOWN else "")
