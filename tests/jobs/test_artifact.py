"""Files that are no artifact of a run."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from qat_tricks.deploy.export import export_onnx
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.artifact import check_classes, load_artifact
from tests.helpers.nets import images, small_net


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(QatTricksError, match=r"model\.pt is neither a \.onnx nor a \.ckpt file"):
        load_artifact(tmp_path / "model.pt")


def test_an_onnx_file_without_a_description_is_refused(tmp_path):
    export_onnx(small_net(), tmp_path / "model.onnx", images(2))
    with pytest.raises(QatTricksError, match="does not say its recipe, model, data, preprocessing"):
        load_artifact(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("others", "which"),
    [
        (["cat", "dog", "owl"], ""),
        (["cat"], ""),
        (["dog", "cat"], ', the first that differs "cat" and "dog"'),
    ],
)
def test_other_classes_are_refused(others, which):
    artifact = SimpleNamespace(path=Path("model.onnx"), class_names=["cat", "dog"])
    with pytest.raises(QatTricksError) as error:
        check_classes(artifact, SimpleNamespace(class_names=others))
    assert str(error.value).startswith(
        f"the {len(others)} classes of the data are not the 2 of model.onnx{which}: give data with"
    )
