"""The settings of quantization: all checked when they are made, and never changed."""

import inspect
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest
from omegaconf import OmegaConf

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import QuantizeSettings, layers, place_quantizers, trace
from qat_tricks.graph.quantize_settings import settings_with
from qat_tricks.settings.compose import config_dir
from qat_tricks.tricks import quantize
from qat_tricks.tricks.quantize import Quantize
from tests.helpers.nets import small_net


def test_all_problems_are_told_at_once():
    with pytest.raises(QatTricksError) as error:
        QuantizeSettings(
            weight_bits=9,
            first_last_bits=True,
            include="head",
            overrides={"stem*": {"weigth_bits": 4, "activation_bits": 1}},
            activations="signed",
        )
    problems = str(error.value).split("; ")
    assert len(problems) == 6
    for told in (
        "weight_bits=9 is not supported: give a whole number from 2 to 8",
        "first_last_bits=True is not supported",
        'override "stem*" has no setting "weigth_bits": did you mean "weight_bits"?',
        'overrides."stem*".activation_bits=1 is not supported',
        'include="head" is not allowed: give a list of name patterns, ["head"]',
        'activations="signed" is not supported: did you mean "signed_affine"',
    ):
        assert sum(told in problem for problem in problems) == 1


def test_settings_stay_as_they_were_made():
    overrides, include = {"head": {"weight_bits": 4}}, ["head"]
    settings = QuantizeSettings(include=include, overrides=overrides)
    overrides["head"]["weight_bits"] = 8
    include.append("stem*")
    assert settings == QuantizeSettings(include=["head"], overrides={"head": {"weight_bits": 4}})
    with pytest.raises(FrozenInstanceError):
        settings.weight_bits = 4


@dataclass(frozen=True)
class Runtime:
    max_weight_bits: int = 6
    activations: tuple[str, ...] = ("signed_affine",)
    activation_bits: int = 4
    functions: str = "float"
    because: str = "its kernels say so"


def test_limits_make_new_settings():
    settings = QuantizeSettings(overrides={"head": {"weight_bits": 8, "activation_bits": 5}})
    limited = settings.limited_to(Runtime())
    assert limited == QuantizeSettings(
        weight_bits=6,
        first_last_bits=None,
        overrides={"head": {"weight_bits": 6, "activation_bits": 5}},
        activations="signed_affine",
        functions="float",
    )
    assert settings == QuantizeSettings(
        overrides={"head": {"weight_bits": 8, "activation_bits": 5}}
    )
    with pytest.raises(QatTricksError, match="activation_bits gives activations 3 bits"):
        QuantizeSettings(activation_bits=3).limited_to(Runtime())


@pytest.mark.parametrize("place", [place_quantizers, quantize])
def test_fields_are_given_as_settings_or_by_keyword(place):
    def bits(*args, **changes):
        traced = place(trace(small_net()), *args, **changes)
        return {layer.weight_quantizer.scheme.bits for layer in layers(traced).values()}

    settings = QuantizeSettings(weight_bits=4, first_last_bits=None)
    assert bits(settings) == bits(weight_bits=4, first_last_bits=None) == {4}
    assert bits(settings, weight_bits=3) == {3}
    with pytest.raises(
        QatTricksError, match='no setting "weigth_bits": did you mean "weight_bits"'
    ):
        bits(weigth_bits=4)
    with pytest.raises(QatTricksError, match="from 2 to 8"):
        settings_with(settings, {"weight_bits": 1})


def test_the_trick_and_its_yaml_have_these_fields_and_defaults():
    defaults = {
        field.name: getattr(QuantizeSettings(), field.name) for field in fields(QuantizeSettings)
    }
    parameters = inspect.signature(Quantize).parameters.values()
    assert [parameter.name for parameter in parameters] == list(defaults)
    assert Quantize().settings == QuantizeSettings()
    config = OmegaConf.to_container(OmegaConf.load(config_dir() / "trick" / "quantize.yaml"))
    config["quantize"].pop("_target_")
    assert QuantizeSettings(**config["quantize"]) == QuantizeSettings()
    assert set(config["quantize"]) == set(defaults)
