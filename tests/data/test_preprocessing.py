"""Preprocessing as data: its hash, its transform, and settings that contradict one another."""

import pytest
import torch
from PIL import Image

from qat_tricks.data import Preprocessing, build_data
from qat_tricks.errors import QatTricksError


def test_a_changed_preprocessing_does_not_keep_its_hash():
    described = build_data("digits").preprocessing.described()
    assert Preprocessing.from_described(described) == build_data("digits").preprocessing
    with pytest.raises(QatTricksError, match="changed by hand"):
        Preprocessing.from_described({**described, "std": [0.5]})


def test_preprocessing_survives_json_with_its_hash():
    first = Preprocessing(
        image_size=[224, 224], resize=256, crop=224, mean=[0, 0, 0], std=(1, 1, 1)
    )
    again = Preprocessing.from_dict(first.as_dict())
    assert again == first
    assert again.hash == first.hash
    assert len(first.hash) == 16
    other = Preprocessing.from_dict(
        first.as_dict() | {"mean": [0.5, 0, 0], "interpolation": "bicubic"}
    )
    assert other.hash != first.hash
    assert first.differences(first) == []
    assert first.differences(other) == [
        "interpolation: bilinear → bicubic",
        "mean: [0.0, 0.0, 0.0] → [0.5, 0.0, 0.0]",
    ]


def test_preprocessing_scales_by_its_units():
    pixels = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    ones = {"image_size": (8, 8), "std": (1, 1, 1)}
    unit = Preprocessing(mean=(0.1, 0.2, 0.3), **ones).transform()(pixels)
    byte = Preprocessing(mean=(25.5, 51, 76.5), scale="0..255", **ones).transform()(pixels)
    assert torch.allclose(unit * 255, byte, atol=1e-4)
    assert torch.allclose(byte[:, 0, 0], torch.tensor([74.5, 49, 23.5]))


@pytest.mark.parametrize(
    ("resize", "crop", "shape"),
    [(20, 16, (16, 16)), ([10, 14], None, (10, 14)), (None, [5, 7], (5, 7))],
)
def test_preprocessing_gives_the_size_it_says(resize, crop, shape):
    settings = Preprocessing(image_size=shape, resize=resize, crop=crop)
    assert settings.transform()(Image.new("L", (60, 30))).shape == (3, *shape)
    assert settings.transform()(torch.zeros(2, 1, 30, 60, dtype=torch.uint8)).shape == (
        2,
        3,
        *shape,
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"channels": 2}, "channels=2"),
        ({"mean": (0.5,)}, "one a channel"),
        ({"std": (1, 0, 1)}, "std"),
        ({"scale": "0..256"}, '"0..255"'),
        ({"interpolation": "bilinaer"}, '"bilinear"'),
        ({"resize": 32}, "crop"),
        ({"crop": 16}, "image_size"),
        ({"resize": 8, "crop": 32}, "larger"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(settings, told):
    with pytest.raises(QatTricksError, match=told):
        Preprocessing(image_size=(32, 32), **settings)


def test_unknown_preprocessing_keys_are_told_the_nearest():
    with pytest.raises(QatTricksError, match='"resize"'):
        Preprocessing.from_dict({"image_size": [8, 8], "rezise": 8})
