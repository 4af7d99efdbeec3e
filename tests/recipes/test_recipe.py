import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from qat_tricks.errors import QatTricksError
from qat_tricks.recipes.recipe import GUIDELINE, build_recipe, load_recipe
from qat_tricks.settings.config_dir import config_dir, options

TRICKS = options("trick")
RECIPES = [name for name in options("recipe") if name != GUIDELINE]


def refusal(name, *overrides):
    with pytest.raises(QatTricksError) as caught:
        load_recipe(name, overrides)
    told = str(caught.value)
    assert "\n" not in told
    return told


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_composes_begins_with_its_command_and_has_a_stage_a_step(name):
    first = (config_dir() / "recipe" / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# python train.py recipe={name}"
    loaded = load_recipe(name)
    assert loaded.name == name
    assert all(stage.tricks for stage in loaded.stages)


def test_overrides_reach_a_trick_and_add_one():
    loaded = load_recipe(
        "int8_qat",
        [
            "stages.ptq.tricks.calibrate.estimator=kl",
            "network=net",
            "+trick@recipe.stages.qat.tricks=prune",
        ],
    )
    ptq, qat = loaded.stages
    assert next(trick for trick in ptq.tricks if trick.name == "calibrate").estimator == "kl"
    assert "prune" in [trick.name for trick in qat.tricks]
    assert loaded.network == "net"
    without = load_recipe("int8_ptq", ["~stages.ptq.tricks.equalize"])
    assert "equalize" not in [trick.name for trick in without.tricks]


def test_a_recipe_loads_inside_a_running_hydra_application():
    with initialize_config_dir(str(config_dir()), version_base="1.3", job_name="mine"):
        assert load_recipe("int8_ptq").name == "int8_ptq"
        # it is still there
        assert compose("train", overrides=["recipe=int8_qat"]).recipe.name == "int8_qat"


def test_unknown_names_are_told_with_the_nearest():
    assert '"int8_prune50"' in refusal("int8_prun50")
    assert 'unknown trick "prun": did you mean "prune"?' in refusal(
        "int8_qat", "+trick@recipe.stages.qat.tricks=prun"
    )


def test_all_that_is_wrong_is_told_at_once():
    told = refusal(
        "int8_prune50",
        "stages.ptq.tricks.calibrat.estimator=kl",
        "stages.ptq.tricks.quantize.weight_bits=9",
        "stages.prune_qat.tricks.prune.sparsity=1.0",
        "stages.prune_qat.epochs=many",
        "~stages.ptq.tricks.equalise",
    )
    for part in (
        'did you mean "calibrate"',
        "bits=9",
        "sparsity=1.0",
        "epochs='many'",
        'did you mean "equalize"',
    ):
        assert part in told
    assert "order" not in told  # nothing follows from tricks that could not be made


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_2_to_8_are_refused(bits):
    assert "from 2 to 8" in refusal(
        "int8_ptq", f"stages.ptq.tricks.quantize.activation_bits={bits}"
    )


@pytest.mark.parametrize("sparsity", ["1.0", "-0.1", "1.5"])
def test_sparsity_outside_0_to_1_is_refused(sparsity):
    assert f"sparsity={sparsity}" in refusal(
        "int8_prune50", f"stages.prune_qat.tricks.prune.sparsity={sparsity}"
    )


def test_tricks_of_a_stage_come_in_an_order_that_works():
    tricks = {"calibrate": None, "fold_batchnorm": None, "quantize": None}
    recipe = build_recipe({"name": "mine", "stages": {"ptq": {"tricks": tricks}}})
    assert [trick.name for trick in recipe.tricks] == ["fold_batchnorm", "quantize", "calibrate"]
    # What an override adds stands behind all others.
    added = load_recipe("w4a8_ptq", ["+trick@stages.ptq.tricks=[learned_rounding,prune_channels]"])
    own = load_recipe("w4a8_ptq").tricks
    *before, last = (trick.name for trick in own)
    names = [trick.name for trick in added.tricks]
    assert names == ["prune_channels", *before, "learned_rounding", last]
    assert "calibrate needs quantize before it" in refusal(
        "int8_ptq", "~stages.ptq.tricks.quantize"
    )


@pytest.mark.parametrize(
    ("mine", "told"),
    [
        ({"stage": {}}, 'recipe mine has no setting "stage": did you mean "stages"'),
        (
            {"stages": {"ptq": {"epoch": 1}}},
            'stage ptq has no setting "epoch": did you mean "epochs"',
        ),
        ({"stages": {"ptq": {"trick": {}}}}, 'did you mean "tricks"'),
        ({"stages": {"ptq": 3}}, "stage ptq=3 is not allowed"),
        (
            {"stages": {"ptq": {"tricks": {"calibrate": {"images": 3}}}}},
            'calibrate has no setting "images"',
        ),
        (
            {"stages": {"ptq": {"tricks": {"calibrate": {"num_images": "x"}}}}},
            "give a whole number",
        ),
        (
            {"stages": {"ptq": {"tricks": {"mine": {"_target_": "os.system"}}}}},
            "os.system is no trick",
        ),
        ({"stages": {"ptq": {"tricks": {"mine": {"_target_": "no.such"}}}}}, "cannot be imported"),
        (
            {"stages": {"ptq": {"epochs": 1, "lr": ".inf"}}},
            "lr='.inf' is not allowed: give a number or auto or null",
        ),
        ({"network": 3}, "recipe.network=3 is not allowed"),
        ({"name": "${nope}"}, "Interpolation key 'nope' not found"),
    ],
)
def test_what_merging_lets_through_in_a_recipe_file_is_refused(mine, told):
    with pytest.raises(QatTricksError) as caught:
        build_recipe(OmegaConf.create({"name": "mine", "stages": {}, **mine}))
    assert told in str(caught.value)
