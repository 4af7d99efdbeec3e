"""Data sets by name: digits, cifar10, imagefolder, imagenet, fake."""

import inspect
from collections.abc import Callable
from typing import Any

from qat_tricks.data.cifar10 import cifar10
from qat_tricks.data.digits import digits
from qat_tricks.data.fake import fake
from qat_tricks.data.folders import imagefolder, imagenet
from qat_tricks.data.module import ImageData, check_counts
from qat_tricks.data.preprocessing import Preprocessing
from qat_tricks.data.splits import check_labels
from qat_tricks.errors import QatTricksError, did_you_mean

__all__ = [
    "ImageData",
    "Preprocessing",
    "build_data",
    "check_counts",
    "check_labels",
    "data_builder",
    "data_names",
]

_BUILDERS: dict[str, Callable[..., ImageData]] = {
    build.__name__: build for build in (digits, cifar10, imagefolder, imagenet, fake)
}


def data_names() -> list[str]:
    """Returns the names that ``build_data`` knows, sorted."""
    return sorted(_BUILDERS)


def data_builder(name: str) -> Callable[..., ImageData]:
    """Returns the function that builds a data set; its keywords are the data set's options.

    Raises:
        QatTricksError: the name is unknown.
    """
    if name not in _BUILDERS:
        raise QatTricksError(f'unknown data "{name}": {did_you_mean(name, _BUILDERS)}')
    return _BUILDERS[name]


def build_data(name: str, **options: Any) -> ImageData:
    """Builds a data set; no image is read before its ``setup()``.

    Args:
        name: one of ``data_names()``.
        options: keywords of ``data_builder(name)``.

    Raises:
        QatTricksError: the name or an option is unknown, or options are not allowed.
    """
    build = data_builder(name)
    allowed = inspect.signature(build).parameters
    # All unknown options at once, each with the nearest name.
    unknown = [f'"{key}" ({did_you_mean(key, allowed)})' for key in options if key not in allowed]
    if unknown:
        raise QatTricksError(f"data={name} has no option {', '.join(unknown)}")
    if problems := check_counts(options):
        raise QatTricksError("; ".join(problems))
    return build(**options)
