"""Checkpoints as an evaluation takes them."""

import pytest
import torch

from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.artifact import load_artifact


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    content = {"state_dict": {}, "hyper_parameters": {}, "pytorch-lightning_version": "2.5.0"}
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(QatTricksError, match=r"model\.ckpt was not written by train\.py"):
        load_artifact(tmp_path / "model.ckpt")
