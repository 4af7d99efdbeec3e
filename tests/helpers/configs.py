"""Configs as they are shipped, with overrides, and what a check says of them."""

from collections.abc import Callable
from functools import cache

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from qat_tricks.errors import QatTricksError
from qat_tricks.settings.compose import Composer


def composed(*overrides: str, name: str = "train") -> DictConfig:
    """The primary config ``name`` with Hydra's overrides, all of which must apply."""
    config, problems = Composer(name).compose(overrides)
    assert not problems, problems
    return config


def job_config(*overrides: str, name: str = "train") -> DictConfig:
    """The config as a job gets it, without Hydra's node."""
    config = composed(*overrides, name=name)
    OmegaConf.set_struct(config, False)
    del config.hydra
    return config


def quick_job(data: str = "fake") -> list[str]:
    """The overrides of a whole run that takes seconds."""
    return [
        f"data={data}",
        "model=custom",
        "model.factory=tests.helpers.nets.SmallNet",
        "baseline.epochs=1",
        "measure.runs=5",
        "measure.threads=1",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
    ]


@cache
def _shipped(name: str) -> DictConfig:
    return composed(name=name)


def refusal(check: Callable[[DictConfig], None], *settings: str, name: str = "train") -> str:
    """The error of ``check`` for the shipped config with these settings, even unknown ones."""
    config = _shipped(name).copy()
    OmegaConf.set_struct(config, False)
    for setting in settings:
        key, _, value = setting.partition("=")
        OmegaConf.update(config, key, yaml.safe_load(value), merge=True, force_add=True)
    with pytest.raises(QatTricksError) as caught:
        check(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)
