"""Recipes: from the Hydra groups ``conf/recipe`` and ``conf/trick`` to checked stages of tricks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.workbench import Workbench
from qat_tricks.recipes.registry import make_trick
from qat_tricks.settings.binding import Problems, make, unknown_keys
from qat_tricks.settings.config_dir import check_option, config_dir
from qat_tricks.settings.plain import as_plain
from qat_tricks.settings.ranges import EPOCHS, LEARNING_RATE, MAX_DROP, check_ranges
from qat_tricks.settings.renamed import rename_keys, rename_overrides
from qat_tricks.settings.shipped import NeedsHydraError, compose_recipe
from qat_tricks.trainer.order import check_order, put_in_order
from qat_tricks.trainer.trick import Trick

GUIDELINE = "guideline"
"""The name under which ``train.py`` runs the guideline."""
FLOAT = "fp32"
"""The name of the recipe without stages, which trains only the float network."""
RECIPE_KEYS = {"name", "network", "untraced", "prove", "stages"}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """An ordered list of tricks and, where it trains, epochs and a learning rate."""

    name: str
    tricks: list[Trick]
    epochs: int = 0  # 0: the tricks are applied and nothing is trained
    # peak learning rate; auto: measured before the training; None: the trainer's default
    lr: float | Literal["auto"] | None = None
    max_drop: float | None = None  # points of accuracy that the stage may cost; None: any number

    def __post_init__(self) -> None:
        check_ranges(self, epochs=EPOCHS, lr=LEARNING_RATE, max_drop=MAX_DROP)

    def apply(self, work: Workbench, *, prove: bool = True) -> None:
        """Applies the tricks without training.

        Args:
            work: the network under work.
            prove: whether tricks are judged by the network's output.
        """
        # A trick is applied once in each stage, and may come again in a later one.
        work.applied.clear()
        work.begin_tricks(self.tricks, prove=prove)
        for trick in self.tricks:
            trick.apply_once(work)
        work.end_proofs()
        # The float copy fits only this stage's network.
        work.drop_reference()


@dataclass(frozen=True, kw_only=True)
class StagedRecipe:
    """An ordered list of stages, as a recipe's YAML and its overrides say."""

    name: str
    stages: list[Stage]
    network: str | None = None  # attribute of a LightningModule that holds the network
    untraced: tuple[str, ...] = ()  # name patterns of submodules that are not traced through
    prove: bool = True  # whether tricks that harm the network's output are rolled back

    @property
    def tricks(self) -> list[Trick]:
        """The tricks of all stages, in order."""
        return [trick for stage in self.stages for trick in stage.tricks]

    @property
    def training(self) -> list[Stage]:
        """The stages that train."""
        return [stage for stage in self.stages if stage.epochs > 0]


def load_recipe(name: str, overrides: Sequence[str] | None = None) -> StagedRecipe:
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
    overrides = _checked_overrides(overrides)
    if not isinstance(name, str):
        raise QatTricksError(f"recipe={name!r} is not allowed: give the name of a recipe")
    check_option("recipe", name)
    if name == GUIDELINE:
        raise QatTricksError(
            f'recipe "{name}" tries other recipes and is none itself: run '
            "qat_tricks.guideline(module, datamodule, budget=0.5)"
        )
    problems = Problems()
    config = _compose(name, overrides, problems)
    recipe = problems.of(lambda: build_recipe(config))
    problems.report()
    assert recipe is not None
    return recipe


def _compose(name: str, overrides: Sequence[str], problems: Problems) -> Any:
    """The settings of a recipe; overrides that fail are entered in ``problems``."""
    if not overrides:
        try:
            return compose_recipe(name, config_dir())
        except NeedsHydraError:
            pass
    from qat_tricks.settings.compose import Composer  # loads Hydra, which is slow

    # Users write overrides as if the recipe were the whole config.
    inside = rename_overrides([_in_recipe(override) for override in overrides])
    config, failures = Composer("train").compose([f"recipe={name}", *inside])
    problems.messages += failures
    return config.recipe


def _checked_overrides(overrides: Any) -> list[str]:
    """The overrides as a list; raises QatTricksError for anything that is no list of text."""
    is_list = overrides is None or (
        isinstance(overrides, Sequence) and not isinstance(overrides, str)
    )
    if not is_list or not all(isinstance(override, str) for override in overrides or ()):
        raise QatTricksError(
            f"overrides={overrides!r} is not allowed: give a list of key=value, such as "
            '["network=backbone"]'
        )
    return list(overrides or ())


