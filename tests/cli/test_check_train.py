"""A run's config: everything wrong in it is told at once, in one line, before anything runs."""

import pytest

from qat_tricks.cli.check_train import check_one_process, check_train
from qat_tricks.errors import QatTricksError
from tests.helpers import configs
from tests.helpers.configs import composed

ROOTED = ("cifar10", "imagefolder", "imagenet")


def refusal(*settings, check=check_train):
    return configs.refusal(check, *settings)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("modle=x", 'the config has no setting "modle": did you mean "model"?'),
        ("model.weight=x", 'model has no setting "weight": did you mean "weights"?'),
        ("data.sift=1", 'data has no setting "sift": did you mean "shift"?'),
        ("trainer.precison=32", 'trainer has no setting "precison": did you mean "precision"?'),
        ("trainer.max_epochs=3", "trainer.max_epochs is decided by the recipe"),
        ("baseline.epoch=3", 'baseline has no setting "epoch"'),
        ("recipe.stages.ptq.tricks.quantize.bits=3", 'quantize has no setting "bits"'),
        ("data.batch_size=many", "data.batch_size='many' is not allowed: give a whole number"),
        ("data.batch_size=true", "data.batch_size=True is not allowed"),
        ("trainer.devices=many", "trainer.devices='many': "),
        ("trainer.compile=yes_please", "trainer.compile='yes_please' is not allowed: give true or"),
        ("trainer.precision=17", "trainer.precision=17 is not allowed"),
        ("trainer.accelerator=abacus", "trainer.accelerator='abacus': "),
        ("baseline.lr=0", "baseline: lr=0 is not allowed: give a number above 0"),
        ("baseline.lr=.nan", "baseline: lr=nan is not allowed"),
        ("baseline.finetune=1", "baseline.finetune=1 is not allowed: give true or false"),
        ("optimizer.momentum=1", "optimizer: momentum=1 is not allowed"),
        ("measure.runs=0", "measure: runs=0 is not allowed"),
        ("measure.threads=100000000000", "threads=100000000000 is not allowed: give 1 to 1024"),
        ("measure.batch_size=1000000000", "batch_size=1000000000 is not allowed: give 1 to 4096"),
        ("baseline.epochs=10000000", "epochs=10000000 is not allowed: give 0 to 1000000"),
        ("data.seed=18446744073709551616", "data.seed=18446744073709551616 is not allowed"),
        ("model.weights=/nope.pt", "model.weights=/nope.pt is not a file: give the path of"),
        ("budget=0.5", "budget belongs to recipe=guideline"),
        ("recipe.stages=null", "recipe int8_prune50 has no stage, so it would change nothing"),
        ("recipe.stages.ptq=null", "stage ptq has no trick and no epochs, so it would do nothing"),
        ("measure.min_top1_agreement=2", "min_top1_agreement=2"),
        ("stage.epochs=-1", "stage: epochs=-1"),
        ("stage.max_drop=x", "stage.max_drop='x'"),
        ("export.opset=17", "export: opset=17 is not allowed: give 18 to 25"),
        ("target=tensorrt export.opset=25", "export.opset=25 is too new for target=tensorrt"),
        (
            "recipe.stages.ptq.tricks.quantize.activations=signed",
            'activations="signed" is not supported: did you mean "signed_',
        ),
        ("objectives=accuracy", "objectives='accuracy' is not allowed: give a list of"),
        ("objectives=[speed]", 'unknown objective "speed"'),
        ("seed=-1", "seed=-1 is not allowed"),
        ("report.language=fr", "report: language=fr is not allowed: give en or ja"),
        ("report.language=3", "report.language=3 is not allowed: give text"),
        ("seed=true", "seed=True is not allowed"),
        ("logger.name=wndb", 'unknown logger "wndb": did you mean "wandb"?'),
        ("logger.tags=x", "logger.tags='x' is not allowed: give a list of text or null"),
        ("data.name=digit", 'unknown data "digit": did you mean "digits"?'),
        ("model.name=resnet2", 'unknown model "resnet2": did you mean "resnet20"'),
        ("model.name=custom", "model=custom, and no other, takes one"),
        ("model.factory=x.y", "takes one"),
        ("data.seed=${nope}", "data: Interpolation key 'nope' not found"),
        ("optimizer=3", "optimizer=3 is not allowed"),
    ],
)
def test_a_wrong_setting_is_one_line(override, told):
    assert told in refusal(*override.split())


def test_each_wrong_argument_of_the_trainer_is_named():
    told = refusal(
        "trainer.accelerator=abacus",
        "trainer.devices=[0]",
        "trainer.strategy=foo",
        "trainer.limit_val_batches=-1",
        "trainer.precision=17",
    )
    for key in ("accelerator='abacus'", "strategy='foo'", "limit_val_batches=-1", "precision=17"):
        assert f"trainer.{key}" in told
    # They are those of the accelerator.
    assert "trainer.devices" not in told


def test_weights_known_by_name_need_no_file():
    check_train(composed("model.name=mobilenet_v2", "model.weights=IMAGENET1K_V1"))
    told = refusal("model.name=mobilenet_v2", "model.weights=IMAGENET1K_V3")
    assert 'did you mean "IMAGENET1K_V' in told


def test_a_stage_beside_another_may_be_left_out():
    check_train(composed("~recipe.stages.prune_qat"))
    check_train(composed("recipe=fp32"))


def test_a_part_that_is_missing_is_told():
    with pytest.raises(QatTricksError, match="the config lacks baseline"):
        check_train(composed("~baseline"))


def test_all_wrong_settings_are_told_at_once():
    told = refusal(
        "seed=x",
        "baseline.lr=-1",
        "foo=1",
        "data.shift=x",
        "recipe.stages.prune_qat.epochs=-2",
        "data.batch_size=0",
        "data.seed=-1",
        "model.weights=/nope.pt",
        "baseline.epochs=x",
    )
    for part in (
        "seed='x'",
        "lr=-1",
        '"foo"',
        "data.shift='x'",
        "epochs=-2",
        "data.batch_size=0",
        "data.seed=-1",
        "model.weights=/nope.pt",
        "baseline.epochs='x'",
    ):
        assert part in told


@pytest.mark.parametrize("root", [None, "/no/such/folder"])
@pytest.mark.parametrize("data", ROOTED)
def test_data_without_its_folder_is_refused_before_anything_runs(data, root):
    with pytest.raises(QatTricksError, match=r"data\.root"):
        check_train(composed(f"data={data}", f"data.root={root or 'null'}"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.strategy=ddp"],
        ["trainer.devices=2"],
        ["trainer.num_nodes=2"],
        ["trainer.devices=[0,1]"],
    ],
)
def test_a_sweep_over_several_processes_is_refused_with_what_to_do(overrides):
    assert "without --multirun" in refusal(*overrides, check=check_one_process)
    check_train(composed("trainer=ddp_cpu"))  # one run is fine
    check_one_process(composed())
