"""The command line: all is checked first; whatever the user did wrong is one line and exit status
2.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qat_tricks.errors import QatTricksError

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses


def train(arguments: Sequence[str] | None = None) -> None:
    """Runs ``train.py`` with ``arguments``, by default the command line's; exits with 2 for bad
    input.
    """
    _run("train", _train_job, arguments)


def evaluate(arguments: Sequence[str] | None = None) -> None:
    """Runs ``evaluate.py`` with ``arguments``, by default the command line's; exits with 2 for bad
    input.
    """
    _run("evaluate", _evaluate_job, arguments)


def _run(name: str, job: Callable[[DictConfig], None], arguments: Sequence[str] | None) -> None:
    before = sys.argv
    try:
        if arguments is not None:
            sys.argv = [f"{name}.py", *arguments]
        from qat_tricks.cli.command_line import (
            preflight,
        )  # loads torch: an interrupt meanwhile is an interrupt, not a traceback
        from qat_tricks.cli.quiet import quiet
        from qat_tricks.settings.compose import config_dir

        if name == "train":
            import qat_tricks.cli.check_train  # noqa: F401 - loads Lightning, which sets up the loggers that quiet() silences

        quiet()
        sys.argv = [sys.argv[0], *preflight(name, sys.argv[1:])]
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(job)()
    except QatTricksError as error:
        _tell(error)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        _end_interrupted()
    except SystemExit as error:
        # Lightning's way to end an interrupted fit
        if isinstance(error.__context__, KeyboardInterrupt):
            _end_interrupted()
        raise
    finally:
        sys.argv = before


def _train_job(config: DictConfig) -> None:
    """Runs one job; in a sweep one that fails leaves ``error.json``, and the others go on."""
    from qat_tricks.cli.quiet import quiet
    from qat_tricks.evidence.files import write_json
    from qat_tricks.jobs.isolation import free_memory, isolated
    from qat_tricks.jobs.loggers import finish_logger, make_logger
    from qat_tricks.jobs.train import run_job

    quiet()  # in a process of its own, where a launcher started one
    if config.preflight:
        _preflight_job(config)
        return
    this = HydraConfig.get()
    folder, sweep = Path(this.runtime.output_dir), this.mode == RunMode.MULTIRUN
    group = Path(this.sweep.dir).name if sweep else None
    failure = folder / "error.json"
    failure.unlink(missing_ok=True)
    _say(f"{config.recipe.name}: {config.model.name} on {config.data.name}, into {_short(folder)}")
    logger = make_logger(
        config,
        folder,
        group=group,
        job_name=folder.name if sweep else f"{config.recipe.name}-{folder.name}",
    )
    done = False
    try:
        with isolated():
            run_job(config, folder, logger)
        done = True
    except QatTricksError as error:
        _tell(error, f"job {folder.name}: " if sweep else "")
        if not sweep:
            sys.exit(BAD_INPUT)
        write_json(failure, {"error": str(error)})
    except Exception as error:  # a bug of ours: its traceback is told, and the other jobs still run
        if not sweep:
            raise
        traceback.print_exc()
        write_json(failure, {"error": f"{type(error).__name__}: {error}"})
    finally:
        finish_logger(logger, failed=not done)
    if sweep:
        free_memory()
    if done:
        _say(f"the run is in {_short(folder)}: report.md, report.json, model.onnx")


def _preflight_job(config: DictConfig) -> None:
    from rich.console import Console

    from qat_tricks.jobs.forecast import forecast_job

    _say(f"{config.recipe.name}: {config.model.name} on {config.data.name}, nothing is trained")
    try:
        Console().print(forecast_job(config).as_text())
    except QatTricksError as error:
        _tell(error)
        sys.exit(BAD_INPUT)


def _evaluate_job(config: DictConfig) -> None:
    from qat_tricks.jobs.config import evaluation_folder
    from qat_tricks.jobs.evaluate import evaluate_artifact

    _say(f"evaluate {config.artifact}, into {_short(evaluation_folder(config))}")
    try:
        evaluate_artifact(config)
    except QatTricksError as error:
        _tell(error)
        sys.exit(BAD_INPUT)
    _say(f"the evaluation is in {_short(evaluation_folder(config))}: report.md, report.json")


def _tell(error: QatTricksError, where: str = "") -> None:
    rank = _rank()
    print(
        f"error: {where}{' '.join(str(error).split())}{f' (process {rank})' if rank else ''}",
        file=sys.stderr,
        flush=True,
    )


def _say(message: str) -> None:
    if _rank() == 0:
        print(message, flush=True)


def _rank() -> int:
    """Of this process among those of one machine; 0 unless Lightning started it for distributed
    training.
    """
    return int(os.environ.get("LOCAL_RANK", "0"))


def _short(folder: Path) -> str:
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)


def _end_interrupted() -> None:
    print("interrupted", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)
