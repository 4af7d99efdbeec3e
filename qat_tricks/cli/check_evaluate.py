"""Checks the config of an evaluation, and what it shares with a run's; loads neither Lightning nor
a logger.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_tricks.data import build_data, data_builder
from qat_tricks.deploy.runtimes.registry import check_runtimes
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.config import DeviceMeasure
from qat_tricks.settings.binding import Problems, bind, make, unknown_keys
from qat_tricks.settings.compose import one_line


def check_evaluate(config: DictConfig) -> None:
    """Checks a config composed from ``conf/evaluate.yaml``.

    Raises:
        QatTricksError: one line with all that is wrong.
    """
    problems = Problems()
    if OmegaConf.is_missing(config, "artifact"):
        raise QatTricksError(
            "artifact is missing: give artifact=PATH, a .onnx or .ckpt that a run wrote"
        )
    values = {"artifact", "float", "folder", "data", "runtimes", "allow_preprocessing_change"}
    given = sections(config, {"measure"}, values, problems)
    problems.of(lambda: make("measure", DeviceMeasure, given["measure"]))
    problems.of(lambda: _check_runtimes(given["runtimes"]))
    if not isinstance(given["allow_preprocessing_change"], bool):
        value = given["allow_preprocessing_change"]
        problems.found.append(
            f"allow_preprocessing_change={value!r} is not allowed: give true or false"
        )
    for name in ("artifact", "float", "folder"):
        value = given[name]
        if not (isinstance(value, str) and value) and not (value is None and name != "artifact"):
            problems.found.append(f"{name}={value!r} is not allowed: give a path")
    if given["data"] is not None and not isinstance(given["data"], Mapping):
        problems.found.append(f"data={given['data']!r} is not allowed: give data=NAME")
    elif given["data"] is not None:
        problems.of(lambda: check_data(given["data"]))
    problems.report()


def _check_runtimes(runtimes: Any) -> None:
    if runtimes is not None and not (
        isinstance(runtimes, list) and runtimes and all(isinstance(r, str) for r in runtimes)
    ):
        raise QatTricksError(
            f"runtimes={runtimes!r} is not allowed: give a list such as [onnxruntime,openvino], or "
            "null"
        )
    check_runtimes(runtimes or [])


def check_folder(folder: Path) -> None:
    """Checks that a run's folder can be made and written, and leaves nothing behind.

    Raises:
        QatTricksError: it cannot.
    """
    nearest = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    try:
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".qat_tricks"):
            pass
    except OSError as error:
        raise QatTricksError(
            f'the run folder "{folder}" cannot be written ({error.strerror}): give one that can '
            "with hydra.run.dir, in a sweep hydra.sweep.dir, in evaluate.py folder"
        ) from error


def sections(
    config: DictConfig, groups: set[str], values: set[str], problems: Problems
) -> dict[str, Any]:
    """The top-level parts of a composed config as plain data. Raises QatTricksError at once where
    one cannot be had.
    """
    given = {str(key) for key in config if key != "hydra"}
    for problem in unknown_keys("the config", sorted(given), groups | values):
        problems.found.append(problem)
    found: dict[str, Any] = {}
    for name in sorted(groups | values):
        try:
            if name not in given:
                raise QatTricksError(f"the config lacks {name}")
            value = config[name]
            found[name] = (
                OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            )
            if name in groups and not isinstance(found[name], Mapping):
                raise QatTricksError(
                    f"{name}={found.pop(name)!r} is not allowed: give {name}.KEY=VALUE"
                )
        except OmegaConfBaseException as error:
            problems.found.append(f"{name}: {one_line(error)}")
        except QatTricksError as error:
            problems.found.append(str(error))
    if len(found) < len(groups | values):
        problems.report()
    return found


def check_data(data: dict[str, Any]) -> None:
    """Checks the settings of a data set (QatTricksError)."""
    problems = bind(
        "data", data_builder(str(data.get("name"))), {k: v for k, v in data.items() if k != "name"}
    )
    if problems:
        raise QatTricksError("; ".join(problems))
    build_data(**data)  # reads nothing yet, and refuses what cannot be
