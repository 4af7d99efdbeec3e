"""Recipes: from the Hydra groups ``conf/recipe`` and ``conf/trick`` to checked stages of tricks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.settings.binding import make, unknown_keys
from qat_tricks.settings.compose import Composer, config_dir, one_line
from qat_tricks.settings.ranges import EPOCHS, LEARNING_RATE, MAX_DROP, check_ranges
from qat_tricks.settings.renamed import rename_keys, rename_overrides
from qat_tricks.trainer.order import check_order
from qat_tricks.trainer.trick import Trick

RECIPE_KEYS = {"name", "network", "untraced", "stages"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """An ordered list of tricks and, where it trains, epochs and a learning rate."""

    name: str
    tricks: list[Trick]
    epochs: int = 0  # 0: the tricks are done and nothing is trained
    lr: float | None = None  # peak learning rate; None: the trainer's default
    max_drop: float | None = None  # points of accuracy that the stage may cost; None: any number

    def __post_init__(self) -> None:
        check_ranges(self, epochs=EPOCHS, lr=LEARNING_RATE, max_drop=MAX_DROP)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An ordered list of stages."""

    name: str
    stages: list[Stage]
    network: str | None = None
    whole: tuple[str, ...] = ()  # name patterns of submodules that are not traced through

    @property
    def tricks(self) -> list[Trick]:
        """The tricks of all stages, in order."""
        return [trick for stage in self.stages for trick in stage.tricks]


def options(group: str) -> list[str]:
    """The names in a config group, such as ``recipe`` or ``trick``."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def trick_config(name: str) -> dict[str, Any]:
    """The settings of a trick's YAML, ``_target_`` among them; raises QatTricksError for an unknown
    trick.
    """
    if name not in options("trick"):
        raise QatTricksError(f'unknown trick "{name}": {did_you_mean(name, options("trick"))}')
    return OmegaConf.to_container(OmegaConf.load(config_dir() / "trick" / f"{name}.yaml"))[name]  # type: ignore[index,call-overload,return-value]


def trick_class(name: str, target: str | None = None) -> type[Trick]:
    """The callback class of a trick, from its ``_target_``."""
    target = str(target or trick_config(name)["_target_"])
    module, _, attribute = target.rpartition(".")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise QatTricksError(
            f'trick "{name}": _target_ {target} cannot be imported ({error})'
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Trick)):
        raise QatTricksError(
            f'trick "{name}": _target_ {target} is no trick: derive it from qat_tricks.trainer.trick.Trick'
        )
    return kind


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Composes a recipe by name.

    Args:
        name: one of ``options("recipe")``.
        overrides: Hydra overrides of the recipe, such as
            ``stages.ptq.tricks.calibrate.estimator=kl``, ``network=net`` or
            ``+trick@recipe.stages.ptq.tricks=prune``.

    Raises:
        QatTricksError: an unknown recipe, a key or value that is not allowed, an order that cannot
            work.
    """
    if name not in options("recipe"):
        raise QatTricksError(f'unknown recipe "{name}": {did_you_mean(name, options("recipe"))}')
    inside = rename_overrides([_in_recipe(override) for override in overrides])
    config, problems = Composer("train").compose([f"recipe={name}", *inside])
    try:
        loaded = build_recipe(config.recipe)
    except QatTricksError as error:
        problems.append(str(error))
    if problems:
        raise QatTricksError("; ".join(problems))
    return loaded


def _in_recipe(override: str) -> str:
    mark = override[: len(override) - len(override.lstrip("+~"))]
    key = override[len(mark) :]
    return override if key.startswith("recipe.") or "@recipe." in key else f"{mark}recipe.{key}"


