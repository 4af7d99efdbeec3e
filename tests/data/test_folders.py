"""Class folders: their splits, ImageNet's class indices, and the error where they do not fit."""

import pytest
import torch
from PIL import Image

from qat_tricks.errors import QatTricksError
from tests.helpers.image_data import batches, make_folders, ready

SMALL = {"resize": 16, "crop": 12, "batch_size": 4}


def test_a_single_folder_of_classes_is_split(tmp_path):
    make_folders(tmp_path, {"ant": 20, "bee": 40})
    data = ready("imagefolder", root=str(tmp_path), **SMALL)
    parts = [set(split.paths) for split in (data.splits.train, data.splits.val, data.splits.test)]
    assert [len(part) for part in parts] == [42, 9, 9]
    assert len(set.union(*parts)) == 60
    for loader in (data.train_dataloader(), data.test_dataloader(), data.calibration_loader(6)):
        images, labels = next(iter(loader))
        assert images.shape == (4, 3, 12, 12)
        grey = (torch.tensor([20, 60])[labels] / 255 - 0.485) / 0.229
        assert torch.allclose(images[:, 0].mean((1, 2)), grey, atol=1e-4), (
            "labels do not belong to the images"
        )


@pytest.mark.parametrize("val", ["val", "valid", "validation", None])
def test_train_and_val_folders_are_used_as_they_are(tmp_path, val):
    make_folders(tmp_path / "train", {"ant": 10, "bee": 10})
    if val:
        make_folders(tmp_path / val, {"bee": 3})
    data = ready("imagefolder", root=str(tmp_path), val_fraction=0.2, **SMALL)
    assert data.splits.val.labels.tolist() == ([1, 1, 1] if val else [0, 0, 1, 1])
    assert data.splits.test.paths == data.splits.val.paths
    assert not set(data.splits.train.paths) & set(data.splits.val.paths)


def test_folders_without_images_or_with_unknown_classes_are_named(tmp_path):
    with pytest.raises(QatTricksError, match="no class folders"):
        ready("imagefolder", root=str(tmp_path))
    make_folders(tmp_path / "train", {"ant": 2, "bee": 0})
    with pytest.raises(QatTricksError, match="bee has no images"):
        ready("imagefolder", root=str(tmp_path))
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "bee" / "one.png")
    make_folders(tmp_path / "val", {"beee": 1})
    with pytest.raises(
        QatTricksError, match='"beee" is not among the train classes: did you mean "bee"'
    ):
        ready("imagefolder", root=str(tmp_path))


@pytest.mark.parametrize(
    "names", [("training", "testing"), ("Training", "Val", "Test"), ("valid", "eval", "test")]
)
def test_splits_without_a_train_folder_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        make_folders(tmp_path / name, {"ant": 4, "bee": 4})
    with pytest.raises(QatTricksError) as caught:
        ready("imagefolder", root=str(tmp_path))
    for said in (", ".join(sorted(names)), 'call the train folder "train"', '"validation"'):
        assert said in str(caught.value)


def test_classes_may_bear_the_name_of_a_split(tmp_path):
    make_folders(tmp_path, {"ant": 10, "test": 10})
    assert ready("imagefolder", root=str(tmp_path), **SMALL).class_names == ("ant", "test")


@pytest.mark.parametrize(
    ("read", "unread"), [("val", "testing"), ("val", "validation"), ("test", "eval")]
)
def test_a_split_beside_train_that_is_not_read_is_refused(tmp_path, read, unread):
    for name in ("train", read):
        make_folders(tmp_path / name, {"ant": 4, "bee": 4})
    (tmp_path / "figures").mkdir()
    ready("imagefolder", root=str(tmp_path), **SMALL)
    make_folders(tmp_path / unread, {"ant": 4, "bee": 4})
    with pytest.raises(QatTricksError, match=f"has {unread} beside train, {read}, .*rename it"):
        ready("imagefolder", root=str(tmp_path), **SMALL)


def test_a_second_name_of_a_split_that_is_read_is_allowed(tmp_path):
    make_folders(tmp_path / "train", {"ant": 4})
    make_folders(tmp_path / "val", {"ant": 3})
    (tmp_path / "validation").symlink_to(tmp_path / "val")
    assert len(ready("imagefolder", root=str(tmp_path), **SMALL).splits.val) == 3


def test_imagenet_labels_are_places_among_the_train_classes(tmp_path):
    make_folders(tmp_path / "train", {f"n{index:08}": 1 for index in range(5)})
    make_folders(tmp_path / "val", {"n00000003": 2, "n00000001": 1})
    data = ready("imagenet", root=str(tmp_path), num_classes=5, **SMALL)
    assert data.num_classes == 5
    assert data.splits.val.labels.tolist() == [1, 3, 3]
    assert data.splits.test.paths == data.splits.val.paths
    assert len(batches(data.calibration_loader(512))[1]) == 5
    with pytest.raises(QatTricksError, match=r"5 class folders, 1000 are expected.*num_classes=5"):
        ready("imagenet", root=str(tmp_path), **SMALL)
