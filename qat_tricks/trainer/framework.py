"""Lightning's two packages, ``pytorch_lightning`` and ``lightning.pytorch``.

Each is a copy of the other, and neither takes the other's objects. The trainer or the module at
hand decides which one is meant. Nothing here imports either of them before it is needed.
"""

import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from qat_tricks.errors import QatTricksError

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
INSTALL = "pip install pytorch-lightning, or pip install lightning"


def package_of(thing: Any) -> ModuleType:
    """The Lightning package that a trainer, a module or a data module comes from.

    Raises:
        QatTricksError: it comes from neither.
    """
    for kind in type(thing).__mro__:
        for name in PACKAGES:
            if f"{kind.__module__}.".startswith(f"{name}."):
                return import_module(name)
    raise QatTricksError(
        f"{type(thing).__name__} is no object of Lightning's: give a Trainer or LightningModule of "
        f"{' or '.join(PACKAGES)}"
    )


def default_package() -> ModuleType:
    """The Lightning package for modules of our own: one that is imported already, or is installed.

    Raises:
        QatTricksError: there is none.
    """
    imported = [sys.modules[name] for name in PACKAGES if sys.modules.get(name) is not None]
    packages = imported or _installed()
    if not packages:
        raise QatTricksError(f"training needs Lightning, which is not installed: {INSTALL}")
    return packages[0]


@cache
def _installed() -> list[ModuleType]:
    packages = []
    for name in PACKAGES:
        try:
            packages.append(import_module(name))
        except ImportError:  # not installed, or not complete: the other one may be
            continue
    return packages


class _Nothing:
    """Stands where Lightning's callbacks will: a class whose base is ``object`` cannot get others."""


class Callback(_Nothing):
    """What our callbacks derive from: a ``Callback`` of every Lightning package that is installed.

    It becomes one in ``join_lightning``, for classes and objects made before as well. So whichever
    trainer gets our callbacks takes them, whatever was imported first, and a process that only
    quantizes never loads Lightning.
    """


def join_lightning() -> None:
    """Makes ``Callback`` derive from the callbacks of the Lightning packages installed here."""
    bases = tuple(package.Callback for package in _installed())
    if bases and Callback.__bases__ != bases:
        Callback.__bases__ = bases


def join_if_imported() -> None:
    """``join_lightning`` in a process that uses Lightning; in others nothing, at no cost."""
    if any(sys.modules.get(name) is not None for name in PACKAGES):
        join_lightning()
