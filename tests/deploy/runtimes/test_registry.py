"""Runtimes by name: known and installed, or refused."""

import re

import numpy as np
import pytest

from qat_tricks.deploy.runtimes import registry as runtimes
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import qdq_layer


def test_a_runtime_is_known_and_installed_or_refused(monkeypatch, tmp_path):
    path = qdq_layer(tmp_path / "m.onnx", np.ones((4, 3, 3, 3), np.int8))
    assert runtimes.installed_runtimes()[0] == "onnxruntime"
    assert re.fullmatch(r"\d+(\.\d+)+", runtimes.runtime_version("onnxruntime"))
    with pytest.raises(
        QatTricksError, match='unknown runtime "onnxrt": did you mean "onnxruntime"'
    ):
        runtimes.open_network(path, threads=1, runtime="onnxrt")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "openvino" else name)
    assert runtimes.installed_runtimes() == ["onnxruntime"]
    with pytest.raises(QatTricksError, match="not installed"):
        runtimes.open_network(path, threads=1, runtime="openvino")
