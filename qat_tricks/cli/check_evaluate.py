"""Checks the composed config of an evaluation; loads neither Lightning nor a logger."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qat_tricks.cli.checks import check_data, sections
from qat_tricks.deploy.runtimes.registry import check_runtimes
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.config import DeviceMeasure, Report
from qat_tricks.settings.binding import Problems, make

_VALUES = (
    "artifact",
    "module",
    "float",
    "folder",
    "data",
    "runtimes",
    "allow_preprocessing_change",
    "sensitivity",
)


def check_evaluate(config: DictConfig, *, needs_artifact: bool = True) -> None:
    """Checks a config composed from ``conf/evaluate.yaml``; opens no file.

    Args:
        config: composed.
        needs_artifact: whether a missing artifact is an error.

    Raises:
        QatTricksError: one line with every error.
    """
    problems = Problems()
    if OmegaConf.is_missing(config, "artifact"):
        config = config.copy()
        config.artifact = None
    settings = sections(config, ["measure", "report"], _VALUES, problems)
    # Every part is checked, and all errors are reported at once.
    problems.of(lambda: make("measure", DeviceMeasure, settings["measure"]))
    problems.of(lambda: make("report", Report, settings["report"]))
    problems.of(lambda: _check_runtimes(settings["runtimes"]))
    for name in ("allow_preprocessing_change", "sensitivity"):
        value = settings[name]
        if not isinstance(value, bool):
            problems.messages.append(f"{name}={value!r} is not allowed: give true or false")
    if settings["sensitivity"] is True and str(settings["artifact"]).endswith(".onnx"):
        problems.messages.append(
            "sensitivity=true needs a .ckpt, for the layers of a .onnx cannot be put back into "
            "float: give artifact=model.ckpt, which lies beside it"
        )
    if settings["artifact"] is None and needs_artifact:
        problems.messages.append("artifact is missing: give artifact=PATH, a .onnx or .ckpt")
    for name in ("artifact", "float", "folder"):
        path = settings[name]
        if path is not None and not (isinstance(path, str) and path):
            problems.messages.append(f"{name}={path!r} is not allowed: give a path")
    module = settings["module"]
    if not (module is None or (isinstance(module, str) and "." in module.strip("."))):
        problems.messages.append(f"module={module!r} is not allowed: give package.Class")
    problems.of(lambda: _check_optional_data(settings["data"]))
    problems.report()


def _check_optional_data(data: Any) -> None:
    if data is None:  # the artifact's own
        return
    if not isinstance(data, Mapping):
        raise QatTricksError(f"data={data!r} is not allowed: give data=NAME")
    check_data(data)


def _check_runtimes(runtimes: Any) -> None:
    if runtimes is None:  # all that are installed
        return
    is_list = isinstance(runtimes, list) and all(isinstance(name, str) for name in runtimes)
    if not runtimes or not is_list:
        raise QatTricksError(
            f"runtimes={runtimes!r} is not allowed: give a list such as [onnxruntime,openvino], or "
            "null"
        )
    check_runtimes(runtimes)
