"""Checks the composed config of a run before anything is read, written or trained."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from qat_tricks.cli.checks import check_data, sections
from qat_tricks.data import build_data
from qat_tricks.deploy.targets import check_opset
from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.evidence.objectives import check_objectives
from qat_tricks.jobs.config import Baseline, Export, Measure, Optimizer, Report
from qat_tricks.jobs.fitted_recipe import fitted_recipe
from qat_tricks.jobs.isolation import isolated
from qat_tricks.jobs.loggers import LoggerOptions
from qat_tricks.jobs.processes import other_processes
from qat_tricks.models.build import build_model, check_weights, model_names, register_models
from qat_tricks.recipes.guideline_steps import GuidelineSettings
from qat_tricks.recipes.recipe import GUIDELINE
from qat_tricks.settings.binding import Problems, bind, make
from qat_tricks.settings.compose import one_line
from qat_tricks.settings.config_dir import options
from qat_tricks.settings.ranges import SEED
from qat_tricks.trainer.framework import default_package

OF_THE_JOB = (
    "self",
    "max_epochs",
    "min_epochs",
    "callbacks",
    "logger",
    "enable_checkpointing",
    "default_root_dir",
)
"""Arguments of ``pl.Trainer`` that a job decides itself."""

_DATACLASSES = {
    "baseline": Baseline,
    "optimizer": Optimizer,
    "measure": Measure,
    "logger": LoggerOptions,
    "report": Report,
}


def check_train(config: DictConfig) -> None:
    """Checks a config composed from ``conf/train.yaml``: every key and every value.

    Raises:
        QatTricksError: one line with every error.
    """
    problems = Problems()
    groups = [*_DATACLASSES, "export", "data", "model", "recipe", "trainer", "stage"]
    aims = [field.name for field in fields(GuidelineSettings)] if _is_guideline(config) else []
    values = ["seed", "forecast", "target", "objectives", *aims]
    settings = sections(config, groups, values, problems)
    for name, kind in _DATACLASSES.items():
        problems.of(lambda name=name, kind=kind: make(name, kind, settings[name]))  # type: ignore[misc]
    export = problems.of(lambda: make("export", Export, settings["export"]))
    # The target's limit of opsets is checked only if both are known.
    if problems.of(lambda: fitted_recipe(config)) and export:
        problems.of(lambda: check_opset(config.target, export.opset))
    if aims:
        problems.of(lambda: _check_guideline(config, {name: settings[name] for name in aims}))
    problems.of(lambda: _check_model(settings["model"]))
    problems.of(lambda: check_objectives(settings["objectives"]))
    problems.of(lambda: _check_data(settings["data"], settings["objectives"]))
    problems.of(lambda: _check_trainer(settings["trainer"]))
    if not isinstance(settings["forecast"], bool):
        problems.messages.append(
            f"forecast={settings['forecast']!r} is not allowed: give true or false"
        )
    problems.of(lambda: _check_seed(settings["seed"]))
    problems.report()


def check_one_process(config: DictConfig) -> None:
    """Checks that a sweep's job stays in this process.

    Raises:
        QatTricksError: the trainer would start others.
    """
    if started := other_processes(config.trainer):
        raise QatTricksError(
            f"--multirun with {started}: "
            "each other process would start the whole sweep again; sweep with trainer.devices=1 "
            "trainer.strategy=auto, or start the runs one by one without --multirun"
        )


def _is_guideline(config: DictConfig) -> bool:
    return OmegaConf.select(config, "recipe.name") == GUIDELINE


def _check_guideline(config: DictConfig, aims: Mapping[str, Any]) -> None:
    make("guideline", GuidelineSettings, aims)
    if OmegaConf.select(config, "recipe.stages"):
        raise QatTricksError(
            "recipe=guideline chooses its stages itself: leave recipe.stages out, or run the "
            "recipe whose stages these are"
        )
    if config.get("forecast") is True:
        raise QatTricksError(
            "recipe=guideline forecasts its own steps: leave forecast out, or give a recipe"
        )
    if started := other_processes(config.trainer):
        raise QatTricksError(
            f"recipe=guideline with {started}: it judges and decides in one process; give "
            "trainer.devices=1 trainer.strategy=auto, or train the recipe that it names"
        )


def _check_model(model: Mapping[str, Any]) -> None:
    # the data decide these two arguments
    problems = bind("model", build_model, model, without=("num_classes", "in_channels"))
    name, factory = model.get("name"), model.get("factory")
    register_models()
    composed = [
        *options("model"),
        *(file.removesuffix(".yaml") for file in ConfigStore.instance().list("model")),
    ]
    # model_names() loads timm, which is slow: it comes last
    if not problems and name not in composed and name not in model_names():
        problems.append(
            f'unknown model "{name}": {did_you_mean(str(name), [*model_names(), "custom"])}'
        )
    if not problems and (factory is None) == (name == "custom"):
        problems.append(
            f"model.factory={factory} with model={name}: model=custom, and no other, takes one"
        )
    if problems:
        raise QatTricksError("; ".join(problems))
    check_weights(str(name), model.get("weights"))


def _check_data(data: Mapping[str, Any], objectives: Any) -> None:
    check_data(data)
    wants_accuracy = isinstance(objectives, list) and "accuracy" in objectives
    if wants_accuracy and build_data(**data).tests_on_val:
        raise QatTricksError(
            f"data={data['name']} has no validation images but its test images, and these must not "
            "decide a search: give data=imagefolder with the folders train, val and test, or "
            "objectives without accuracy"
        )


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    package = default_package()
    problems = [
        f"trainer.{key} is decided by the recipe and the job: see baseline.epochs, stage.epochs "
        "and logger"
        for key in trainer
        if key in OF_THE_JOB
    ]
    compiles = trainer.get("compile", False)
    if not isinstance(compiles, bool):
        problems.append(f"trainer.compile={compiles!r} is not allowed: give true or false")
    others = {
        key: value for key, value in trainer.items() if key not in OF_THE_JOB and key != "compile"
    }
    init = package.Trainer.__init__
    problems += bind("trainer", init, others, without=OF_THE_JOB)
    # Lightning judges those that bind, so that all errors are told at once.
    bound = {
        key: value
        for key, value in others.items()
        if not bind("trainer", init, {key: value}, without=OF_THE_JOB)
    }
    try:
        launcher = _launcher(bound)
    except Exception as error:  # Lightning raises many kinds of errors for bad arguments
        problems += _refused(bound) or [f"trainer: {one_line(error)}"]
    if problems:
        raise QatTricksError("; ".join(problems))
    if not isinstance(launcher, package.strategies.launchers._SubprocessScriptLauncher | None):
        raise QatTricksError(
            f"trainer.strategy={trainer['strategy']} trains in processes that hand back weights "
            "only, and tricks change the network's structure: give ddp"
        )


def _launcher(arguments: Mapping[str, Any]) -> Any:
    """Makes a trainer of Lightning's and returns its launcher."""
    with isolated():  # a trainer may set torch's precision and determinism
        return (
            default_package()
            .Trainer(**arguments, logger=False, enable_checkpointing=False, max_epochs=1)
            .strategy.launcher
        )


def _refused(arguments: Mapping[str, Any]) -> list[str]:
    """Adds one argument after the other, and returns a message for each that Lightning refuses."""
    taken: dict[str, Any] = {}
    problems: list[str] = []
    # The accelerator comes first, because it decides which devices and precisions there are.
    for key in sorted(arguments, key=lambda key: key != "accelerator"):
        if key == "devices" and "accelerator" in arguments and "accelerator" not in taken:
            continue  # they are those of an accelerator that was refused
        try:
            _launcher({**taken, key: arguments[key]})
            taken[key] = arguments[key]
        except Exception as error:  # as above
            problems.append(f"trainer.{key}={arguments[key]!r}: {one_line(error)}")
    return problems


def _check_seed(seed: Any) -> None:
    # True and False are whole numbers to Python
    if isinstance(seed, bool) or not isinstance(seed, int) or not SEED.contains(seed):
        raise QatTricksError(f"seed={seed!r} is not allowed: give a whole number, {SEED.text}")