def build_recipe(config: DictConfig | Mapping[str, Any]) -> Recipe:
    """Builds a recipe's stages and tricks from its composed config, every key bound to what takes
    it.

    Raises:
        QatTricksError: one line with all that is wrong.
    """
    try:
        plain: Any = (
            OmegaConf.to_container(config, resolve=True)
            if isinstance(config, DictConfig)
            else dict(config)
        )
    except OmegaConfBaseException as error:
        raise QatTricksError(f"recipe: {one_line(error)}") from error
    plain = rename_keys("recipe", plain)
    name, network = plain.get("name", "recipe"), plain.get("network")
    problems = unknown_keys(f"recipe {name}", plain, RECIPE_KEYS)
    problems += [
        f"recipe.{key}={plain[key]!r} is not allowed: give text"
        for key in ("name", "network")
        if not _is_text(plain.get(key))
    ]
    whole = plain.get("untraced") or []
    if not isinstance(whole, list) or not all(isinstance(pattern, str) for pattern in whole):
        problems.append(
            f'recipe.untraced={whole!r} is not allowed: give name patterns, such as ["stages.3.*"]'
        )
        whole = []
    stages: list[Stage] = []
    done: list[str] = []
    for stage_name, settings in _mapping("recipe.stages", plain.get("stages"), problems).items():
        where = f"stage {stage_name}"
        settings = _mapping(where, settings, problems)
        chosen = _mapping(f"{where}.tricks", settings.pop("tricks", None), problems)
        tricks: list[Trick] = []
        for trick_name, given in chosen.items():
            try:
                tricks.append(
                    make_trick(
                        trick_name,
                        _mapping(trick_name, given, problems),
                        network=network,
                        whole=whole,
                    )
                )
            except QatTricksError as error:
                problems.append(f"{where}: {error}")
        try:
            if len(tricks) == len(chosen):  # else it would miss what could not be made
                check_order(tricks, done)
        except QatTricksError as error:
            problems.append(f"{where}: {error}")
        try:
            if "name" in settings:
                raise QatTricksError(f'{where} has no setting "name"')
            stages.append(make(where, Stage, {"name": stage_name, "tricks": tricks, **settings}))
        except QatTricksError as error:
            problems.append(str(error))
        done += [*chosen, *(trick.name for trick in tricks)]
    if problems:
        raise QatTricksError("; ".join(problems))
    return Recipe(name=name, stages=stages, network=network, whole=tuple(whole))


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _mapping(where: str, value: Any, problems: list[str]) -> dict[str, Any]:
    if value is None or isinstance(value, Mapping):
        return dict(value or {})
    problems.append(f"{where}={value!r} is not allowed: give keys with values")
    return {}


def make_trick(
    name: str, settings: Mapping[str, Any], *, network: str | None = None, whole: Sequence[str] = ()
) -> Trick:
    """Makes a trick's callback; settings that are not given take their value from the trick's YAML.

    Raises:
        QatTricksError: an unknown trick, setting or value.
    """
    target = settings.get("_target_")
    defaults = {} if target is not None and name not in options("trick") else trick_config(name)
    arguments = {**defaults, **settings}
    trick = make(name, trick_class(name, arguments.pop("_target_")), arguments)
    trick.network_name, trick.whole = network, tuple(whole)
    return trick


def recipe(name: str, overrides: Sequence[str] = ()) -> list[pl.Callback]:
    """The callbacks of a recipe, for an ordinary ``pl.Trainer``; schedules are fractions of its
    epochs.

    Args:
        name: a recipe with at most one stage that trains.
        overrides: Hydra overrides, such as ``network=backbone`` or
            ``stages.qat.tricks.distill.weight=0.9``.

    Raises:
        QatTricksError: an unknown recipe or setting, or a recipe that needs several fits.
    """
    loaded = load_recipe(name, overrides)
    training = [stage.name for stage in loaded.stages if stage.epochs > 0]
    if len(training) > 1 or any(stage.epochs > 0 for stage in loaded.stages[:-1]):
        raise QatTricksError(
            f'recipe "{name}" trains in several stages ({", ".join(training)}) and cannot be one '
            f'list of callbacks: run it with qat_tricks.run_stages(module, datamodule, "{name}")'
        )
    return list(loaded.tricks)
