"""CIFAR-10 from torchvision's own files and from folders of images."""

import pickle
from hashlib import md5

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from qat_tricks.errors import QatTricksError
from tests.helpers.image_data import batches, make_folders, ready


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
