"""Reads the command line and checks every job that it asks for before any of them starts."""

import contextlib
import io
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from lightning_utilities.core.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_tricks.cli.check_evaluate import check_evaluate
from qat_tricks.cli.checks import check_folder
from qat_tricks.errors import QatTricksError
from qat_tricks.files import reserved
from qat_tricks.jobs.config import EXPORTED, REPORT, evaluation_folder
from qat_tricks.models.build import register_models, register_timm_models
from qat_tricks.settings.binding import Problems
from qat_tricks.settings.compose import Composer, one_line
from qat_tricks.settings.renamed import rename_overrides


class CheckedArguments(NamedTuple):
    """A command line whose configs can work."""

    arguments: list[str]  # flags first, as Hydra wants them
    forecasts: list[DictConfig]  # the configs of its jobs where forecast=true, otherwise empty


def checked_arguments(name: str, arguments: Sequence[str]) -> CheckedArguments:
    """Composes and checks every job that a command line asks for; runs and writes nothing.

    Args:
        name: of the primary config, ``train`` or ``evaluate``.
        arguments: the command line without the program.

    Raises:
        QatTricksError: one line with every error, in all jobs of a sweep.
    """
    parsed = _parse(arguments)
    flags = list(arguments)  # and their values
    for override in parsed.overrides:
        flags.remove(override)
    overrides = rename_overrides(parsed.overrides)
    jobs: list[DictConfig] = []
    if not (parsed.shell_completion or parsed.hydra_help or parsed.experimental_rerun):
        if name == "train":
            _register_models(overrides)
        jobs = _checked_jobs(name, parsed, overrides)
    forecasts = [job for job in jobs if job.get("forecast")]
    return CheckedArguments([*flags, *overrides], forecasts)


def _parse(arguments: Sequence[str]) -> Namespace:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = get_args_parser().parse_intermixed_args(arguments)
    except SystemExit as error:
        if error.code:  # argparse has printed its usage, and the reason last
            reason = printed.getvalue().strip().rpartition("error: ")[2]
            raise QatTricksError(
                f"{' '.join(reason.split())}: --help shows what can be given"
            ) from error
        raise
    commands = {
        "--run": parsed.run,
        "--multirun": parsed.multirun,
        "--cfg": parsed.cfg,
        "--info": parsed.info,
    }
    asked = [flag for flag, is_set in commands.items() if is_set]
    if len(asked) > 1:
        raise QatTricksError(f"{' and '.join(asked)} exclude each other: give one of them")
    if parsed.resolve and not (parsed.cfg or parsed.help):
        raise QatTricksError("--resolve belongs to --cfg or --help: add one of them")
    if parsed.config_path:
        raise QatTricksError(
            "--config-path would replace the configs of qat_tricks: add your own with --config-dir"
        )
    return parsed


def _register_models(overrides: Sequence[str]) -> None:
    register_models()
    # timm is slow to load
    if any(line.startswith("model=") and "timm/" in line for line in overrides):
        register_timm_models()


def _checked_jobs(name: str, parsed: Namespace, overrides: list[str]) -> list[DictConfig]:
    """Returns the checked configs of all jobs, as far as they are known and not only shown."""
    composer = Composer(
        parsed.config_name or name, Path(parsed.config_dir) if parsed.config_dir else None
    )
    is_sweep = parsed.multirun or any(line.lower() == "hydra.mode=multirun" for line in overrides)
    config, unapplied = composer.compose(overrides, sweep=is_sweep)
    problems = Problems()
    problems.messages += unapplied
    jobs: list[DictConfig] = []
    if parsed.help or parsed.cfg or parsed.info:
        pass  # Hydra only shows the config
    elif name == "evaluate":
        _check_evaluation(config, is_sweep, problems)
    elif is_sweep:
        problems.report()  # the jobs follow from a config that composes
        jobs = _check_sweep(composer, config, overrides, problems)
    else:
        jobs = _check_run(config, overrides, problems)
    problems.report()
    return jobs


def _check_evaluation(config: DictConfig, is_sweep: bool, problems: Problems) -> None:
    if is_sweep:
        raise QatTricksError("evaluate.py takes one artifact at a time: leave out --multirun")
    # Where something could not be read, that may have been the artifact.
    needs_artifact = not problems.messages
    problems.of(lambda: check_evaluate(config, needs_artifact=needs_artifact))
    for name in ("artifact", "float"):
        problems.of(lambda name=name: _check_file(config, name))  # type: ignore[misc]
    problems.of(lambda: _check_evaluation_folder(config))


