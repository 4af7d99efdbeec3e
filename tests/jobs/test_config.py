from dataclasses import asdict
from functools import cache

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from qat_tricks.cli.check_evaluate import check_evaluate, check_folder
from qat_tricks.cli.check_train import check_one_process, check_train
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.config import (
    Baseline,
    DeviceMeasure,
    Export,
    Measure,
    Optimizer,
    StageOverride,
    evaluation_folder,
    recipe_of,
)
from qat_tricks.models.build import register_models
from qat_tricks.recipes.registry import options
from qat_tricks.settings.compose import Composer, config_dir
from qat_tricks.tricks.quantize import Quantize

SHIPPED = sorted(config_dir().rglob("*.yaml"))
NEEDS = {"custom": ["model.factory=torchvision.models.resnet18"]}  # beside the choice itself
ROOTED = ("cifar10", "imagefolder", "imagenet")


def composed(*overrides, name="train"):
    config, problems = Composer(name).compose(overrides)
    assert not problems, problems
    return config


@cache
def plain(name="train"):
    return composed(name=name)


def refusal(*settings, name="train", check=check_train):
    """What the check says of the config as it is shipped, with these settings."""
    config = plain(name).copy()
    OmegaConf.set_struct(config, False)
    for setting in settings:
        key, _, value = setting.partition("=")
        OmegaConf.update(config, key, yaml.safe_load(value), merge=True, force_add=True)
    with pytest.raises(QatTricksError) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_yaml_begins_with_its_command_which_composes_and_passes_the_checks(path, tmp_path):
    first = path.read_text().splitlines()[0]
    program, *words = first.removeprefix("# python ").replace("'", "").split()
    assert first.startswith("# python ")
    assert program == ("evaluate.py" if path.stem == "evaluate" else "train.py")
    overrides = [
        word.replace("PATH", str(tmp_path)).replace(
            "package.module.callable", "torchvision.models.resnet18"
        )
        for word in words
    ]
    register_models()
    if path.stem == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    config = composed(*overrides, name=program.removesuffix(".py"))
    (check_evaluate if program == "evaluate.py" else check_train)(config)
    group, name = path.parent.name, path.stem
    if group == "trick":
        assert any(name in stage.tricks for stage in config.recipe.stages.values())
    elif group != "conf":
        assert f"{group}={name}" in overrides


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("baseline", Baseline),
        ("optimizer", Optimizer),
        ("measure", Measure),
        ("stage", StageOverride),
        ("export", Export),
    ],
)
def test_the_defaults_of_yaml_and_python_are_the_same(name, kind):
    assert OmegaConf.to_container(composed()[name]) == asdict(kind())


def test_the_defaults_of_an_evaluation_are_the_same_in_yaml_and_python():
    python = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in asdict(DeviceMeasure()).items()
    }
    assert python.pop("min_top1_agreement") == Measure().min_top1_agreement
    assert OmegaConf.to_container(composed(name="evaluate").measure) == python


def test_a_target_reaches_the_quantizers_of_every_stage():
    recipe = recipe_of(composed("recipe=int8_prune50_multistage", "target=onnxruntime_cpu_no_vnni"))
    settings = [trick.settings for trick in recipe.tricks if isinstance(trick, Quantize)]
    assert settings
    assert {(each.weight_bits, each.activation_bits) for each in settings} == {(7, 8)}
    recipe = recipe_of(composed("recipe=int8_prune50_multistage", "target=tensorrt"))
    assert {
        trick.settings.activations for trick in recipe.tricks if isinstance(trick, Quantize)
    } == {"signed_symmetric"}


