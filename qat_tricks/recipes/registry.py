"""Looks tricks and recipes up in the config groups, which are the registry."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from omegaconf import OmegaConf

from qat_tricks.errors import QatTricksError
from qat_tricks.settings.binding import make
from qat_tricks.settings.config_dir import check_option, config_dir, options
from qat_tricks.trainer.trick import Trick


def trick_config(name: str) -> dict[str, Any]:
    """The settings of a trick's YAML, ``_target_`` among them.

    Raises:
        QatTricksError: an unknown trick.
    """
    check_option("trick", name)
    # The file has the trick's name as its one key, so that recipes merge it in place.
    settings: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "trick" / f"{name}.yaml"))
    return settings[name]


def trick_class(name: str, target: str) -> type[Trick]:
    """The callback class of a trick, from its ``_target_``.

    Raises:
        QatTricksError: it cannot be imported, or is no trick.
    """
    module, _, attribute = target.rpartition(".")
    try:
        kind = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise QatTricksError(
            f'trick "{name}": _target_ {target} cannot be imported ({error})'
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Trick)):
        raise QatTricksError(
            f'trick "{name}": _target_ {target} is no trick: derive it from '
            "qat_tricks.trainer.trick.Trick"
        )
    return kind


def make_trick(name: str, settings: Mapping[str, Any]) -> Trick:
    """Makes a trick; missing settings take their value from the trick's YAML.

    Raises:
        QatTricksError: an unknown trick, setting or value.
    """
    # A trick of the user's has no YAML of ours, and its ``_target_`` stands in the recipe.
    is_own = "_target_" in settings and name not in options("trick")
    arguments = {**({} if is_own else trick_config(name)), **settings}
    return make(name, trick_class(name, str(arguments.pop("_target_"))), arguments)
