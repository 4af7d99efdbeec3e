"""Data sets by name: their splits, their determinism, their transforms, and what is said when they
cannot be had.
"""

import inspect
import pickle
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision.datasets import CIFAR10

from qat_tricks.data import Preprocessing, build_data, check_labels, data_builder, data_names
from qat_tricks.data.images import random_flip, random_shift
from qat_tricks.data.splits import balanced_subset, stratified_split
from qat_tricks.errors import QatTricksError
from qat_tricks.jobs.datamodule import ImageDataModule
from qat_tricks.models.build import build_model

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ready(name, **options):
    data = build_data(name, **options)
    data.setup()
    return data


def batches(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def make_folders(root: Path, counts: dict[str, int], size=(40, 30)) -> Path:
    """``counts`` images in each class folder, each class of its own grey value (20, 60, 100, …)."""
    for index, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for image in range(count):
            Image.new("RGB", size, (20 + 40 * index,) * 3).save(root / name / f"{image:03}.png")
    return root


# Names and configs
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", data_names())
def test_config_and_builder_have_the_same_options_and_defaults(name):
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert config.pop("name") == name
    defaults = {
        key: p.default for key, p in inspect.signature(data_builder(name)).parameters.items()
    }
    assert config == {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()}
    assert (CONF / f"{name}.yaml").read_text().startswith(f"# python train.py data={name}")


def test_unknown_names_and_options_are_told_the_nearest():
    with pytest.raises(QatTricksError, match='"cifar10"'):
        build_data("cifar")
    with pytest.raises(QatTricksError, match=r'"batchsize".*"batch_size".*"sed".*"seed"'):
        build_data("digits", batchsize=3, sed=1)


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"num_workers": -1}, {"image_size": 0}, {"shift": -1}]
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(QatTricksError, match=next(iter(options))):
        ready("digits", **options)


@pytest.mark.parametrize("name", ["cifar10", "imagefolder", "imagenet"])
def test_a_missing_root_is_named(name, tmp_path):
    with pytest.raises(QatTricksError, match=r"data\.root=PATH"):
        build_data(name)
    with pytest.raises(QatTricksError, match="nowhere"):
        build_data(name, root=str(tmp_path / "nowhere"))


# Splits
# --------------------------------------------------------------------------------------------


def test_stratified_split_is_a_partition_that_keeps_proportions():
    labels = torch.tensor([0] * 100 + [1] * 20 + [2])
    parts = stratified_split(labels, (0.6, 0.15, 0.25), seed=0)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(121))
    assert [torch.bincount(labels[part], minlength=3).tolist() for part in parts] == [
        [60, 12, 1],
        [15, 3, 0],
        [25, 5, 0],
    ]
    again, other = (stratified_split(labels, (0.6, 0.15, 0.25), seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], other[0])


def test_impossible_splits_are_refused():
    with pytest.raises(QatTricksError, match="sum 1"):
        stratified_split(torch.zeros(10).long(), (0.9, 0.3), seed=0)
    with pytest.raises(QatTricksError, match="too few"):
        stratified_split(torch.arange(3), (0.8, 0.2), seed=0)


def test_balanced_subset_takes_classes_in_turn():
    labels = torch.tensor([0] * 90 + [1] * 8 + [2] * 2)
    chosen = balanced_subset(labels, 12, seed=0)
    assert torch.bincount(labels[chosen]).tolist() == [5, 5, 2]
    assert len(set(chosen.tolist())) == 12
    assert torch.equal(balanced_subset(labels, 5, seed=0), chosen[:5])
    assert sorted(balanced_subset(labels, 1000, seed=0).tolist()) == list(range(100))


def test_labels_out_of_range_are_named():
    check_labels(torch.tensor([0, 9]), 10, "here")
    with pytest.raises(QatTricksError, match="here: labels run from 0 to 10, 10 classes"):
        check_labels(torch.tensor([0, 10]), 10, "here")


# Loaders
# -------------------------------------------------------------------------------------------


