"""How the images that ranges were calibrated on differ from the test images."""

from typing import Any

import torch
from torch import Tensor, nn

from qat_tricks.data import ImageData
from qat_tricks.graph.tensor_figures import FEW_IMAGES, activation_shifts


def calibration_figures(network: nn.Module, data: ImageData, labels: Tensor) -> dict[str, Any]:
    """Compares the first calibration images with test images.

    Args:
        network: quantized, or float.
        data: loaded.
        labels: of all test images, ``[N]``.

    Returns:
        ``images``, of the calibration; ``class_gap``, the largest difference of a class's share of
        them from its share of the test images, 0..1, and the name of that ``class``; ``shift``, the
        largest distance between the means of an activation on both, in units of its range, and the
        name of that ``tensor``. These two are None of a float network.
    """
    calibration = list(data.calibration_loader(FEW_IMAGES))
    own = torch.cat([labels for _, labels in calibration])
    shares = [
        torch.bincount(found.long(), minlength=data.num_classes).double() / len(found)
        for found in (own, labels)
    ]
    gap, index = (shares[0] - shares[1]).abs().max(0)
    # Both are balanced by class, so that a shift is none of the classes' shares.
    tested = data.test_sample(FEW_IMAGES)
    shifts = activation_shifts(
        network, (images for images, _ in calibration), (images for images, _ in tested)
    )
    tensor = max(shifts, key=lambda name: shifts[name], default=None)
    return {
        "images": len(own),
        "class_gap": float(gap),
        "class": data.class_names[int(index)],
        "shift": None if tensor is None else shifts[tensor],
        "tensor": tensor,
    }