def _in_recipe(override: str) -> str:
    # Hydra's marks for adding and deleting stand in front of the key.
    mark = override[: len(override) - len(override.lstrip("+~"))]
    key = override[len(mark) :]
    if key.startswith("trick@stages."):  # a group's place may leave out "recipe." as a key may
        key = key.replace("@", "@recipe.", 1)
        override = mark + key
    inside = key.startswith("recipe.") or "@recipe." in key
    return override if inside else f"{mark}recipe.{key}"


def build_recipe(settings: DictConfig | Mapping[str, Any]) -> StagedRecipe:
    """Builds a recipe's stages and tricks from its composed settings; an unknown key is an error.

    Args:
        settings: as a recipe's YAML holds them.

    Raises:
        QatTricksError: one line with every error.
    """
    config: dict[str, Any] = (
        as_plain(settings, "recipe") if isinstance(settings, DictConfig) else dict(settings)
    )
    config = rename_keys("recipe", config)
    problems = Problems()
    name, network, untraced = (
        config.get("name", "recipe"),
        config.get("network"),
        config.get("untraced"),
    )
    problems.messages += unknown_keys(f"recipe {name}", config, RECIPE_KEYS)
    for key in ("name", "network"):
        if not _is_text(config.get(key)):
            problems.messages.append(f"recipe.{key}={config[key]!r} is not allowed: give text")
    if not isinstance(untraced or [], list) or not all(isinstance(p, str) for p in untraced or []):
        problems.messages.append(
            f"recipe.untraced={untraced!r} is not allowed: give name patterns, such as "
            '["stages.3.*"]'
        )
        untraced = None
    prove = config.get("prove", True)
    if not isinstance(prove, bool):
        problems.messages.append(f"recipe.prove={prove!r} is not allowed: give true or false")
    if not config.get("stages") and name not in (FLOAT, GUIDELINE):
        problems.messages.append(
            f"recipe {name} has no stage, so it would change nothing: give it one, or "
            "recipe=fp32 for the float network alone"
        )
    stages: list[Stage] = []
    done: list[str] = []
    for stage_name, of_stage in _mapping("recipe.stages", config.get("stages"), problems).items():
        stages += _build_stage(stage_name, of_stage, done, problems)
    problems.report()
    return StagedRecipe(
        name=name, stages=stages, network=network, untraced=tuple(untraced or ()), prove=prove
    )


def _build_stage(name: str, settings: Any, done: list[str], problems: Problems) -> list[Stage]:
    """The stage in a list, or an empty list where something is wrong with it.

    Args:
        name: of the stage.
        settings: as the recipe has them.
        done: names of the tricks of earlier stages; this stage's are added.
        problems: takes in each error.
    """
    where = f"stage {name}"
    settings = _mapping(where, settings, problems)
    if not settings.get("tricks") and not settings.get("epochs"):
        problems.messages.append(
            f"{where} has no trick and no epochs, so it would do nothing: give it a trick, or "
            f"leave it out with ~recipe.stages.{name}"
        )
    of_tricks = _mapping(f"{where}.tricks", settings.pop("tricks", None), problems)
    tricks: list[Trick] = []
    for trick_name, trick_settings in of_tricks.items():
        values = _mapping(trick_name, trick_settings, problems)
        try:
            tricks.append(make_trick(trick_name, values))
        except QatTricksError as error:
            problems.messages.append(f"{where}: {error}")
    try:
        if len(tricks) == len(of_tricks):  # else the order would lack those that were not made
            tricks = put_in_order(tricks, done)
            check_order(tricks, done)
    except QatTricksError as error:
        problems.messages.append(f"{where}: {error}")
    # By the key in the recipe and by the class: a trick of the user's may be called otherwise.
    done += [*of_tricks, *(trick.name for trick in tricks)]
    if "name" in settings:
        problems.messages.append(f'{where} has no setting "name"')
        return []
    stage = problems.of(lambda: make(where, Stage, {"name": name, "tricks": tricks, **settings}))
    return [] if stage is None else [stage]


def _is_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _mapping(where: str, value: Any, problems: Problems) -> dict[str, Any]:
    if value is None or isinstance(value, Mapping):
        return dict(value or {})
    problems.messages.append(f"{where}={value!r} is not allowed: give keys with values")
    return {}
