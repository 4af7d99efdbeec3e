"""Tricks by name: the settings of their YAML files are those of their classes."""

import inspect

import pytest

from qat_tricks.recipes.registry import make_trick, options, trick_class, trick_config

TRICKS = options("trick")


@pytest.mark.parametrize("name", TRICKS)
def test_a_tricks_yaml_has_the_settings_of_its_class_and_their_defaults(name):
    settings = trick_config(name)
    parameters = inspect.signature(trick_class(name, settings.pop("_target_"))).parameters
    assert list(settings) == list(parameters)
    for key, value in settings.items():
        default = parameters[key].default
        default = list(default) if isinstance(default, tuple) else default
        assert value == default or (value == {} and default is None), key
    assert make_trick(name, {}).name == name


def test_a_config_lists_a_trick_by_its_target():
    from hydra.utils import instantiate

    for name in options("trick"):
        assert instantiate(trick_config(name)).name == name
