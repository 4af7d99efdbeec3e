"""A search is refused before its first job where a value of its space cannot work."""

from functools import cache

import pytest

from qat_tricks.cli.check_search import check_is_job, check_search, is_search
from qat_tricks.errors import QatTricksError
from qat_tricks.settings.compose import Composer
from tests.helpers.configs import composed

SWEEP = "sweep=accuracy_latency"
SHARE = "recipe.stages.channels.tricks.prune_channels.share"
SPACE = "hydra.sweeper.params"
# a job shows one value of each setting, so that the setting with the most values decides the time
FEW = [
    "recipe.stages.channels.tricks.prune_channels.criterion=taylor",
    "recipe.stages.ptq.tricks.calibrate.estimator=mse",
]


@cache
def composer():
    return Composer("train")


def check(*overrides, few=FEW):
    overrides = [SWEEP, *few, *overrides]
    config, problems = composer().compose(overrides, sweep=True)
    assert not problems
    assert is_search(config)
    check_search(composer(), config, overrides)


def test_the_shipped_space_can_be_searched():
    check(few=[])
    assert not is_search(composed("recipe=int8_ptq"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["objectives=[]"], "objectives=[] tells it none"),
        (["objectives=[accuracy,speed]"], 'unknown objective "speed"'),
        (["objectives=[accuracy]"], "give hydra.sweeper.direction=[maximize]"),
        (
            ["objectives=[latency,accuracy]"],
            "give hydra.sweeper.direction=[minimize,maximize]",
        ),
        (["hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: give 1 or more"),
        (["hydra.sweeper.n_jobs=-1"], "hydra.sweeper.n_jobs=-1: give 1 or more"),
        (["stage.max_drop=1"], 'max_drop of stage "channels" is measured on the test images'),
        ([f"+{SPACE}.recipe='choice(int8_ptq)'"], 'recipe.stages has no setting "channels"'),
        ([f"{SHARE}=interval(0.5,1.5)"], "share=1.5 is not allowed"),
        ([f"{SHARE}=interval(1,0.5)"], "the lower end first"),
        ([f"{SHARE}=tag(log,interval(0,0.5))"], "begins above 0"),
        ([f"{SHARE}=0.5,7"], "share=7 is not allowed"),
        (["seed=range(0,5)", "baseline.lr=0,1"], "baseline: lr=0 is not allowed"),
        (["model=glob(*)"], "Optuna knows no glob"),
        ([f"+{SPACE}.modle='choice(a)'"], 'has no setting "modle"'),
        ([f"+{SPACE}.seed='interval(1'"], "cannot be read"),
        (["trainer.devices=2"], "without --multirun"),
    ],
)
def test_a_search_that_cannot_work_is_refused_in_one_line(overrides, told):
    with pytest.raises(QatTricksError) as caught:
        check(*overrides)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_budget_on_test_images_may_be_kept_where_accuracy_is_no_objective():
    check("stage.max_drop=1", "objectives=[latency]", "hydra.sweeper.direction=minimize")


def test_data_that_test_on_validation_images_cannot_be_searched_by_accuracy(tmp_path):
    folders = {name: tmp_path / name for name in ("train", "val", "test")}
    folders["train"].mkdir()
    data = ["data=imagefolder", f"data.root={tmp_path}"]
    with pytest.raises(QatTricksError, match="must not decide a search"):
        check(*data)
    folders["test"].mkdir()
    check(*data)
    with pytest.raises(QatTricksError, match="must not decide a search"):
        check("data=imagenet", f"data.root={tmp_path}")


def test_a_single_run_is_one_of_the_searchs_jobs_or_a_forgotten_flag():
    config = composed(SWEEP)
    with pytest.raises(QatTricksError, match="add -m"):
        check_is_job(config, [SWEEP, "stage.epochs=1"])
    check_is_job(config, [SWEEP, f"{SHARE}=0.5"])
    check_is_job(composed("recipe=fp32"), ["recipe=fp32"])
