"""Checkpoints as an evaluation takes them."""

import numpy as np
import onnx
import pytest
import torch

from qat_tricks.data import build_data
from qat_tricks.deploy.runtimes.session import open_session, run_batch
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.artifact import load_artifact
from qat_tricks.jobs.checkpoint import describe, export_network, load_classifier
from qat_tricks.jobs.classifier import Classifier
from qat_tricks.jobs.description import from_metadata
from qat_tricks.trainer.checkpoints import save_checkpoint
from tests.helpers.nets import images


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    content = {"state_dict": {}, "hyper_parameters": {}, "pytorch-lightning_version": "2.5.0"}
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(QatTricksError, match=r"model\.ckpt was not written by train\.py"):
        load_artifact(tmp_path / "model.ckpt")


def classifier(**settings):
    model = {"name": "custom", "factory": "tests.helpers.nets.SmallNet", "num_classes": 4}
    return Classifier({**model, "in_channels": 3}, **settings)


def test_a_checkpoint_says_for_which_images_its_network_is():
    data = {"name": "fake", "image_size": 8}
    own = {"image_size": [8, 8], "hash": "sha256:own"}
    said = describe(classifier(data=data, preprocessing=own))
    assert (said["data"], said["preprocessing"], said["recipe"]) == (data, own, None)
    assert said["model"]["factory"] == "tests.helpers.nets.SmallNet"
    older = describe(classifier(data=data))
    assert older["preprocessing"] == build_data(**data).preprocessing.described()
    with pytest.raises(QatTricksError, match="does not say which data"):
        describe(classifier())


def test_the_network_and_its_description_reach_the_file(tmp_path):
    torch.manual_seed(0)
    module, path = classifier(data={"name": "fake"}).eval(), tmp_path / "model.onnx"
    description = describe(module)
    save_checkpoint(module, tmp_path / "model.ckpt")
    loaded = load_classifier(tmp_path / "model.ckpt")
    export_network(loaded.network, path, description, [torch.zeros(2, 3, 8, 8)])
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert from_metadata(metadata, path) | {"export": None} == description
    with torch.no_grad():
        expected = module(images(2, channels=3)).numpy()
    given = images(2, channels=3).numpy()
    np.testing.assert_allclose(run_batch(open_session(path), given), expected, atol=1e-5)
