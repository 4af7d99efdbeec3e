"""Reads the command line and checks every job that it asks for before any of them starts."""

import contextlib
import io
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_tricks.cli.check_evaluate import check_evaluate
from qat_tricks.cli.checks import check_folder
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.config import evaluation_folder
from qat_tricks.settings.binding import Problems
from qat_tricks.settings.compose import Composer, one_line


def preflight(name: str, arguments: Sequence[str]) -> list[str]:
    """Composes and checks all that a command line asks for; nothing is run or written.

    Args:
        name: of the primary config, ``train`` or ``evaluate``.
        arguments: the command line without the program.

    Returns:
        The same arguments, flags first, as Hydra wants them.

    Raises:
        QatTricksError: one line with all that is wrong, in all jobs of a sweep.
    """
    parsed = _parse(arguments)
    flags = list(arguments)
    for override in parsed.overrides:
        flags.remove(override)
    if not (parsed.shell_completion or parsed.hydra_help or parsed.experimental_rerun):
        if name == "train":
            _register_models(parsed.overrides)
        problems = _problems(name, parsed)
        if problems:
            raise QatTricksError("; ".join(dict.fromkeys(problems)))
    return [*flags, *parsed.overrides]


def _parse(arguments: Sequence[str]) -> Namespace:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = get_args_parser().parse_intermixed_args(arguments)
    except SystemExit as error:
        if error.code:
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
    given = [flag for flag, on in commands.items() if on]
    if len(given) > 1:
        raise QatTricksError(f"{' and '.join(given)} exclude each other: give one of them")
    if parsed.resolve and not (parsed.cfg or parsed.help):
        raise QatTricksError("--resolve belongs to --cfg or --help: add one of them")
    if parsed.config_path:
        raise QatTricksError(
            "--config-path would replace the configs of qat_tricks: add your own with --config-dir"
        )
    return parsed


def _register_models(overrides: Sequence[str]) -> None:
    from qat_tricks.models.build import register_models, register_timm_models

    register_models()
    if any(line.startswith("model=") and "timm/" in line for line in overrides):
        register_timm_models()


def _problems(name: str, parsed: Namespace) -> list[str]:
    composer = Composer(
        parsed.config_name or name, Path(parsed.config_dir) if parsed.config_dir else None
    )
    sweep = parsed.multirun or any(
        line.lower() == "hydra.mode=multirun" for line in parsed.overrides
    )
    config, found = composer.compose(parsed.overrides, sweep=sweep)
    problems = Problems()
    problems.found += found
    if parsed.help or parsed.cfg or parsed.info:  # only shown
        return problems.found
    if name == "evaluate":
        if sweep:
            return ["evaluate.py takes one artifact at a time: leave out --multirun"]
        problems.of(lambda: check_evaluate(config))
        if not problems.found:
            problems.of(lambda: _check_paths(config, "hydra.run.dir"))
        return problems.found
    # loads Lightning, which an evaluation does without
    from qat_tricks.cli.check_train import check_one_process, check_train

    if not sweep:
        problems.of(lambda: check_train(config))
        if not problems.found:
            problems.of(lambda: _check_paths(config, "hydra.run.dir"))
        return problems.found
    if found:
        return found
    # others decide their jobs as they go
    if str(config.hydra.sweeper.get("_target_")).endswith("BasicSweeper"):
        of_hydra = [line for line in parsed.overrides if line.lstrip("+~").startswith("hydra")]
        swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        swept += [line for line in parsed.overrides if line not in of_hydra]
        jobs = composer.jobs(swept)
        if not jobs:
            return ["the sweep has no job: a range or glob in it matches nothing"]
        for overrides in jobs:
            job, found = composer.compose([*of_hydra, *overrides])
            problems.found += found
            problems.of(lambda job=job: check_train(job))  # type: ignore[misc]
            problems.of(lambda job=job: check_one_process(job))  # type: ignore[misc]
    problems.of(lambda: _check_paths(config, "hydra.sweep.dir"))
    return problems.found


def _check_paths(config: DictConfig, key: str) -> None:
    if "artifact" in config:
        if not Path(config.artifact).is_file():
            raise QatTricksError(
                f"artifact={config.artifact} is not a file: give a .onnx or .ckpt that a run wrote"
            )
        return check_folder(evaluation_folder(config))
    before = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(config)  # for ${hydra:…} in the folder's name
        return check_folder(Path(str(OmegaConf.select(config, key))))
    except OmegaConfBaseException as error:
        raise QatTricksError(f"{key}: {one_line(error)}") from error
    finally:
        HydraConfig.instance().cfg = before
