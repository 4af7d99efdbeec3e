"""The description in the metadata of an ONNX file."""

from pathlib import Path

import pytest

from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.description import REQUIRED, from_metadata, to_metadata


def test_a_description_survives_the_metadata():
    description = {"recipe": None, "model": {"name": "x"}, "data": {"seed": 3}, "preprocessing": {}}
    metadata = to_metadata({**description, "target": "any"})
    assert all(isinstance(value, str) for value in metadata.values())
    assert from_metadata({**metadata, "producer": "another"}, Path("a.onnx")) == description


@pytest.mark.parametrize("key", REQUIRED)
def test_a_part_that_is_missing_is_named(key):
    metadata = to_metadata(dict.fromkeys(REQUIRED))
    del metadata[f"qat_tricks.{key}"]
    with pytest.raises(
        QatTricksError, match=rf"a\.onnx was not written .* its {key}; give data=NAME"
    ):
        from_metadata(metadata, Path("a.onnx"))


def test_data_that_are_given_stand_in_for_what_is_missing():
    metadata = to_metadata({"recipe": "int8_ptq", "model": {"name": "own"}})
    described = from_metadata(metadata, Path("a.onnx"), {"name": "fake", "image_size": 8})
    assert (described["recipe"], described["model"]) == ("int8_ptq", {"name": "own"})
    assert described["data"] == {"name": "fake", "image_size": 8}
    assert described["preprocessing"]["image_size"] == [8, 8]
