"""Targets: weights that a runtime's kernels cannot get wrong, and refusals that say why."""

from dataclasses import asdict, replace

import pytest

from qat_tricks.deploy.layouts import LAYOUTS
from qat_tricks.deploy.runtimes import registry as runtimes
from qat_tricks.deploy.targets import (
    TARGETS,
    check_opset,
    target_named,
)
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import QuantizeSettings
from qat_tricks.numerics.scheme import ACTIVATIONS
from qat_tricks.tricks.quantize import Quantize

NO_VNNI = TARGETS["onnxruntime_cpu_no_vnni"]


def fitted(target=NO_VNNI, **settings):
    after = QuantizeSettings(**settings).limited_to(target)
    Quantize(**asdict(after))  # still settings that it takes
    return after.weight_bits, after.activation_bits, after.first_last_bits


def test_weights_of_seven_bits_leave_activations_alone_where_they_can():
    assert fitted() == (7, 8, None)
    assert fitted(weight_bits=4) == (4, 8, 7)  # null would make the ends 4 bits wide as well
    assert fitted(weight_bits=4, activation_bits=4) == (4, 4, 7)
    assert fitted(weight_bits=4, first_last_bits=None) == (4, 8, None)
    assert fitted(weight_bits=6, first_last_bits=6) == (6, 8, 6)
    overrides = {"a": {"weight_bits": 8, "activation_bits": 8}}
    after = QuantizeSettings(overrides=overrides).limited_to(NO_VNNI)
    assert after.overrides == {"a": {"weight_bits": 7, "activation_bits": 8}}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_sets_the_activations_unless_they_are_given(name):
    target = TARGETS[name]
    assert QuantizeSettings().limited_to(target).activations == target.activations[0]
    for kind in ACTIVATIONS:
        settings = QuantizeSettings(activations=kind)
        if kind in target.activations:
            assert settings.limited_to(target).activations == kind
        else:
            with pytest.raises(
                QatTricksError, match=f"activations={kind} is not for this target: {target.because}"
            ):
                settings.limited_to(target)
    assert target.because or set(target.activations) == set(ACTIVATIONS)
    assert target.layout in LAYOUTS


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"activation_bits": 4}, "quantize.activation_bits gives activations 4 bits"),
        ({"first_last_bits": 6}, "quantize.first_last_bits gives activations 6 bits"),
        (
            {"overrides": {"a": {"activation_bits": 5}}},
            'quantize.overrides."a" gives activations 5 bits',
        ),
    ],
)
def test_tensorrt_has_no_activations_below_eight_bits(settings, told):
    with pytest.raises(QatTricksError, match=f"{told}, and TensorRT takes int8 activations"):
        QuantizeSettings(**settings).limited_to(TARGETS["tensorrt"])
    low_weights = QuantizeSettings(weight_bits=4, overrides={"a": {"weight_bits": 3}})
    assert low_weights.limited_to(TARGETS["tensorrt"]) == replace(
        low_weights, activations="signed_symmetric", functions="float"
    )


def test_a_target_that_cannot_read_an_opset_says_so():
    check_opset("tensorrt", 24)
    check_opset("onnxruntime_cpu", 25)
    with pytest.raises(
        QatTricksError, match=r"export\.opset=25 is too new for target=tensorrt: give 24 or less"
    ):
        check_opset("tensorrt", 25)


@pytest.mark.parametrize(
    "name", [name for name, target in TARGETS.items() if target.max_weight_bits == 8]
)
def test_other_targets_change_no_bits(name):
    assert fitted(TARGETS[name]) == (8, 8, 8)


def test_seven_bits_are_what_sixteen_bit_sums_of_two_products_hold():
    largest = 2 ** (NO_VNNI.max_weight_bits - 1) - 1
    assert 2 * 255 * largest < 2**15 <= 2 * 255 * (2 * largest + 1)


def test_what_cannot_be_had_is_refused_with_the_reason(monkeypatch):
    assert target_named("onnxruntime_cpu").runtime == "onnxruntime"
    with pytest.raises(QatTricksError, match='did you mean "openvino_cpu"'):
        target_named("openvino")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(
        QatTricksError, match=r'"openvino" is not installed: pip install "qat_tricks\[openvino\]"'
    ):
        target_named("openvino_cpu")
