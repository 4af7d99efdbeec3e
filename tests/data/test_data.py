"""Data sets by name: their options, and the error where they cannot be had."""

import inspect

import pytest
from omegaconf import OmegaConf

from qat_tricks.data import build_data, data_builder, data_names
from qat_tricks.errors import QatTricksError
from tests.helpers import ROOT
from tests.helpers.image_data import ready

CONF = ROOT / "conf" / "data"


@pytest.mark.parametrize("name", data_names())
def test_config_and_builder_have_the_same_options_and_defaults(name):
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert config.pop("name") == name
    defaults = {
        key: p.default for key, p in inspect.signature(data_builder(name)).parameters.items()
    }
    assert config == {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()}
    assert (CONF / f"{name}.yaml").read_text().startswith(f"# python train.py data={name}")


def test_unknown_names_and_options_are_told_the_nearest():
    with pytest.raises(QatTricksError, match='"cifar10"'):
        build_data("cifar")
    with pytest.raises(QatTricksError, match=r'"batchsize".*"batch_size".*"sed".*"seed"'):
        build_data("digits", batchsize=3, sed=1)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"image_size": 0}, {"shift": -1}]
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(QatTricksError, match=next(iter(options))):
        ready("digits", **options)


@pytest.mark.parametrize("name", ["cifar10", "imagefolder", "imagenet"])
def test_a_missing_root_is_named(name, tmp_path):
    with pytest.raises(QatTricksError, match=r"data\.root=PATH"):
        build_data(name)
    with pytest.raises(QatTricksError, match="nowhere"):
        build_data(name, root=str(tmp_path / "nowhere"))
