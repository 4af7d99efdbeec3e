"""The inputs of a file: made at random, or given and checked."""

import numpy as np
import pytest

from qat_tricks.deploy.runtimes.network import InputSpec, random_batch
from qat_tricks.deploy.runtimes.session import open_session, run_batch
from qat_tricks.errors import QatTricksError
from tests.helpers.handmade import float_conv


def test_random_pixels_fill_their_range():
    spec = InputSpec(name="x", shape=(None, 3, 8, 8), dtype=np.dtype(np.uint8))
    (given,) = random_batch([spec], (3, 8, 8), 8)
    assert (given.dtype, given.min(), given.max()) == (np.uint8, 0, 255)


def test_images_of_another_shape_are_refused(tmp_path):
    session = open_session(float_conv(tmp_path / "m.onnx", np.ones((4, 3, 3, 3))))
    assert run_batch(session, np.ones((5, 3, 8, 8))).shape == (5, 4, 8, 8)
    with pytest.raises(QatTricksError, match=r"\(5, 1, 8, 8\).*\(any, 3, 8, 8\)"):
        run_batch(session, np.ones((5, 1, 8, 8)))
