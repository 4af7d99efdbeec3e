"""The loggers of a run: Weights & Biases, offline unless you are logged in, or another."""

import base64
import io
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.evidence.page import PAGE
from qat_tricks.jobs.report_tables import flatten, report_tables, without_before
from qat_tricks.trainer.framework import default_package

if TYPE_CHECKING:
    from pytorch_lightning.loggers import (
        CSVLogger,
        Logger,
        MLFlowLogger,
        TensorBoardLogger,
        WandbLogger,
    )
else:
    CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger = (
        getattr(default_package().loggers, f"{name}Logger")
        for name in ("CSV", "", "MLFlow", "TensorBoard", "Wandb")
    )

NAMES = ("wandb", "tensorboard", "mlflow", "csv", "none")
# What Lightning's loggers ask for beside it.
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",)}
FILES = ("report.json", "report.md", "report.html", "model.onnx")
LOGIN_SECONDS = 20  # how long a server may take to answer before the run goes on offline


@dataclass(frozen=True, kw_only=True)
class LoggerOptions:
    """The config group ``logger``."""

    name: str
    project: str = "qat_tricks"
    entity: str | None = None
    tags: list[str] | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise QatTricksError(f'unknown logger "{self.name}": {did_you_mean(self.name, NAMES)}')
        packages = _PACKAGES.get(self.name)
        if packages and not any(map(find_spec, packages)):
            raise QatTricksError(
                f"logger={self.name} needs the package {packages[0]}: pip install {packages[0]}, "
                "or give logger=csv"
            )


def make_logger(
    config: DictConfig, folder: Path, *, group: str | None = None, job_name: str | None = None
) -> Logger | bool:
    """Makes the logger of one run; end it with ``finish_logger``.

    W&B never asks for a login and never stops a run: if it cannot start, one line on stderr has
    the reason, and the metrics go to a CSV file. WANDB_MODE is respected.

    Args:
        config: the composed config; ``config.logger`` holds ``LoggerOptions``.
        folder: the run's.
        group: of W&B, for the jobs of a sweep.
        job_name: the name of the run in W&B.

    Returns:
        A logger for ``pl.Trainer``; False means none.
    """
    options = LoggerOptions(**OmegaConf.to_container(config.logger, resolve=True))  # type: ignore[arg-type]
    mode = _mode() if options.name == "wandb" else "disabled"
    if options.name == "none" or (options.name == "wandb" and mode == "disabled"):
        return False
    if options.name == "wandb":
        if _rank() != 0:
            return WandbLogger(project=options.project)  # logs nothing: the first process does
        run = _start(config, options, folder, mode, group, job_name)
        if run is not None:
            return WandbLogger(experiment=run, project=options.project, save_dir=folder)
    if options.name == "tensorboard":
        return TensorBoardLogger(folder, name="tensorboard", version="")
    if options.name == "mlflow":
        return _mlflow_logger(config, options, folder, job_name)
    return CSVLogger(folder, name="csv", version="")


def _mlflow_logger(
    config: DictConfig, options: LoggerOptions, folder: Path, job_name: str | None
) -> Logger:
    """MLflow's, into the run's folder or where MLFLOW_TRACKING_URI says."""
    # MLflow refuses to write into a folder, by default, for its own server has left that behind.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(
        experiment_name=options.project,
        run_name=job_name,
        tracking_uri=os.environ.get("MLFLOW_TRACKING_URI")
        or (folder.resolve() / "mlruns").as_uri(),
        tags=dict.fromkeys(options.tags or (), ""),
    )
    logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    return logger


def finish_logger(logger: Logger | bool, *, failed: bool = False) -> None:
    """Ends the run of a logger from ``make_logger``; one that is online uploads the rest first."""
    try:
        if isinstance(logger, WandbLogger) and _rank() == 0:
            logger.experiment.finish(exit_code=int(failed))
        elif isinstance(logger, (MLFlowLogger, TensorBoardLogger)):
            logger.finalize("failed" if failed else "success")
        elif isinstance(logger, CSVLogger):
            logger.save()
    except Exception as error:  # the run itself is done, and no logger may spoil it
        _warn(f"the logger could not be ended ({_reason(error)})")


def log_report(
    logger: Any,
    report: Mapping[str, Any],
    folder: Path,
    pictures: Mapping[int, str] | None = None,
) -> None:
    """Logs a finished run's report.

    The figures of a stage are ``stage/NAME/accuracy`` and so on; all others are ``report/…``, such
    as ``report/size_bytes/int8``. W&B also gets them as the run's summary, the stages as the table
    ``ledger``, and the report and ``model.onnx`` as an artifact.

    Args:
        logger: from ``make_logger``, a list of loggers, or False.
        report: as in ``report.json``.
        folder: holds the files.
        pictures: of test images, as of ``write_report``.
    """
    for one in logger if isinstance(logger, list | tuple) else [logger]:
        if not isinstance(one, Logger) or _rank() != 0:
            continue
        try:
            metrics = report_metrics(report)
            if isinstance(one, WandbLogger):
                _log_to_wandb(one.experiment, metrics, report, folder, pictures or {})
            else:
                one.log_metrics(metrics)
                one.save()
        except Exception as error:  # the report is on disk already
            _warn(f"the report could not be logged to {type(one).__name__} ({_reason(error)})")


