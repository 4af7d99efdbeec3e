"""Composes the Hydra configs in ``conf``; all errors are reported at once, in one line.

Hydra's public ``compose`` needs global state, which a running Hydra application has taken already.
Its config loader, used here, needs none.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.settings.config_dir import config_dir, no_such_part
from qat_tricks.settings.plain import one_line

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)
"""Hydra's errors for bad input."""


_PLUGINS = (("hydra/sweeper", "optuna"), ("hydra/launcher", "joblib"))  # of the extra "sweep"


class Composition(NamedTuple):
    """A composed config, without the overrides that could not be applied."""

    config: DictConfig  # with the hydra node
    problems: list[str]  # a message for each override that could not be applied


class Composer:
    """Composes one primary config, such as ``train``.

    Args:
        config_name: of the primary config.
        extra: a folder of the user's own YAML files. As in Hydra itself, ours win where the names
            are the same.

    Raises:
        QatTricksError: ``extra`` is not a folder.
    """

    def __init__(self, config_name: str, extra: Path | None = None) -> None:
        version.setbase("1.3")
        # Hydra's interpolations, such as ``${hydra:…}``, must be known to OmegaConf.
        setup_globals()
        path = create_config_search_path(str(config_dir()))
        if extra is not None:
            if not extra.is_dir():
                raise QatTricksError(
                    f"--config-dir {extra} is not a folder: give one that holds recipe/, trick/ "
                    "and so on"
                )
            path.prepend(
                "command-line",
                f"file://{extra.absolute()}",
                anchor=SearchPathQuery(provider="schema"),
            )
        self.config_name = config_name
        self.loader = ConfigLoaderImpl(path)

    def compose(self, overrides: Sequence[str], *, sweep: bool = False) -> Composition:
        """Composes the config; overrides that fail are left out and explained.

        Args:
            overrides: as on Hydra's command line.
            sweep: whether values such as ``a,b`` are allowed.

        Raises:
            QatTricksError: the files themselves cannot be composed.
        """
        parsed, problems = self._parse(overrides)
        if not problems:
            try:
                return Composition(self._load(overrides, sweep), [])
            except COMPOSE_ERRORS:
                pass  # the overrides are tried one by one below
        applied: list[str] = []
        # groups whose choice failed: a setting inside them is not to blame
        lost: set[str] = set()
        try:
            config = self._load([], sweep)
        except COMPOSE_ERRORS as error:
            raise QatTricksError(one_line(error)) from error
        # groups come first, because the settings inside depend on their choice
        for override in sorted(parsed, key=lambda override: "." in override.key_or_group):
            if override.key_or_group.partition(".")[0] in lost:
                continue
            line = str(override.input_line)
            try:
                config = self._load([*applied, line], sweep)
                applied.append(line)
            except COMPOSE_ERRORS as error:
                lost.add(override.key_or_group)
                problems.append(self._explain(override, config, error, sweep))
        return Composition(config, problems)

    def jobs(self, overrides: Sequence[str]) -> list[list[str]]:
        """Expands a sweep to the overrides of each job, as Hydra's own sweeper does.

        Raises:
            QatTricksError: the sweep has values that only other sweepers know.
        """
        try:
            parsed = OverridesParser.create(config_loader=self.loader).parse_overrides(
                list(overrides)
            )
            return [
                list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch
            ]
        except HydraException as error:
            raise QatTricksError(one_line(error)) from error

    def _load(self, overrides: Sequence[str], sweep: bool) -> DictConfig:
        mode = RunMode.MULTIRUN if sweep else RunMode.RUN
        return self.loader.load_configuration(
            self.config_name, list(overrides), run_mode=mode, from_shell=False
        )

    def _parse(self, overrides: Sequence[str]) -> tuple[list[Override], list[str]]:
        parser = OverridesParser.create(config_loader=self.loader)
        parsed, problems = [], []
        for override in overrides:
            try:
                parsed += parser.parse_overrides([override])
            except HydraException as error:
                # the parser's position and its list of tokens help nobody
                reason = re.sub(
                    r"^Error parsing override '.*?' (?=\w)| expecting .*| See https.*",
                    "",
                    one_line(error),
                )
                problems.append(
                    f'"{override}" cannot be read ({reason}): {_way_to_write(override)}'
                )
        return parsed, problems

    def _explain(
        self, override: Override, config: DictConfig, error: Exception, sweep: bool
    ) -> str:
        if isinstance(error, MissingConfigException):
            return self._missing_option(error)
        if override.is_sweep_override():
            return (
                f'"{override.input_line}" has several values: add --multirun, or write a list as '
                "[a,b]"
            )
        if not (override.is_add() or override.is_force_add()) and override.package is None:
            unknown = unknown_path(config, override.key_or_group)
            if unknown:
                key = override.key_or_group
                return unknown + (
                    f"; if only the swept configs have it: {key}=choice(VALUE)" if sweep else ""
                )
        if override.is_add() and OmegaConf.select(config, override.key_or_group) is not None:
            return f'"{override.input_line}" adds what is there already: leave out the +'
        choices = self._options(override.key_or_group)
        value = str(override.value())
        if value in choices and override.is_add():
            key = str(override.input_line).partition("=")[0]
            return (
                f'"{override.input_line}" is not the only choice for its place: give all in one '
                f"list, {key}=[OTHER,{value}]"
            )
        node = OmegaConf.select(config, override.key_or_group, throw_on_resolution_failure=False)
        if isinstance(node, DictConfig) and isinstance(override.value(), list):
            return _list_for_settings(override, list(map(str, node)))
        if choices and not override.is_delete():
            hint = did_you_mean(value, choices)
            return f'"{override.input_line}" chooses nothing: {hint}'
        return f'"{override.input_line}": {one_line(error)}'

    def _missing_option(self, error: MissingConfigException) -> str:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        # Hydra names the file whose defaults list asks for it
        where = re.match(r"In '([^']+)'", str(error))
        inside = f"in {where[1]}: " if where and where[1] != self.config_name else ""
        if group == "model/timm" and not self._options(group):
            return f'{inside}model "timm/{name}" needs timm: pip install "qat_tricks[timm]"'
        if (group, name) in _PLUGINS and name not in self._options(group):
            return f'{group}={name} needs a plugin of Hydra: pip install "qat_tricks[sweep]"'
        return f'{inside}unknown {group} "{name}": {did_you_mean(name, self._options(group))}'

    def _options(self, group: str) -> list[str]:
        return self.loader.get_group_options(group, ObjectType.CONFIG)


