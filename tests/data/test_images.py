"""Augmentation of images in memory, and images that cannot be read."""

import pytest
import torch
from PIL import Image

from qat_tricks.data import Preprocessing, build_data
from qat_tricks.data.images import random_flip, random_shift
from qat_tricks.errors import QatTricksError
from tests.helpers.image_data import batches, make_folders, ready


def test_random_shift_moves_each_image_whole_and_within_its_range():
    images = torch.zeros(500, 2, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 7
    places = random_shift(images, 2).nonzero()
    assert len(places) == 1000, "an image lost its pixel, or a channel"
    offsets = places.reshape(500, 2, 4)[:, :, 2:] - 4
    assert torch.equal(offsets[:, 0], offsets[:, 1]), "channels moved apart"
    assert {tuple(offset) for offset in offsets[:, 0].tolist()} == {
        (y, x) for y in range(-2, 3) for x in range(-2, 3)
    }


def test_random_flip_mirrors_about_half():
    images = torch.arange(4).repeat(1000, 1, 1, 1)
    mirrored = random_flip(images)[:, 0, 0, 0] == 3
    assert torch.equal(random_flip(images).sort(-1).values, images)
    assert 400 < mirrored.sum() < 600


SMALL = {"resize": 16, "crop": 12, "batch_size": 4}


def test_grey_and_transparent_images_become_rgb_and_rgb_grey(tmp_path):
    make_folders(tmp_path, {"ant": 10})
    Image.new("L", (20, 20), 20).save(tmp_path / "ant" / "grey.png")
    Image.new("RGBA", (20, 20), (20, 20, 20, 128)).save(tmp_path / "ant" / "glass.png")
    assert (
        batches(ready("imagefolder", root=str(tmp_path), **SMALL).train_dataloader())[0].shape[1]
        == 3
    )
    grey = ready("imagefolder", root=str(tmp_path), channels=1, mean=[0.5], std=[0.5], **SMALL)
    assert batches(grey.train_dataloader())[0].shape[1] == 1
    assert grey.in_channels == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_one_line_that_names_it(tmp_path, workers):
    make_folders(tmp_path / "train", {"ant": 2})
    make_folders(tmp_path / "val", {"ant": 1})
    (tmp_path / "val" / "ant" / "broken.jpg").write_bytes(b"no image")
    data = ready("imagefolder", root=str(tmp_path), num_workers=workers, **SMALL)
    with pytest.raises(QatTricksError) as caught:
        batches(data.val_dataloader())
    assert "broken.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_images_that_keep_their_different_sizes_are_named(tmp_path):
    make_folders(tmp_path / "train", {"a": 3, "b": 3})
    (tmp_path / "val").symlink_to(tmp_path / "train")
    Image.new("RGB", (20, 20)).save(tmp_path / "train" / "b" / "002.png")
    data = build_data("imagefolder", root=str(tmp_path)).with_preprocessing(
        Preprocessing(image_size=(30, 40))
    )
    data.setup()
    with pytest.raises(
        QatTricksError, match=r"002\.png has the shape \(3, 20, 20\) and the others \(3, 30, 40\)"
    ):
        batches(data.test_dataloader())
