"""The recipe of a run: fitted to its target, with the settings of ``stage``."""

import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.fitted_recipe import fitted_recipe
from qat_tricks.tricks.mixed_precision import MixedPrecision
from qat_tricks.tricks.quantize import Quantize
from tests.helpers.configs import composed


def test_a_target_reaches_the_quantizers_of_every_stage():
    recipe = fitted_recipe(
        composed("recipe=int8_prune50_multistage", "target=onnxruntime_cpu_no_vnni")
    )
    settings = [trick.settings for trick in recipe.tricks if isinstance(trick, Quantize)]
    assert settings
    assert all((each.weight_bits, each.activation_bits) == (7, 8) for each in settings)
    recipe = fitted_recipe(composed("recipe=int8_prune50_multistage", "target=tensorrt"))
    assert {
        trick.settings.activations for trick in recipe.tricks if isinstance(trick, Quantize)
    } == {"signed_symmetric"}


def test_a_target_limits_the_bits_that_a_layer_may_get():
    given = ["recipe=mixed_ptq", "target=onnxruntime_cpu_no_vnni"]
    (trick,) = (t for t in fitted_recipe(composed(*given)).tricks if isinstance(t, MixedPrecision))
    assert trick.weight_bits == (2, 3, 4, 6, 7)
    bops = "recipe.stages.ptq.tricks.mixed_precision={budget: bops, activation_bits: [4, 8]}"
    given = ["recipe=mixed_ptq", "target=tensorrt", bops]
    (trick,) = (t for t in fitted_recipe(composed(*given)).tricks if isinstance(t, MixedPrecision))
    assert trick.activation_bits == (8,)
    given[-1] = bops.replace(", 8", "")
    with pytest.raises(QatTricksError, match="not for this target: TensorRT takes int8"):
        fitted_recipe(composed(*given))


def test_stage_settings_reach_the_stages_they_are_for():
    plain = fitted_recipe(composed("recipe=int8_prune50"))
    assert [stage.epochs for stage in plain.stages] == [0, 8]
    short = fitted_recipe(
        composed("recipe=int8_prune50", "stage.epochs=2", "stage.lr=0.1", "stage.max_drop=3")
    )
    assert [(stage.epochs, stage.lr, stage.max_drop) for stage in short.stages] == [
        (0, None, 3),
        (2, 0.1, 3),
    ]
    ptq = fitted_recipe(composed("recipe=int8_prune50", "stage.epochs=0"))
    assert [stage.epochs for stage in ptq.stages] == [0, 0]