def report_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of a report by their path, such as ``stage/onnx/accuracy``."""
    stages = {f"stage/{stage['name']}": without_before(stage) for stage in report["stages"]}
    # neither of these describes the result
    others = {
        key: value
        for key, value in report.items()
        if key not in ("stages", "preprocessing", "environment")
    }
    flat = flatten({**stages, "report": others})
    return {
        key: value
        for key, value in flat.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _log_to_wandb(
    run: Any,
    metrics: dict[str, float],
    report: Mapping[str, Any],
    folder: Path,
    pictures: Mapping[int, str],
) -> None:
    import wandb  # slow to load

    run.log(metrics)
    run.summary.update({**metrics, **{key: report[key] for key in ("recipe", "model", "data")}})
    name = "-".join(str(report[key]) for key in ("recipe", "model", "data"))
    # W&B takes 100 keys of metadata, and a report has more figures: each group is one.
    metadata: dict[str, Any] = {}
    for key, value in metrics.items():
        group, _, figure = key.partition("/")
        metadata.setdefault(group, {})[figure] = value
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type="model", metadata=metadata)
    for file in FILES:
        if (folder / file).is_file():
            artifact.add_file(str(folder / file), policy="immutable")
    run.log_artifact(artifact)
    # Last: a cell that W&B does not take costs no figure and no file.
    run.log(_media(report, folder, pictures))


def _media(report: Mapping[str, Any], folder: Path, pictures: Mapping[int, str]) -> dict[str, Any]:
    """The tables and the page of a report, as W&B shows them."""
    import wandb  # slow to load

    media: dict[str, Any] = {}
    for title, rows in report_tables(report).items():
        if title == "disagreements":
            rows = [{"picture": _picture(pictures.get(row["image"])), **row} for row in rows]
        media[title] = wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])
    if (folder / PAGE).is_file():
        # The artifact has it too, and shows nothing of it.
        media["page"] = wandb.Html(str(folder / PAGE), inject=False)
    return media


def _picture(address: str | None) -> Any:
    """The picture of an address of ``disagreement_pictures``, as W&B shows it; None has none."""
    import wandb  # slow to load

    if address is None:
        return None
    png = base64.b64decode(address.partition(",")[2])
    return wandb.Image(Image.open(io.BytesIO(png)))


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0))


def _mode() -> str:
    """Returns W&B's mode, online, offline or disabled.

    WANDB_MODE or W&B's settings decide; without a login it is never online.
    """
    import wandb  # slow to load

    try:
        settings = wandb.setup().settings
        wish = os.environ.get("WANDB_MODE") or settings.mode
        if wish in ("disabled", "offline", "dryrun"):
            return "disabled" if wish == "disabled" else "offline"
        return "online" if _logged_in(settings) else "offline"
    except Exception:  # the same fault is reported when the run starts
        return "offline"


def _logged_in(settings: Any) -> bool:
    if (
        os.environ.get("WANDB_API_KEY")
        or settings.api_key
        or getattr(settings, "identity_token_file", None)
    ):
        return True
    # the files that "wandb login" may have written
    names = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    candidates = (Path(name).expanduser() for name in names if name)
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        return False
    try:
        host = urlsplit(settings.base_url).netloc
        return netrc(file).authenticators(host) is not None
    except (NetrcParseError, OSError):
        return False


def _start(
    config: DictConfig,
    options: LoggerOptions,
    folder: Path,
    mode: str,
    group: str | None,
    job_name: str | None,
) -> Any:
    """Starts a W&B run, separate from others of this process.

    Returns:
        The run; None if W&B cannot start, for which a line on stderr has the reason.
    """
    import wandb  # slow to load

    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = wandb.init(
                project=options.project,
                entity=options.entity,
                tags=options.tags or None,
                dir=str(folder),
                group=group,
                name=job_name,
                mode=attempt,  # type: ignore[arg-type]
                config=OmegaConf.to_container(config, resolve=True),  # type: ignore[arg-type]
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", init_timeout=LOGIN_SECONDS),
            )
            # as Lightning's logger does for a run that it starts itself
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            return run
        except Exception as error:  # W&B raises many kinds; none of them is worth a training
            then = "goes on offline" if attempt != "offline" else "logs to csv instead"
            _warn(f"W&B cannot start {attempt} ({_reason(error)}): this run {then}")
    return None


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