def _check_run(config: DictConfig, overrides: list[str], problems: Problems) -> list[DictConfig]:
    # loads Lightning, which an evaluation does without
    from qat_tricks.cli.check_search import check_is_job
    from qat_tricks.cli.check_train import check_train

    problems.of(lambda: check_is_job(config, overrides))
    problems.of(lambda: check_train(config))
    if not problems.messages and not config.forecast:
        problems.of(lambda: _check_run_folder(config, "hydra.run.dir"))
    return [config]


def _check_sweep(
    composer: Composer, config: DictConfig, overrides: list[str], problems: Problems
) -> list[DictConfig]:
    # loads Lightning, which an evaluation does without
    from qat_tricks.cli.check_search import check_search, is_search
    from qat_tricks.cli.check_train import check_one_process, check_train

    jobs: list[DictConfig] = []
    # the jobs of other sweepers follow from results
    sweeper = str(config.hydra.sweeper.get("_target_"))
    if sweeper.endswith("BasicSweeper"):
        for job_overrides in _sweep_overrides(composer, config, overrides):
            job, unapplied = composer.compose(job_overrides)
            problems.messages += unapplied
            problems.of(lambda job=job: check_train(job))  # type: ignore[misc]
            problems.of(lambda job=job: check_one_process(job))  # type: ignore[misc]
            jobs.append(job)
    elif is_search(config):
        problems.of(lambda: check_search(composer, config, overrides))
    if not jobs and config.get("forecast") is True:
        problems.messages.append(
            f"forecast=true needs jobs that are known beforehand, and {sweeper} decides them as it "
            "goes: leave out one of the two"
        )
    wishes = {job.get("forecast") is True for job in jobs}
    if wishes == {True, False}:
        problems.messages.append("forecast is true in some jobs only: give all the same value")
    if wishes != {True}:  # forecasts write nothing
        problems.of(lambda: _check_run_folder(config, "hydra.sweep.dir"))
    return jobs


def _sweep_overrides(
    composer: Composer, config: DictConfig, overrides: list[str]
) -> list[list[str]]:
    """Returns the overrides of each job of a sweep by Hydra's own sweeper."""
    of_hydra = [line for line in overrides if line.lstrip("+~").startswith("hydra")]
    swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    swept += [line for line in overrides if line not in of_hydra]
    jobs = composer.jobs(swept)
    if not jobs:
        raise QatTricksError("the sweep has no job: a range or glob in it matches nothing")
    return [[*of_hydra, *job] for job in jobs]


def _path(config: DictConfig, name: str) -> str | None:
    """A path in the config; None where there is none, or no text."""
    path = OmegaConf.select(config, name, throw_on_resolution_failure=False)
    return path if isinstance(path, str) and path else None


def _check_file(config: DictConfig, name: str) -> None:
    path = _path(config, name)
    if path is not None and not Path(path).is_file():
        raise QatTricksError(f"{name}={path} is not a file: give the path of a .onnx or .ckpt")


def _check_evaluation_folder(config: DictConfig) -> None:
    has_folder = "folder" in config and config.folder in (None, _path(config, "folder"))
    if _path(config, "artifact") is None or not has_folder:
        return  # they are told already, and decide where the report goes
    folder = evaluation_folder(config)
    # A checkpoint is exported into the folder; what lies in one that was given may be the user's.
    is_exported = config.folder and not str(config.artifact).endswith(".onnx")
    there = {REPORT: "a report", **({EXPORTED: f"a {EXPORTED}"} if is_exported else {})}
    found = next((what for name, what in there.items() if (folder / name).exists()), None)
    if found:
        raise QatTricksError(
            f"folder={folder} has {found} already: give another folder, or delete that one"
        )
    check_folder(folder)


def _check_run_folder(config: DictConfig, key: str) -> None:
    """Checks the folder that Hydra will make, whose name is at ``key``."""
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(config)  # for ${hydra:…} in the folder's name
        folder = Path(str(OmegaConf.select(config, key)))
        check_folder(folder)
        # The other processes of a run find it going.
        if folder.is_dir() and not getattr(rank_zero_only, "rank", 0):
            with reserved(folder):
                pass
    except OmegaConfBaseException as error:
        raise QatTricksError(f"{key}: {one_line(error)}") from error
    finally:
        HydraConfig.instance().cfg = before
