"""The command line: it checks all input first; bad input ends in one line and exit status 2.

Imports that load torch or Lightning stand inside the functions. So the program starts fast, reports
an interrupt during these imports in one line, and evaluates without Lightning.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qat_tricks.cli.quiet import quiet
from qat_tricks.errors import QatTricksError
from qat_tricks.settings.config_dir import check_option, config_dir

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses
_LISTED = (
    "recipe",
    "data",
    "trainer",
    "logger",
    "sweep",
)  # groups of train.yaml whose names are all files


def train(arguments: Sequence[str] | None = None) -> None:
    """Runs ``train.py``; exits with 2 for bad input.

    Args:
        arguments: None means those of the command line.
    """
    _run("train", _train_job, arguments)


def evaluate(arguments: Sequence[str] | None = None) -> None:
    """Runs ``evaluate.py``; exits with 2 for bad input.

    Args:
        arguments: None means those of the command line.
    """
    _run("evaluate", _evaluate_job, arguments)


def _run(name: str, job: Callable[[DictConfig], Any], arguments: Sequence[str] | None) -> None:
    before = sys.argv
    _ask_for_large_pages()
    try:
        if arguments is not None:
            sys.argv = [f"{name}.py", *arguments]
        if name == "train":
            _refuse_at_once(sys.argv[1:])
        _say_at_once(name, sys.argv[1:])
        # slow: they load torch
        from qat_tricks.cli.command_line import checked_arguments

        if name == "train":
            # slow: loads Lightning, which sets up the loggers that quiet() silences
            import qat_tricks.cli.check_train  # noqa: F401

        quiet()
        checked = checked_arguments(name, sys.argv[1:])
        if checked.forecasts:  # Hydra would make a folder for each
            for config in checked.forecasts:
                _forecast(config)
            return
        sys.argv = [sys.argv[0], *checked.arguments]
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=name)(job)()
    except QatTricksError as error:
        _tell(error)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        _end_interrupted()
    except SystemExit as error:
        # Lightning ends an interrupted fit so
        if isinstance(error.__context__, KeyboardInterrupt):
            _end_interrupted()
        raise
    finally:
        sys.argv = before


def _ask_for_large_pages() -> None:
    """Lets PyTorch ask the system for large pages, unless the user has decided.

    Activations of some MB get fresh memory in each layer. In pages of 4 KiB, that took half of the
    processor's time of a pass of MobileNetV2 at 224 px. PyTorch reads this at its first allocation.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _train_job(config: DictConfig) -> list[float] | float | None:
    """Runs one job; a failed job of a sweep leaves ``error.json``, and the others go on.

    Returns:
        The objectives, which a sweeper that searches decides by; of several, a list. None where
        there are none, or the job has failed.
    """
    # slow: they load Lightning
    from qat_tricks.cli.check_train import check_train
    from qat_tricks.evidence.objectives import objective_values
    from qat_tricks.files import InUseError, write_json
    from qat_tricks.jobs.isolation import free_memory, isolated
    from qat_tricks.jobs.loggers import finish_logger, make_logger
    from qat_tricks.jobs.train import run_job

    quiet()  # in a process of its own, where a launcher started one
    job = HydraConfig.get()
    folder, is_sweep = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    failure = folder / "error.json"
    failure.unlink(missing_ok=True)  # of an earlier run in the same folder
    _say(f"{config.recipe.name}: {config.model.name} on {config.data.name}, into {_short(folder)}")
    logger = make_logger(
        config,
        folder,
        group=Path(job.sweep.dir).name if is_sweep else None,
        job_name=folder.name if is_sweep else f"{config.recipe.name}-{folder.name}",
    )
    done, values = False, []
    try:
        if is_sweep and config.objectives:  # values that a sweeper chose just now
            check_train(config)
        with isolated():
            report = run_job(config, folder, logger)
        values = objective_values(report, config.objectives) if config.objectives else []
        done = True
    except QatTricksError as error:
        _tell(error, f"job {folder.name}: " if is_sweep else "")
        if not is_sweep:
            sys.exit(BAD_INPUT)
        if not isinstance(error, InUseError):  # then the folder is another run's
            write_json(failure, {"error": str(error)})
    except Exception as error:  # a bug of ours: its traceback is printed, the other jobs still run
        if not is_sweep:
            raise
        traceback.print_exc()
        write_json(failure, {"error": f"{type(error).__name__}: {error}"})
    finally:
        finish_logger(logger, failed=not done)
    if is_sweep:
        free_memory()
    if done:
        page = _short(folder / "report.html")
        _say(f"the run is in {_short(folder)}: open {page}, deploy {_short(folder / 'model.onnx')}")
    return values[0] if len(values) == 1 else values or None


def _forecast(config: DictConfig) -> None:
    # slow: they load Lightning
    from rich.console import Console

    from qat_tricks.jobs.forecast import forecast_job

    _say(f"{config.recipe.name}: {config.model.name} on {config.data.name}, nothing is trained")
    Console().print(forecast_job(config).as_text())


def _evaluate_job(config: DictConfig) -> None:
    # slow: they load torch
    from qat_tricks.jobs.config import evaluation_folder
    from qat_tricks.jobs.evaluate import evaluate_artifact

    folder = evaluation_folder(config)
    config.folder = str(folder)  # once there is a report in it, the next one would be chosen
    _say(f"evaluate {config.artifact}, into {_short(folder)}")
    try:
        evaluate_artifact(config)
    except QatTricksError as error:
        _tell(error)
        sys.exit(BAD_INPUT)
    _say(f"the evaluation is in {_short(folder)}: report.html, report.md, report.json")


def _tell(error: QatTricksError, where: str = "") -> None:
    rank = _rank()
    print(
        f"error: {where}{' '.join(str(error).split())}{f' (process {rank})' if rank else ''}",
        file=sys.stderr,
        flush=True,
    )


# Flags whose output is read by other programs, or is no run.
_SHOWING = {"-h", "--help", "--hydra-help", "-c", "--cfg", "-i", "--info", "--version"}
_SHOWING |= {"-sc", "--shell-completion"}


def _refuse_at_once(arguments: Sequence[str]) -> None:
    """Refuses a misspelt name in a config group where that is all that was given.

    Beside other arguments, every error is told together; for that torch and Lightning are loaded,
    which takes seconds.
    """
    if len(arguments) == 1:
        group, _, name = arguments[0].partition("=")
        if group in _LISTED and name.isidentifier():
            check_option(group, name)


def _say_at_once(name: str, arguments: Sequence[str]) -> None:
    """Says that something goes on, before imports that take seconds."""
    shows = any(argument.partition("=")[0] in _SHOWING for argument in arguments)
    if "torch" not in sys.modules and not shows:
        _say(f"{name}.py: loading PyTorch{' and Lightning' if name == 'train' else ''}")


def _say(message: str) -> None:
    if _rank() == 0:
        print(message, flush=True)


def _rank() -> int:
    """Returns the rank of this process on its machine; only Lightning starts others than 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _short(folder: Path) -> str:
    return os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)


def _end_interrupted() -> None:
    print("interrupted", file=sys.stderr, flush=True)
    sys.exit(INTERRUPTED)
