"""Augmentation of images in memory, and images on disk: their bits, and those not read."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from qat_tricks.data import Preprocessing, build_data
from qat_tricks.data.images import UnreadableImageError, random_flip, random_shift, read_image
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


WIDE = np.array([[0, 128, 129, 256, 257, 32767, 32768, 65406, 65407, 65535]])
BYTES = [0, 0, 1, 1, 1, 127, 128, 254, 255, 255]  # to the nearest of value / 257


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "suffix", "mode"),
    [
        ("<u2", ".png", "I;16"),
        ("<u2", ".tif", "I;16"),
        (">u2", ".tif", "I;16B"),
        ("<u2", ".pgm", "I"),
    ],
)
def test_grey_values_of_16_bits_are_scaled_to_bytes(tmp_path, dtype, suffix, mode, channels):
    path = tmp_path / f"wide{suffix}"
    Image.fromarray(WIDE.astype(dtype)).save(path)
    with Image.open(path) as stored:
        # a version of Pillow may open a PNG as "I"
        assert stored.mode in (mode, "I")
    image = read_image(path, channels)
    assert image.mode == ("RGB" if channels == 3 else "L")
    for band in image.split():
        assert np.asarray(band).tolist() == [BYTES]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), "floats"),
        (np.array([[0, 256]], np.int32), "0 to 256"),
        (np.array([[-1, 7]], np.int32), "-1 to 7"),
    ],
)
def test_grey_values_without_a_known_range_are_refused(tmp_path, values, reason):
    path = tmp_path / "odd.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(UnreadableImageError, match=rf"odd\.tif .*{reason}.*: save it with 8 or 16"):
        read_image(path, 1)


def test_grey_values_of_12_bits_are_not_taken_for_16(tmp_path):
    tag = "<HHII"
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 0), (278, 1), (279, 3)]
    pixels = 10 + 12 * len(entries) + 4
    written = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for name, value in entries:
        written += struct.pack(tag, name, 4, 1, pixels if name == 273 else value)
    path = tmp_path / "twelve.tif"
    path.write_bytes(written + bytes(4) + bytes([0xFF, 0xF0, 0x00]))  # white and black
    with pytest.raises(UnreadableImageError, match=r"twelve\.tif .*12 bits"):
        read_image(path, 3)


def test_a_wide_image_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "cut.png"
    noise = np.random.default_rng(0).integers(0, 65536, (64, 64))
    Image.fromarray(noise.astype(np.uint16)).save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnreadableImageError, match=r"cut\.png .*: replace or delete it"):
        read_image(path, 1)


def test_narrow_modes_are_read_as_before(tmp_path):
    grey = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    for name, image in {
        "grey": grey,
        "palette": grey.convert("P"),
        "bits": grey.convert("1"),
    }.items():
        image.save(tmp_path / f"{name}.png")
        expected = np.asarray(image.convert("RGB")).tolist()
        assert np.asarray(read_image(tmp_path / f"{name}.png", 3)).tolist() == expected


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


def test_bytes_that_are_stored_in_32_bits_stay_as_they_are(tmp_path):
    values = np.array([[0, 7, 200, 255]])
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "wide.tif")
    assert np.asarray(read_image(tmp_path / "wide.tif", 1)).tolist() == values.tolist()
