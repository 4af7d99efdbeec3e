"""How a quantized network's logits differ from the float network's, image by image."""

import math

from torch import Tensor

Z_95 = 1.96


def paired_interval(differences: Tensor) -> tuple[float, float, float]:
    """The mean of paired differences and its 95 % interval.

    After Agresti and Min (Statistics in Medicine 24, 2005): half an image is added to each of the
    four cells of the table of right and wrong answers, so that the interval keeps a width where no
    image changed.

    Args:
        differences: of each image, -1..1: right with the quantized network less right with the
            float one, or the mean of it over seeds.

    Returns:
        The plain mean, and the interval's two ends.
    """
    count = len(differences) + 2
    mean = differences.sum().item() / count
    # the two half images of either sign add half a square each
    variance = (differences.square().sum().item() + 1) / count - mean**2
    half = Z_95 * math.sqrt(variance / count)
    return differences.mean().item(), mean - half, mean + half


def kl_divergence(expected: Tensor, got: Tensor) -> float:
    """Mean over the images of KL(float ‖ quantized), in nats; both are logits ``[N, C]``."""
    p, q = expected.double().log_softmax(1), got.double().log_softmax(1)
    return (p.exp() * (p - q)).sum(1).mean().item()


def agreement(expected: Tensor, got: Tensor) -> float:
    """Share of the images to which both give the same class, 0..1."""
    return (expected.argmax(1) == got.argmax(1)).float().mean().item()


def change(expected: Tensor, got: Tensor, labels: Tensor) -> Tensor:
    """Right with ``got`` less right with ``expected``, of each image: -1, 0 or 1."""
    return (got.argmax(1) == labels).float() - (expected.argmax(1) == labels).float()