def _list_for_settings(override: Override, keys: Sequence[str]) -> str:
    """The message for a list in place of a part that holds settings by name."""
    key = override.key_or_group
    group = ", add one with +trick@" + key + "=NAME" if key.endswith(".tricks") else ""
    return (
        f'"{override.input_line}" gives a list, and {key} holds settings by name '
        f"({', '.join(keys)}): change one with {key}.NAME.SETTING=VALUE, leave one out with "
        f"~{key}.NAME{group}"
    )


def _way_to_write(override: str) -> str:
    """How to write an override that Hydra cannot read."""
    key, _, value = override.partition("=")
    if "=" in value and not set(value) & set("\"'[{("):
        # A path may have it, as folders of sweeps do.
        return f"""quote a value that has "=", such as '{key}="{value}"'"""
    return "write key=value, quote spaces and commas"


def unknown_path(config: DictConfig, key: str) -> str | None:
    """Finds the first part of a dotted key that is not in ``config``.

    Returns:
        A message with the nearest keys; None if ``config`` has the key.
    """
    node: Any = config
    path: list[str] = []  # the parts that are there
    for part in re.findall(r"[^.\[\]]+", key):
        where = ".".join(path) or "the config"
        if not isinstance(node, DictConfig):
            return f'{where} is a value and has no setting "{part}"'
        if part not in node:
            keys = [str(known) for known in node if known != "hydra"]
            # the same key deeper in the config, where its user left out the beginning
            elsewhere = [longer for longer in _paths(config) if longer.endswith(f".{key}")]
            if elsewhere:
                hint = f"did you mean {' or '.join(elsewhere)}?"
            elif not path:
                return no_such_part(part, keys)
            else:
                hint = did_you_mean(part, keys)
            if path == ["trainer"]:
                hint += f"; other arguments of pl.Trainer with a plus: +{key}="
            return f'{where} has no setting "{part}": {hint}'
        node = OmegaConf.select(node, part, throw_on_resolution_failure=False)
        path.append(part)
    return None


def _paths(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of a config, without Hydra's."""
    for key, value in node.items_ex(resolve=False):
        if prefix or key != "hydra":
            yield f"{prefix}{key!s}"
            if isinstance(value, DictConfig) and not value._is_none():
                yield from _paths(value, f"{prefix}{key!s}.")
