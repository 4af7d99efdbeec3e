"""Folders of images, one folder a class, as the benchmarks feed them to a network."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5)  # to -1..1


def image_folder(
    folder: Path,
    size: int = 224,
    mean: Sequence[float] = HALVES,
    std: Sequence[float] = HALVES,
) -> ImageFolder:
    """The images of ``folder``, ``[3, size, size]``, normalized, with their classes' numbers."""
    steps = [
        transforms.Resize((size, size)),
        transforms.ToTensor(),
        transforms.Normalize(mean, std),
    ]
    return ImageFolder(str(folder), transforms.Compose(steps))


def batches(
    images: ImageFolder, batch_size: int, indices: Sequence[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches ``[batch_size, 3, size, size]`` and labels, of all images or those at ``indices``."""
    part = images if indices is None else Subset(images, indices)
    return iter(DataLoader(part, batch_size=batch_size))
