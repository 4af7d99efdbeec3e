"""The inputs of a file: made at random, or given and checked."""

import numpy as np
import pytest

from qat_tricks.deploy.runtimes.network import InputSpec, feed, random_batch
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


def fed(values, dtype, given):
    """What a network whose input is of ``dtype`` gets of values given as the dtype ``given``."""
    spec = InputSpec(name="image", shape=(None,), dtype=np.dtype(dtype))
    return feed([spec], [np.array(values, given)])["image"]


@pytest.mark.parametrize(
    ("values", "dtype", "given"),
    [
        ([0, 7, 255], "uint8", "float32"),
        ([0, 7, 255], "uint8", "int64"),
        ([0, 2**40], "int64", "float32"),
        ([0, 1], "bool", "int64"),
        ([0, 1], "int64", "bool"),
        ([-3, 7], "int32", "int64"),
        ([0, 255], "int16", "uint8"),
        ([0, 255], "float32", "uint8"),
        ([0.5, -1.5], "float32", "float64"),
    ],
)
def test_values_that_a_cast_keeps_are_fed(values, dtype, given):
    found = fed(values, dtype, given)
    assert found.dtype == dtype
    assert found.tolist() == values


def test_floats_may_be_rounded_to_smaller_floats():
    assert fed([0.1], "float32", "float64").tolist() == [float(np.float32(0.1))]


@pytest.mark.parametrize(
    ("values", "dtype", "given"),
    [
        ([-1.2, 0.3], "uint8", "float32"),
        ([0, 256], "uint8", "float64"),
        ([float("nan")], "uint8", "float32"),
        ([-1], "uint8", "int64"),
        ([200], "int8", "uint8"),
        ([2**32], "int32", "int64"),
        ([2], "bool", "int64"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_values_that_a_cast_would_change_are_refused(values, dtype, given):
    with pytest.raises(
        QatTricksError, match=f"^{given} given, .*{dtype}, .* as image: give"
    ) as told:
        fed(values, dtype, given)
    assert ("give the pixels as uint8" in str(told.value)) == (dtype == "uint8")
