"""Files that are no artifact of a run."""

import pytest

from qat_tricks.deploy.export import export_onnx
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.artifact import load_artifact
from tests.helpers.nets import images, small_net


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(QatTricksError, match=r"model\.pt is neither a \.onnx nor a \.ckpt file"):
        load_artifact(tmp_path / "model.pt")


def test_an_onnx_file_without_a_description_is_refused(tmp_path):
    export_onnx(small_net(), tmp_path / "model.onnx", images(2))
    with pytest.raises(QatTricksError, match="does not say its recipe, model, data, preprocessing"):
        load_artifact(tmp_path / "model.onnx")