def test_stage_settings_reach_the_stages_they_are_for():
    plain = recipe_of(composed("recipe=int8_prune50"))
    assert [stage.epochs for stage in plain.stages] == [0, 8]
    short = recipe_of(
        composed("recipe=int8_prune50", "stage.epochs=2", "stage.lr=0.1", "stage.max_drop=3")
    )
    assert [(stage.epochs, stage.lr, stage.max_drop) for stage in short.stages] == [
        (0, None, 3),
        (2, 0.1, 3),
    ]
    ptq = recipe_of(composed("recipe=int8_prune50", "stage.epochs=0"))
    assert [stage.epochs for stage in ptq.stages] == [0, 0]


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
        ("trainer.devices=many", "trainer: "),
        ("trainer.precision=17", "trainer.precision=17 is not allowed"),
        ("trainer.accelerator=abacus", "trainer: "),
        ("baseline.lr=0", "baseline: lr=0 is not allowed: give a number above 0"),
        ("baseline.lr=.nan", "baseline: lr=nan is not allowed"),
        ("baseline.finetune=1", "baseline.finetune=1 is not allowed: give true or false"),
        ("optimizer.momentum=1", "optimizer: momentum=1 is not allowed"),
        ("measure.runs=0", "measure: runs=0 is not allowed"),
        ("measure.min_top1_agreement=2", "min_top1_agreement=2"),
        ("stage.epochs=-1", "stage: epochs=-1"),
        ("stage.max_drop=x", "stage.max_drop='x'"),
        ("export.opset=17", "export: opset=17 is not allowed: give 18 or more"),
        ("target=tensorrt export.opset=25", "export.opset=25 is too new for target=tensorrt"),
        (
            "recipe.stages.ptq.tricks.quantize.activations=signed",
            'activations="signed" is not supported: did you mean "signed_',
        ),
        ("seed=-1", "seed=-1 is not allowed"),
        ("seed=true", "seed=True is not allowed"),
        ("logger.name=wndb", 'unknown logger "wndb": did you mean "wandb"?'),
        ("logger.tags=x", "logger.tags='x' is not allowed: give a list of text or null"),
        ("data.name=digit", 'unknown data "digit": did you mean "digits"?'),
        ("model.name=resnet2", 'unknown model "resnet2": did you mean "resnet20"'),
        ("model.name=custom", "model=custom, and it alone, takes one"),
        ("model.factory=x.y", "takes one"),
        ("data.seed=${nope}", "data: Interpolation key 'nope' not found"),
        ("optimizer=3", "optimizer=3 is not allowed"),
    ],
)
def test_a_wrong_setting_is_one_line(override, told):
    assert told in refusal(*override.split())


def test_a_part_that_is_missing_is_told():
    with pytest.raises(QatTricksError, match="the config lacks baseline"):
        check_train(composed("~baseline"))


def test_all_wrong_settings_are_told_at_once():
    told = refusal(
        "seed=x", "baseline.lr=-1", "foo=1", "data.shift=x", "recipe.stages.prune_qat.epochs=-2"
    )
    for part in ("seed='x'", "lr=-1", '"foo"', "data.shift='x'", "epochs=-2"):
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


def test_evaluate_needs_an_artifact_and_knows_where_to_write(tmp_path):
    assert "artifact is missing" in refusal(name="evaluate", check=check_evaluate)
    assert "float=3" in refusal("artifact=a.onnx", "float=3", name="evaluate", check=check_evaluate)
    assert "data.shift" in refusal(
        "artifact=a", "data.name=digits", "data.shift=x", name="evaluate", check=check_evaluate
    )
    config = composed("artifact=runs/a.onnx", "data=digits", name="evaluate")
    check_evaluate(config)
    assert str(evaluation_folder(config)) == "runs/evaluation"


def test_a_folder_that_cannot_be_written_is_refused_and_one_that_can_is_left_alone(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(QatTricksError, match="cannot be written"):
        check_folder(tmp_path / "file" / "run")
    check_folder(tmp_path / "new" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_group_is_in_a_config_that_was_checked():
    groups = {path.parent.name for path in SHIPPED} - {"conf"}
    assert groups == {"data", "logger", "model", "recipe", "trainer", "trick"}
    assert set(options("logger")) == {"wandb", "csv", "none"}
