"""Checks that a run and an evaluation share; they load neither Lightning nor a logger."""

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_tricks.data import build_data, check_counts, data_builder
from qat_tricks.errors import QatTricksError
from qat_tricks.settings.binding import Problems, bind
from qat_tricks.settings.compose import one_line
from qat_tricks.settings.config_dir import no_such_part


def sections(
    config: DictConfig, groups: Collection[str], values: Collection[str], problems: Problems
) -> dict[str, Any]:
    """Returns the top-level parts of a composed config as plain data.

    Args:
        config: the ``hydra`` node in it is ignored.
        groups: names of the parts that hold settings.
        values: names of the others.
        problems: get the unknown parts.

    Raises:
        QatTricksError: a part is missing or cannot be resolved; with all ``problems`` so far.
    """
    names = sorted({*groups, *values})
    present = sorted(str(key) for key in config if key != "hydra")
    problems.messages += [no_such_part(key, names) for key in present if key not in names]
    parts: dict[str, Any] = {}
    for name in names:
        try:
            if name not in present:
                raise QatTricksError(f"the config lacks {name}")
            value = config[name]
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
            if name in groups and not isinstance(value, Mapping):
                raise QatTricksError(f"{name}={value!r} is not allowed: give {name}.KEY=VALUE")
            parts[name] = value
        except OmegaConfBaseException as error:  # such as an interpolation without a target
            problems.messages.append(f"{name}: {one_line(error)}")
        except QatTricksError as error:
            problems.messages.append(str(error))
    if len(parts) < len(names):  # the checks that follow need all of them
        problems.report()
    return parts


def check_data(data: Mapping[str, Any]) -> None:
    """Checks the settings of a data set; reads no image.

    Raises:
        QatTricksError: one line with every error.
    """
    options = {key: value for key, value in data.items() if key != "name"}
    problems = bind("data", data_builder(str(data.get("name"))), options) + check_counts(options)
    if problems:
        raise QatTricksError("; ".join(problems))
    build_data(**data)  # refuses values that contradict one another


def check_folder(folder: Path) -> None:
    """Checks that a run's folder can be made and written; leaves nothing behind.

    Raises:
        QatTricksError: it cannot.
    """
    candidates = (folder.absolute(), *folder.absolute().parents)
    # The folder itself may not exist yet: its nearest parent decides.
    nearest = next(path for path in candidates if path.exists())
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".qat_tricks"):
            pass
    except OSError as error:
        raise QatTricksError(
            f'the run folder "{folder}" cannot be written ({error.strerror}): give one that can '
            "with hydra.run.dir, in a sweep hydra.sweep.dir, in evaluate.py folder"
        ) from error
