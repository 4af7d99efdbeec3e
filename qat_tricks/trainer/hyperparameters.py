"""Makes a LightningModule from the hyperparameters in a checkpoint, as Lightning does."""

import sys
from collections.abc import Mapping
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat_tricks.errors import QatTricksError
from qat_tricks.trainer.framework import PACKAGES, package_of
from qat_tricks.trainer.reading import not_read, unread_in

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule

KEYS = ("hyper_parameters", "datamodule_hyper_parameters")
"""Where a checkpoint has hyperparameters, which only making a module needs."""


class MissingArgumentError(QatTricksError, TypeError):
    """An argument of a module's ``__init__`` that no hyperparameter gives."""


def make_module(
    module_class: "type[LightningModule]",
    checkpoint: Mapping[str, Any],
    path: str | Path,
    given: Mapping[str, Any],
) -> "LightningModule":
    """A new ``module_class``.

    Args:
        module_class: its ``__init__`` gets the hyperparameters that it takes, each by its name, or
            all of them as the one argument that they were saved from.
        checkpoint: what ``path`` holds.
        path: of the checkpoint, for errors.
        given: hyperparameters of the user's, which go before those that were saved.

    Raises:
        MissingArgumentError: an argument is neither saved nor given.
        QatTricksError: a hyperparameter that is needed was not read from the file, or the
            checkpoint asks for another class.
    """
    saved: dict[str, Any] = {}
    for key in ("hparams", "module_arguments", KEYS[0]):  # the first two of Lightning 0.7
        saved.update(checkpoint.get(key) or {})
    saved.update(given)
    parameters = list(signature(module_class.__init__).parameters.values())[1:]
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    names = [p.name for p in parameters if p.kind not in variable]
    takes_all = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    whole = checkpoint.get("hparams_name")
    if saved.get("_instantiator") is not None:
        _check_unread(saved, path)
        return _as_the_cli(module_class, saved)
    if whole in names:
        _check_unread(saved, path)
        values = {whole: _converted(saved, checkpoint, module_class), **given}
    else:
        values = saved
    if not takes_all:
        values = {key: value for key, value in values.items() if key in names}
    _check_unread(values, path)
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in variable and p.name not in values
    ]
    if missing:
        raise MissingArgumentError(
            f"{module_class.__name__} takes {', '.join(missing)}, which {path} does not hold: give "
            f"{', '.join(f'{name}=...' for name in missing)} to load_from_checkpoint"
        )
    return module_class(**values)


def _check_unread(values: Mapping[str, Any], path: str | Path) -> None:
    """Raises QatTricksError if one of the values was not read from the file."""
    unread = {key: names for key, value in values.items() if (names := unread_in(value))}
    if unread:
        arguments = ", ".join(f"{key}=..." for key in unread)
        names = [name for names in unread.values() for name in names]
        raise not_read(path, names, f"give {arguments} to load_from_checkpoint, or ")


def _converted(
    saved: dict[str, Any], checkpoint: Mapping[str, Any], module_class: "type[LightningModule]"
) -> Any:
    """All hyperparameters as the kind of mapping that they were saved from."""
    kind = checkpoint.get("hparams_type")
    if not kind:
        return saved
    if isinstance(kind, str):  # of old checkpoints
        saving = import_module(f"{package_of(module_class).__name__}.core.saving")
        kind = saving.AttributeDict
    return kind(saved)


def _as_the_cli(module_class: "type[LightningModule]", saved: dict[str, Any]) -> "LightningModule":
    """A module of ``LightningCLI``, whose hyperparameters are a config of classes."""
    instantiator, class_path = saved.pop("_instantiator"), saved.get("_class_path")
    if instantiator not in {f"{package}.cli.instantiate_module" for package in PACKAGES}:
        raise QatTricksError(
            f"the checkpoint wants its module to be made by {instantiator}, which is none of "
            "Lightning's: make the module yourself, and load its state_dict"
        )
    if class_path is not None:
        # Found among what is imported already, so that a file cannot have code run.
        module_name, _, name = str(class_path).rpartition(".")
        kind = getattr(sys.modules.get(module_name), name, None)
        if not (isinstance(kind, type) and issubclass(kind, module_class)):
            raise QatTricksError(
                f"the checkpoint is of {class_path}, which is not imported or no "
                f"{module_class.__name__}: import it first, or give it to load_from_checkpoint"
            )
    cli = import_module(f"{package_of(module_class).__name__}.cli")
    return cli.instantiate_module(module_class, saved)


def saved_hyperparameters(pl_module: "LightningModule") -> dict[str, Any]:
    """The entries of a checkpoint for the hyperparameters of ``pl_module``."""
    values = pl_module.hparams
    entries: dict[str, Any] = {}
    if hasattr(pl_module, "_hparams_name"):
        entries["hparams_name"] = pl_module._hparams_name
    if isinstance(values, dict):
        return {**entries, KEYS[0]: dict(values)}
    return {**entries, KEYS[0]: values, "hparams_type": type(values)}  # a DictConfig


def read_hyperparameters(module_class: "type[LightningModule]", path: str | Path) -> dict[str, Any]:
    """Hyperparameters from a YAML or CSV file, as Lightning's loggers write them.

    Raises:
        QatTricksError: the file is missing, or has another extension.
    """
    saving = import_module(f"{package_of(module_class).__name__}.core.saving")
    readers = {
        ".yaml": saving.load_hparams_from_yaml,
        ".yml": saving.load_hparams_from_yaml,
        ".csv": saving.load_hparams_from_tags_csv,
    }
    reader = readers.get(Path(path).suffix.lower())
    if reader is None or not Path(path).is_file():
        raise QatTricksError(
            f"hparams_file={path} is not allowed: give a file that ends in {', '.join(readers)}"
        )
    return reader(path)
