"""Recipes: from the Hydra groups ``conf/recipe`` and ``conf/trick`` to checked stages of tricks."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.order import check_order
from qat_tricks.trick import Trick

RECIPE_KEYS = {"name", "network", "stages"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """An ordered list of tricks and, where it trains, epochs and a learning rate."""

    name: str
    tricks: list[Trick]
    epochs: int = 0  # 0: the tricks are done and nothing is trained
    lr: float | None = None  # peak learning rate; None: the trainer's default
    max_drop: float | None = None  # points of accuracy that the stage may cost; None: any number

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 0:
            problems.append(f"epochs={self.epochs!r}: give a whole number, 0 for no training")
        if self.lr is not None and not (isinstance(self.lr, (int, float)) and self.lr > 0):
            problems.append(f"lr={self.lr!r}: give a number above 0, or null")
        if self.max_drop is not None and not (isinstance(self.max_drop, (int, float)) and self.max_drop >= 0):
            problems.append(f"max_drop={self.max_drop!r}: give a number of points, 0 or more, or null")
        if problems:
            raise QatTricksError("; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An ordered list of stages."""

    name: str
    stages: list[Stage]
    network: str | None = None

    @property
    def tricks(self) -> list[Trick]:
        """The tricks of all stages, in order."""
        return [trick for stage in self.stages for trick in stage.tricks]


def config_dir() -> Path:
    """The folder of the YAML files: beside the package in a checkout, inside it when installed from a wheel."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "conf"


def options(group: str) -> list[str]:
    """The names in a config group, such as ``recipe`` or ``trick``."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def trick_config(name: str) -> dict[str, Any]:
    """The settings of a trick's YAML, ``_target_`` among them; raises QatTricksError for an unknown trick."""
    if name not in options("trick"):
        raise QatTricksError(f'unknown trick "{name}": {did_you_mean(name, options("trick"))}')
    return OmegaConf.to_container(OmegaConf.load(config_dir() / "trick" / f"{name}.yaml"))[name]  # type: ignore[index,call-overload,return-value]


def trick_class(name: str, target: str | None = None) -> type[Trick]:
    """The callback class of a trick, from its ``_target_``."""
    module, _, attribute = (target or trick_config(name)["_target_"]).rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise QatTricksError(f'trick "{name}": _target_ {target} cannot be imported ({error})') from error


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Composes a recipe by name.

    Args:
        name: one of ``options("recipe")``.
        overrides: Hydra overrides of the recipe, such as ``stages.ptq.tricks.calibrate.estimator=kl`` or ``network=net``.

    Raises:
        QatTricksError: an unknown recipe, a key or a value that is not allowed, tricks in an order that cannot work; all
            that is wrong at once.
    """
    if name not in options("recipe"):
        raise QatTricksError(f'unknown recipe "{name}": {did_you_mean(name, options("recipe"))}')
    try:
        with initialize_config_dir(str(config_dir().absolute()), version_base="1.3"):
            config = compose(f"recipe/{name}", overrides=[_in_recipe(override) for override in overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise QatTricksError(f'recipe "{name}" with {list(overrides)}: {one_line(error)}') from error
    return check_recipe(config.recipe)


def _in_recipe(override: str) -> str:
    mark = override[: len(override) - len(override.lstrip("+~"))]
    key = override[len(mark) :]
    return override if key.startswith("recipe.") or "@recipe" in key else f"{mark}recipe.{key}"


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line."""
    if isinstance(error, MissingConfigException) and error.options:
        missing = str(error.missing_cfg_file)
        return f'there is no "{missing}": {did_you_mean(missing.split("/")[-1], error.options)}'
    return " ".join(str(error).split())


def check_recipe(config: DictConfig | Mapping[str, Any]) -> Recipe:
    """Builds a recipe's stages and tricks from its composed config, every key bound to what takes it.

    Raises:
        QatTricksError: one line with all that is wrong.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    name = plain.get("name", "recipe")
    problems = _unknown_keys(f"recipe {name}", plain, RECIPE_KEYS)
    stages: list[Stage] = []
    done: list[str] = []
    for stage_name, settings in (plain.get("stages") or {}).items():
        where = f"stage {stage_name}"
        settings = dict(settings or {})
        tricks: list[Trick] = []
        for trick_name, given in dict(settings.pop("tricks", None) or {}).items():
            try:
                tricks.append(make_trick(trick_name, given or {}, network=plain.get("network")))
            except QatTricksError as error:
                problems.append(f"{where}: {error}")
        problems += _unknown_keys(where, settings, {"epochs", "lr", "max_drop"})
        known = {key: value for key, value in settings.items() if key in ("epochs", "lr", "max_drop")}
        try:
            check_order(tricks, done)
            stages.append(Stage(name=stage_name, tricks=tricks, **known))
        except QatTricksError as error:
            problems.append(f"{where}: {error}")
        done += [trick.name for trick in tricks]
    if problems:
        raise QatTricksError("; ".join(problems))
    return Recipe(name=name, stages=stages, network=plain.get("network"))


def make_trick(name: str, settings: Mapping[str, Any], *, network: str | None = None) -> Trick:
    """Makes a trick's callback; settings that are not given take their value from the trick's YAML.

    Raises:
        QatTricksError: an unknown trick, setting or value.
    """
    target = settings.get("_target_")
    defaults = {} if target is not None and name not in options("trick") else trick_config(name)
    arguments = {**defaults, **settings}
    kind = trick_class(name, arguments.pop("_target_"))
    allowed = set(inspect.signature(kind).parameters)
    unknown = _unknown_keys(name, arguments, allowed)
    if unknown:
        raise QatTricksError("; ".join(unknown))
    try:
        trick = kind(**arguments)
    except TypeError as error:
        raise QatTricksError(f"{name}: a setting has the wrong type ({one_line(error)})") from error
    except QatTricksError as error:
        raise QatTricksError(f"{name}: {error}") from error
    trick.network_name = network
    return trick


def _unknown_keys(where: str, given: Mapping[str, Any], allowed: set[str]) -> list[str]:
    return [f'{where} has no setting "{key}": {did_you_mean(str(key), allowed)}' for key in given if key not in allowed]


def recipe(name: str, overrides: Sequence[str] = ()) -> list[pl.Callback]:
    """The callbacks of a recipe, for an ordinary ``pl.Trainer``; schedules are fractions of its epochs.

    Args:
        name: a recipe with at most one stage that trains.
        overrides: Hydra overrides, such as ``network=backbone`` or ``stages.qat.tricks.distill.weight=0.9``.

    Raises:
        QatTricksError: an unknown recipe or setting, or a recipe that needs several fits.
    """
    loaded = load_recipe(name, overrides)
    training = [stage.name for stage in loaded.stages if stage.epochs > 0]
    if len(training) > 1 or any(stage.epochs > 0 for stage in loaded.stages[:-1]):
        raise QatTricksError(
            f'recipe "{name}" trains in several stages ({", ".join(training)}) and cannot be one list of callbacks: '
            f'run it with qat_tricks.run_stages(module, datamodule, "{name}")'
        )
    return list(loaded.tricks)