def test_digits_are_a_fixed_stratified_split_of_all_images():
    first, second = ready("digits", seed=0), ready("digits", seed=1)
    sizes = [len(split) for split in (first.splits.train, first.splits.val, first.splits.test)]
    assert sum(sizes) == 1797
    assert 440 <= sizes[2] <= 460
    counts = torch.bincount(first.splits.test.labels)
    assert counts.max() - counts.min() <= 3
    assert torch.equal(first.splits.test.images, second.splits.test.images)
    assert (first.num_classes, first.in_channels, first.image_size) == (10, 1, (16, 16))
    images, _ = batches(first.val_dataloader())
    assert images.dtype == torch.float32
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.2


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
def test_pixels_are_the_test_images_before_normalization(name):
    data = ready(name)
    pixels, labels = batches(data.test_pixels())
    images, same = batches(data.test_dataloader())
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


def test_a_changed_preprocessing_does_not_keep_its_hash():
    described = build_data("digits").preprocessing.described()
    assert Preprocessing.from_described(described) == build_data("digits").preprocessing
    with pytest.raises(QatTricksError, match="changed by hand"):
        Preprocessing.from_described({**described, "std": [0.5]})


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


def test_fake_images_can_be_learned_in_a_real_trainer():
    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))

        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def test_step(self, batch, index):
            self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-3)

    pl.seed_everything(0)
    trainer = pl.Trainer(
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    data, lit = ImageDataModule(build_data("fake")), Lit()
    trainer.fit(lit, data)
    assert trainer.test(lit, data, verbose=False)[0]["accuracy"] > 0.9


def test_four_epochs_of_resnet20_read_digits():
    torch.manual_seed(0)
    data = ready("digits", image_size=8)
    net = build_model("resnet20", num_classes=data.num_classes, in_channels=data.in_channels)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    loader = data.train_dataloader()
    # A rate that ends near zero: BatchNorm's running statistics lag behind weights that still move.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * len(loader))
    for _ in range(4):
        for images, labels in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            schedule.step()
    images, labels = batches(data.test_dataloader())
    with torch.no_grad():
        assert (net.eval()(images).argmax(1) == labels).float().mean() > 0.85


# Augmentation
# --------------------------------------------------------------------------------------


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


# CIFAR-10
# -----------------------------------------------------------------------------------------------


def test_cifar10_from_class_folders(tmp_path):
    counts = {"cat": 20, "dog": 20, "airplane": 20}
    make_folders(tmp_path / "train", counts, (32, 32))
    make_folders(tmp_path / "test", dict.fromkeys(counts, 2), (32, 32))
    data = ready("cifar10", root=str(tmp_path))
    assert data.class_names == ("airplane", "cat", "dog")
    assert [len(s) for s in (data.splits.train, data.splits.val, data.splits.test)] == [54, 6, 6]
    grey = {"cat": 20, "dog": 60, "airplane": 100}
    images, labels = batches(data.test_dataloader())
    for image, label in zip(images, labels, strict=True):
        expected = (grey[data.class_names[label]] / 255 - 0.485) / 0.229
        assert torch.allclose(image[0], torch.tensor(expected), atol=1e-5)


def test_cifar10_from_torchvisions_files(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3 * 32 * 32), dtype=np.uint8)
    labels = [index % 2 for index in range(20)]

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return md5(data).hexdigest()

    train = write("data_batch_1", {"data": pixels, "labels": labels})
    test = write("test_batch", {"data": pixels[:4], "labels": labels[:4]})
    meta = write("batches.meta", {"label_names": ["cat", "dog"]})
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", train]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", test]])
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta}
    )
    for root in (tmp_path, folder):
        data = ready("cifar10", root=str(root))
        assert [len(s) for s in (data.splits.train, data.splits.val, data.splits.test)] == [
            18,
            2,
            4,
        ]
        assert np.array_equal(data.splits.test.images.flatten(1).numpy(), pixels[:4])
    (folder / "test_batch").write_bytes(b"cut")
    with pytest.raises(QatTricksError, match="damaged"):
        ready("cifar10", root=str(tmp_path))


def test_cifar10_of_neither_form_or_another_size_is_refused(tmp_path):
    with pytest.raises(QatTricksError, match="holds neither"):
        ready("cifar10", root=str(tmp_path))
    make_folders(tmp_path / "train", {"cat": 2}, (31, 32))
    with pytest.raises(QatTricksError, match="31x32"):
        ready("cifar10", root=str(tmp_path))


# Image folders and ImageNet
# ------------------------------------------------------------------------

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


# Preprocessing
# -------------------------------------------------------------------------------------


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
