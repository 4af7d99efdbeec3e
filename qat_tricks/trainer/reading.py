"""Reads files of ``torch.save`` without running code that they bring along.

Lightning saves hyperparameters as they are, so a checkpoint may hold objects of any class. Under
``weights_only=True`` torch makes tensors and plain data, and here also objects of a few classes
that only hold values (``HOLDERS``). In the place of every other object stands an ``Unread``.
Nothing of the file's own choice is imported or called, and whoever needs such an object says so.
"""

import functools
import os
import re
import sys
from collections.abc import Iterator
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from qat_tricks.errors import QatTricksError, one_line

# Classes whose objects hold values and do nothing when they are made, by what a file calls them.
HOLDERS = (
    "argparse.Namespace",
    "builtins.bool",
    "builtins.bytes",
    "builtins.dict",
    "builtins.float",
    "builtins.frozenset",
    "builtins.int",
    "builtins.list",
    "builtins.range",
    "builtins.slice",
    "builtins.str",
    "builtins.tuple",
    "collections.defaultdict",
    "datetime.timedelta",
    "functools.partial",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.BytesNode",
    "omegaconf.nodes.EnumNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.PathNode",
    "omegaconf.nodes.StringNode",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib._local.PosixPath",  # Python 3.13
    "pathlib._local.PurePosixPath",
    "typing.Any",
)
# Numbers of NumPy; their types are made of ``numpy.dtype``, and not named in the file.
_NUMPY = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype")
_NUMPY_TYPES = "?bhilqBHILQefd"
# A plain dict does in their place.
_DICTS = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
)
_TERMINAL = re.compile(r"\x1b\[[0-9;]*m")


class DamagedError(QatTricksError):
    """A file that is damaged, or was not written by ``torch.save``."""


class Unread:
    """Stands for an object that was not made, or for a class.

    Attributes:
        of: the name of its class, or of the function that makes it.
    """

    of: ClassVar[str]

    # Whatever the file says of the object is dropped.
    def __new__(cls, *args: Any, **kwargs: Any) -> "Unread":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes in nothing."""

    def __setstate__(self, state: Any) -> None:
        """Takes in nothing."""


def read(path: Path, *, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
    """What a file of ``torch.save`` holds.

    Args:
        path: of the file.
        map_location: as of ``torch.load``.
        weights_only: False makes every object as pickle does, which runs code that the file
            chooses; None is True, unless the environment says otherwise, as in ``torch.load``.

    Raises:
        DamagedError: the file is damaged, or none of ``torch.save``.
        QatTricksError: what it holds cannot be made.
    """
    if is_trusted(weights_only):
        try:
            return torch.load(path, map_location=map_location, weights_only=False)
        except (ImportError, AttributeError) as error:
            raise QatTricksError(
                f"{path} holds what cannot be made in this process ({one_line(error)}): import or "
                "install what it was written with"
            ) from error
        except Exception as error:  # torch raises many kinds for a damaged file
            raise _damaged(path, error) from error
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged file, or one that holds more than tensors
        names = names_in(path)
        if not names:
            raise _damaged(path, error) from error
    known = [_known(name) or type("Unread", (Unread,), {"of": name}) for name in names]
    numbers = [type(np.dtype(kind)) for kind in _NUMPY_TYPES]
    try:
        with safe_globals([*zip(known, names, strict=True), *numbers]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise not_read(path, names, "") from error


def is_trusted(weights_only: bool | None) -> bool:
    """Whether every object in a file may be made, given the argument of the user."""
    told = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")  # heeded where none is given
    return weights_only is False or (weights_only is None and told in ("1", "y", "yes", "true"))


def not_read(path: str | Path, names: list[str], remedy: str) -> QatTricksError:
    """The error for objects that were needed and not made."""
    listed = ", ".join(sorted(set(names))[:5])
    return QatTricksError(
        f"{path} holds {listed}, which is not loaded unless the file is trusted: {remedy}pass "
        "weights_only=False if you trust it"
    )


def names_in(path: Path) -> list[str]:
    """The classes and functions in a file, beside those that torch knows; none of a damaged one."""
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except Exception:  # the error of reading it says more
        return []


def _known(name: str) -> Any:
    """The class called ``name`` if it only holds values, else None; imports none of others."""
    module_name, _, attribute = name.rpartition(".")
    if name in _DICTS:
        return dict
    if name in HOLDERS or name in _NUMPY:
        try:
            return getattr(import_module(module_name), attribute, None)
        except ImportError:
            return None
    kind = getattr(sys.modules.get(module_name), attribute, None)
    if not isinstance(kind, type):
        return None
    makes_values = issubclass(kind, Enum)
    of_torch = module_name.startswith(("torch.optim.", "torch.nn.modules."))
    bases = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, nn.Module)
    return kind if makes_values or (of_torch and issubclass(kind, bases)) else None


def _damaged(path: Path, error: Exception) -> DamagedError:
    text = _TERMINAL.sub("", str(error))
    # torch puts what it found behind a page of advice.
    found = text.partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    reason = " ".join((found or text).split()) or type(error).__name__
    reason = reason.partition(". ")[0].rstrip(".")
    if isinstance(error, KeyError):
        reason = "it is no file of torch.save"
    return DamagedError(
        f"{path} cannot be read as a checkpoint ({reason}): it is damaged, or no checkpoint"
    )


def unread_in(value: Any) -> list[str]:
    """The names of what was not made in ``value``, at any depth."""
    return [*_unread_in(value, set())]


def _unread_in(value: Any, seen: set[int]) -> Iterator[str]:
    if isinstance(value, Unread) or (isinstance(value, type) and issubclass(value, Unread)):
        yield value.of
        return
    if id(value) in seen or isinstance(value, (torch.Tensor, str, bytes, type)):
        return
    seen.add(id(value))
    parts: list[Any] = []
    if isinstance(value, dict):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts += value
    elif isinstance(value, functools.partial):
        parts += [value.func, value.args, value.keywords]
    # Containers of OmegaConf check each value that they hand out, so they are looked into.
    parts += getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from _unread_in(part, seen)
