"""The shipped YAML files: each composes, passes the checks, and has the defaults of Python."""

from dataclasses import asdict

import pytest
import torch
from omegaconf import OmegaConf

from qat_tricks.cli.check_evaluate import check_evaluate
from qat_tricks.cli.check_train import check_train
from qat_tricks.jobs import loggers
from qat_tricks.jobs.config import (
    Baseline,
    DeviceMeasure,
    Export,
    Measure,
    Optimizer,
    Report,
    StageOverride,
)
from qat_tricks.models.build import register_models
from qat_tricks.settings.config_dir import config_dir, options
from tests.helpers.configs import composed

SHIPPED = sorted(config_dir().rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_each_yaml_begins_with_its_command_which_composes_and_passes_the_checks(
    path, tmp_path, monkeypatch
):
    monkeypatch.setattr(loggers, "find_spec", lambda package: package)  # as if all were installed
    # Hydra reads its own instruction on the first line only.
    first = path.read_text().removeprefix("# @package _global_\n").splitlines()[0]
    program, *words = first.removeprefix("# python ").replace("'", "").split()
    assert first.startswith("# python ")
    words = [word for word in words if word != "-m"]
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


def test_every_group_is_in_a_config_that_was_checked():
    groups = {path.parent.name for path in SHIPPED} - {"conf"}
    assert groups == {"data", "logger", "model", "recipe", "sweep", "trainer", "trick"}
    assert set(options("logger")) == {"wandb", "tensorboard", "mlflow", "csv", "none"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("baseline", Baseline),
        ("optimizer", Optimizer),
        ("measure", Measure),
        ("stage", StageOverride),
        ("export", Export),
        ("report", Report),
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
    assert OmegaConf.to_container(composed(name="evaluate").report) == asdict(Report())
