import shlex

import pytest

from qat_tricks.cli.check_train import check_train
from qat_tricks.errors import QatTricksError
from qat_tricks.recipes.guideline_steps import (
    GuidelineSettings,
    Step,
    pruning_steps,
    quality_steps,
    sparing,
)
from qat_tricks.recipes.recipe import load_recipe
from tests.helpers.configs import composed

AIMS = [
    {},
    {"weight_bits": 4},
    {"weight_bits": 4, "activation_bits": 4},
    {"weight_bits": 3, "activation_bits": 3},
    {"weight_bits": 2, "activation_bits": 4},
    {"weight_bits": 8, "activation_bits": 4},
    {"sparsity": 0.6},
    {"sparsity": 0.5, "weight_bits": 2, "activation_bits": 4},
    {"latency": 0.6},
]


def steps_of(aims):
    settings = GuidelineSettings(**aims)
    steps = [*quality_steps(settings), *pruning_steps(settings)]
    return [
        sparing(step, ["layer1.0.conv1", "fc"]) if step.spares_sensitive else step for step in steps
    ]


@pytest.mark.parametrize("aims", AIMS, ids=str)
def test_each_step_is_a_recipe_that_runs_alone_with_the_same_tricks(aims):
    for step in steps_of(aims):
        loaded = load_recipe(step.recipe, step.overrides)
        config = composed(*shlex.split(step.command))
        check_train(config)
        by_command = load_recipe(
            config.recipe.name,
            [word for word in shlex.split(step.command) if not word.startswith("recipe=")],
        )
        assert [stage.name for stage in by_command.stages] == [s.name for s in loaded.stages]
        for one, other in zip(by_command.tricks, loaded.tricks, strict=True):
            assert one.name == other.name


@pytest.mark.parametrize("aims", AIMS, ids=str)
def test_steps_have_the_bits_that_were_asked_for_and_train_only_at_the_end(aims):
    settings = GuidelineSettings(**aims)
    steps = steps_of(aims)[: len(quality_steps(settings))]
    trains = []
    for step in steps:
        loaded = load_recipe(step.recipe, step.overrides)
        (quantize,) = [trick for trick in loaded.tricks if trick.name == "quantize"]
        assert quantize.settings.weight_bits == settings.weight_bits
        assert quantize.settings.activation_bits == settings.activation_bits
        trains.append(bool(loaded.training))
    assert trains == sorted(trains)
    assert trains[0] is False
    assert trains[-1] is True
    taught = [
        any(trick.name == "distill" for trick in load_recipe(s.recipe, s.overrides).tricks)
        for s in steps
    ]
    assert taught == [False] * (len(steps) - 1) + [True]


def test_below_8_bits_each_layer_gets_its_own_for_the_cost_of_those_asked_for():
    def mixed(**aims):
        steps = [s for s in quality_steps(GuidelineSettings(**aims)) if s.name == "mixed_bits"]
        loaded = [load_recipe(step.recipe, step.overrides) for step in steps]
        return [t for recipe in loaded for t in recipe.tricks if t.name == "mixed_precision"]

    assert mixed() == []
    (of_weights,) = mixed(weight_bits=4)
    assert (of_weights.budget, of_weights.activation_bits) == ("size", None)
    (of_both,) = mixed(weight_bits=3, activation_bits=4)
    assert of_both.budget == "bops"
    assert 4 in of_both.activation_bits
    assert of_weights.share is of_both.share is None


def test_pruning_goes_up_to_what_was_asked_for():
    names = [step.name for step in pruning_steps(GuidelineSettings(sparsity=0.6))]
    assert names == ["sparsity_0.2", "sparsity_0.4", "sparsity_0.6"]
    last = pruning_steps(GuidelineSettings(sparsity=0.6))[-1]
    (prune,) = [t for t in load_recipe(last.recipe, last.overrides).tricks if t.name == "prune"]
    assert prune.sparsity == 0.6
    names = [step.name for step in pruning_steps(GuidelineSettings(latency=0.4))]
    assert names == ["latency_0.8", "latency_0.6", "latency_0.4"]
    assert pruning_steps(GuidelineSettings()) == []


def test_spared_layers_are_in_float_at_8_bits_and_at_8_bits_below():
    int8 = sparing(Step(name="s", does="", recipe="int8_ptq"), ["a.b", "c"])
    (quantize,) = [
        trick
        for trick in load_recipe("int8_ptq", int8.overrides).tricks
        if trick.name == "quantize"
    ]
    assert list(quantize.settings.exclude) == ["a.b", "c"]
    low = sparing(Step(name="s", does="", recipe="w4a8_ptq"), ["a.b", "c"])
    (quantize,) = [
        trick for trick in load_recipe("w4a8_ptq", low.overrides).tricks if trick.name == "quantize"
    ]
    assert {name: dict(bits) for name, bits in quantize.settings.overrides.items()} == {
        name: {"weight_bits": 8, "activation_bits": 8} for name in ("a.b", "c")
    }


@pytest.mark.parametrize(
    ("aims", "told"),
    [
        ({"budget": -0.1}, "budget=-0.1 is not allowed: give 0 or more"),
        ({"weight_bits": 1}, "weight_bits=1 is not allowed: give 2 to 8"),
        ({"activation_bits": 9}, "activation_bits=9"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"latency": 0.0}, "latency=0.0"),
        ({"sparsity": 0.5, "latency": 0.5}, "exclude each other"),
        ({"latency": 0.5, "weight_bits": 4}, "fewer than 8 bits run no faster"),
    ],
    ids=str,
)
def test_aims_that_are_not_allowed_are_told_in_one_line(aims, told):
    with pytest.raises(QatTricksError, match=told) as caught:
        GuidelineSettings(**aims)
    assert "\n" not in str(caught.value)


def test_small_shares_tell_their_steps_apart():
    names = [step.name for step in pruning_steps(GuidelineSettings(sparsity=0.0001))]
    assert len(set(names)) == 3
    assert names[-1] == "sparsity_0.0001"
