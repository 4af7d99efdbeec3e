"""Normalization inside the file: the same logits from pixels, to the last bit."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from qat_tricks.data import Preprocessing
from qat_tricks.deploy.export import export_onnx
from qat_tricks.deploy.normalization import build_in_normalization
from qat_tricks.deploy.runtimes.registry import open_network
from qat_tricks.errors import QatTricksError
from tests.helpers.networks import Residual, images, quantized

SETTINGS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LARGE = {"mean": (120.0, 110.0, 100.0), "std": (60.0, 50.0, 40.0), "scale": "0..255"}


def pixels():
    """The images that the network was calibrated on, as a camera would give them."""
    return ((images() * 0.2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def batches(settings):
    normalize = Preprocessing(image_size=(32, 32), **settings).normalize()
    return [(part.numpy(), normalize(part).numpy()) for part in pixels().split(6)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    export_onnx(quantized(Residual), path, images()[:2], metadata={"kept": "yes"})
    return path


@pytest.fixture
def path(exported, tmp_path):
    """A copy of the file, for tests change it."""
    return Path(shutil.copy(exported, tmp_path))


@pytest.mark.parametrize("settings", [SETTINGS, LARGE], ids=["0..1", "0..255"])
def test_pixels_give_the_logits_of_normalized_images(path, settings):
    floats = [
        open_network(path, threads=1).prepare(normalized)() for _, normalized in batches(settings)
    ]
    found = build_in_normalization(path, batches(settings), **settings)
    assert (found["max_abs_error"], found["images"]) == (0, 16)
    network = open_network(path, threads=1)
    assert network.spec.dtype == np.uint8
    for (given, _), logits in zip(batches(settings), floats, strict=True):
        np.testing.assert_array_equal(network.prepare(given)(), logits)
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert properties["kept"] == "yes"
    assert properties["qat_tricks.normalization"] == '"built in"'


def test_normalized_images_are_refused_by_a_file_that_takes_pixels(path):
    build_in_normalization(path, batches(SETTINGS), **SETTINGS)
    network = open_network(path, threads=1)
    given, normalized = batches(SETTINGS)[0]
    np.testing.assert_array_equal(
        network.prepare(given.astype(np.float32))(), network.prepare(given)()
    )
    with pytest.raises(QatTricksError, match=r"float32 given, .*uint8.*exported without norm"):
        network.prepare(normalized)


def test_a_file_that_does_not_agree_is_left_as_it_was(path):
    before = path.read_bytes()
    with pytest.raises(QatTricksError, match=r"export\.normalize=false"):
        build_in_normalization(path, batches(SETTINGS), **{**SETTINGS, "mean": (5.0, -5.0, 5.0)})
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["m.onnx"]


def test_normalization_is_built_in_once(path):
    build_in_normalization(path, batches(SETTINGS), **SETTINGS)
    with pytest.raises(QatTricksError, match="already"):
        build_in_normalization(path, batches(SETTINGS), **SETTINGS)
