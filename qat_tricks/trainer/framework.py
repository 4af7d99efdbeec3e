"""Lightning's two packages, ``pytorch_lightning`` and ``lightning.pytorch``.

Each is a copy of the other, and neither takes the other's objects. The trainer or the module at
hand decides which one is meant. Nothing here imports either of them before it is needed.
"""

import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt

from qat_tricks.errors import QatTricksError

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
INSTALL = "pip install pytorch-lightning, or pip install lightning"


def package_of(thing: Any) -> ModuleType:
    """The Lightning package that a trainer, a module, a data module or a class comes from.

    Raises:
        QatTricksError: it comes from neither.
    """
    # The user's own class lives elsewhere: one of its base classes tells the package.
    own = thing if isinstance(thing, type) else type(thing)
    for kind in own.__mro__:
        for name in PACKAGES:
            if f"{kind.__module__}.".startswith(f"{name}."):
                return import_module(name)
    raise QatTricksError(
        f"{own.__name__} is no object of Lightning's: give a Trainer or LightningModule of "
        f"{' or '.join(PACKAGES)}"
    )


@cache
def default_package() -> ModuleType:
    """The Lightning package for modules of our own, the same one all the time.

    It is one that is imported already, else one that is installed.

    Raises:
        QatTricksError: there is none.
    """
    imported = [name for name in PACKAGES if sys.modules.get(name) is not None]
    for name in (*imported, *PACKAGES):
        try:
            return import_module(name)
        except ImportError:  # not installed, or not complete: the other one may be
            continue
    raise QatTricksError(f"training needs Lightning, which is not installed: {INSTALL}")


class _Nothing:
    """The base of ``Callback`` without Lightning, for a class of ``object`` cannot get others."""


class Callback(_Nothing):
    """The base of our callbacks: a ``Callback`` of every Lightning package in this process.

    It becomes one when a package is imported, by us or by the user, before or after our callbacks
    are made. So the trainer takes them, whichever package it comes from, and a process that only
    quantizes never loads Lightning.
    """


def _join(package: ModuleType) -> None:
    """Makes ``Callback``, with its classes and objects, derive from a package's callbacks."""
    bases = tuple(base for base in Callback.__bases__ if base is not _Nothing)
    Callback.__bases__ = (*bases, package.Callback)


for _name in PACKAGES:
    wrapt.register_post_import_hook(_join, _name)  # at once where it is imported already
