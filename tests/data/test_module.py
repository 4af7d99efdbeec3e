"""Loaders: the same batches for the same seed, with and without augmentation."""

import pytest
import torch

from qat_tricks.data import Preprocessing, build_data
from qat_tricks.errors import QatTricksError
from tests.helpers.image_data import batches, ready


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_batches_whatever_the_global_stream(workers):
    def epochs(seed):
        torch.manual_seed(torch.seed())
        loader = ready("digits", seed=seed, num_workers=workers).train_dataloader()
        return [batches(loader) for _ in range(2)]

    first, again, other = epochs(3), epochs(3), epochs(4)
    for (images, labels), (same_images, same_labels) in zip(first, again, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert not torch.equal(first[0][1], first[1][1]), "epochs have one order"
    assert not torch.equal(first[0][1], other[0][1]), "seeds have one order"


def test_loading_takes_nothing_from_the_global_stream():
    loader = ready("digits").train_dataloader()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_from_one_batch_to_the_next():
    images = ready("digits", shift=2).train_dataloader().dataset
    draws = [images.batch([0])[0] for _ in range(10)]
    assert any(not torch.equal(draw, draws[0]) for draw in draws)


def test_each_train_loader_begins_anew():
    data = ready("digits")
    assert torch.equal(batches(data.train_dataloader())[0], batches(data.train_dataloader())[0])


@pytest.mark.parametrize(("batch_size", "images"), [(100, 200), (256, 256), (300, 256)])
def test_only_a_last_batch_among_several_is_dropped(batch_size, images):
    assert len(batches(ready("fake", batch_size=batch_size).train_dataloader())[1]) == images


def test_calibration_images_are_unaugmented_balanced_and_in_one_order():
    data = ready("digits", shift=2)
    images, labels = batches(data.calibration_loader(50, batch_size=20))
    again, _ = batches(data.calibration_loader(50))
    assert torch.equal(images, again)
    assert torch.bincount(labels).tolist() == [5] * 10
    assert torch.equal(data.splits.calibration.images, data.splits.train.images)
    still = {
        tuple(image.flatten().tolist())
        for image in batches(torch.utils.data.DataLoader(data.splits.calibration))[0]
    }
    assert all(tuple(image.flatten().tolist()) in still for image in images)
    augmented = batches(data.train_dataloader())[0]
    assert not all(tuple(image.flatten().tolist()) in still for image in augmented)


@pytest.mark.parametrize("name", ["digits", "fake"])
def test_pixels_are_the_images_before_normalization(name):
    data = ready(name)
    pairs = [
        (data.test_pixels(), data.test_dataloader()),
        (data.val_pixels(), data.val_dataloader()),
    ]
    for pixel_batches, image_batches in pairs:
        pixels, labels = batches(pixel_batches)
        images, same = batches(image_batches)
        assert pixels.dtype == torch.uint8
        assert torch.equal(data.preprocessing.normalize()(pixels), images)
        assert torch.equal(labels, same)


def test_the_same_images_under_another_preprocessing():
    data = ready("digits")
    changed = {
        **data.preprocessing.as_dict(),
        "mean": [0.0],
        "resize": [8, 8],
        "image_size": [8, 8],
    }
    other = data.with_preprocessing(Preprocessing.from_dict(changed))
    other.setup()
    assert other.image_size == (8, 8)
    assert torch.equal(other.splits.test.labels, data.splits.test.labels)
    assert batches(other.test_dataloader())[0].min() == 0
    assert data.image_size == (16, 16)


def test_an_empty_calibration_is_refused():
    with pytest.raises(QatTricksError, match="at least one"):
        ready("fake").calibration_loader(0)


def test_setup_loads_once_and_properties_need_it():
    data = build_data("fake")
    with pytest.raises(QatTricksError, match="setup"):
        _ = data.num_classes
    data.setup()
    splits = data.splits
    data.setup()
    assert data.splits is splits


def test_a_sample_of_the_test_images_has_each_class_alike_also_where_they_are_sorted():
    data = ready("digits")
    order = data.splits.test.labels.argsort()  # as a folder of each class gives them
    splits = data.splits
    for images in (splits.test, splits.pixels):
        images.images, images.labels = images.images[order], images.labels[order]
    floats, labels = batches(data.test_sample(50))
    assert torch.bincount(labels, minlength=10).tolist() == [5] * 10
    pixels, same = batches(data.test_sample(50, pixels=True))
    assert torch.equal(same, labels)
    assert torch.equal(data.preprocessing.normalize()(pixels), floats)
    everything, _ = batches(data.test_sample(10**6))
    assert len(everything) == len(splits.test)
