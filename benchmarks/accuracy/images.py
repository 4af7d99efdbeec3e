"""The images of the harness, read once and kept as uint8 tensors.

All methods get the very same pixels, whatever library reads images in their environments.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from cifar import load_cifar10
from networks import Network
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

CALIBRATION_POOL = 10_000  # CIFAR-10's train images from which a seed chooses


def prepare(
    network: Network, runs: Path, calibration: Path | None, test: Path | None, cifar10: Path | None
) -> Path:
    """Returns the file of ``calibration`` and ``test`` images, and ``labels`` of the latter.

    The test images are in one random order, so that the first ones are of all classes.

    Args:
        network: its ``data``, ``resize`` and ``size`` decide on the images.
        runs: folder that keeps the files.
        calibration: ImageNet images, one folder a class of all 1,000.
        test: ImageNet images, one folder a class, some of these classes.
        cifar10: as ``load_cifar10`` takes it.

    Raises:
        SystemExit: the folder that is needed was not given.
    """
    path = runs / "images" / f"{network.data}_{network.resize}_{network.size}.pt"
    if path.is_file():
        return path
    if network.data == "cifar10":
        if cifar10 is None:
            raise SystemExit("CIFAR-10's networks need --cifar10")
        data = load_cifar10(cifar10)
        pool = _shuffled(len(data["train_x"]))[:CALIBRATION_POOL]
        order = _shuffled(len(data["test_x"]))
        made = {
            "calibration": data["train_x"][pool],
            "test": data["test_x"][order],
            "labels": data["test_y"][order],
        }
    else:
        if calibration is None or test is None:
            raise SystemExit("ImageNet's networks need --calibration and --test-images")
        made = _imagenet(network, calibration, test)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, path)
    return path


def _imagenet(network: Network, calibration: Path, test: Path) -> dict[str, Tensor]:
    steps: Sequence[object]
    if network.resize == network.size:
        steps = [transforms.Resize((network.size, network.size))]
    else:
        steps = [transforms.Resize(network.resize), transforms.CenterCrop(network.size)]
    transform = transforms.Compose([*steps, transforms.PILToTensor()])
    pool, tested = ImageFolder(str(calibration), transform), ImageFolder(str(test), transform)
    # the sorted names of the calibration's folders are the network's outputs
    outputs = torch.tensor([pool.classes.index(name) for name in tested.classes])
    order = _shuffled(len(tested)).tolist()
    return {
        "calibration": torch.stack([pool[i][0] for i in range(len(pool))]),
        "test": torch.stack([tested[i][0] for i in order]),
        "labels": outputs[[tested.targets[i] for i in order]],
    }


def _shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))
