"""Tricks by name: the settings of their YAML files are those of their classes."""

import inspect

import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.recipes.registry import make_trick, trick_class, trick_config
from qat_tricks.settings.config_dir import options
from qat_tricks.tricks import Prune

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


def test_settings_that_are_given_come_before_those_of_the_yaml():
    made, default = make_trick("calibrate", {"estimator": "kl"}), make_trick("calibrate", {})
    assert (made.estimator, made.num_images) == ("kl", default.num_images)
    assert default.estimator != "kl"


def test_a_trick_of_ones_own_is_made_from_its_target_alone():
    target = f"{Prune.__module__}.{Prune.__qualname__}"
    assert make_trick("mine", {"_target_": target, "sparsity": 0.25}).sparsity == 0.25
    with pytest.raises(QatTricksError, match='unknown trick "mine"'):
        make_trick("mine", {"sparsity": 0.25})
    with pytest.raises(QatTricksError, match="is no trick: derive it from"):
        trick_class("mine", "torch.nn.Linear")
    with pytest.raises(QatTricksError, match="cannot be imported"):
        trick_class("mine", "qat_tricks.tricks.prune.Prun")
