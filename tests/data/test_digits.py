"""scikit-learn's digits: a fixed split, and images that a network learns to read."""

import torch

from qat_tricks.models.build import build_model
from tests.helpers.image_data import batches, ready


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
