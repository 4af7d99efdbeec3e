"""Turns composed settings into plain data, and their errors into one line."""

import re
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_tricks.errors import QatTricksError


def as_plain(config: DictConfig, where: str) -> dict[str, Any]:
    """Settings as dicts and lists, interpolations resolved.

    Raises:
        QatTricksError: a value that cannot be resolved; ``where`` names the settings.
    """
    try:
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise QatTricksError(f"{where}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The messages of ``error`` and of its cause, on one line, without details for programmers."""
    causes = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
    parts = (
        re.split(r"\s+(?:full_key: |Config search path:|Available options in)", cause)[0]
        for cause in causes
    )
    return " ".join(" ".join(parts).split())
