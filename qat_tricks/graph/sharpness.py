"""Measures how sharply a network's loss is curved, which bounds the rate that it can be trained at.

Gradient descent with a rate ``r`` diverges along a direction of curvature ``h`` if ``r > 2 / h``.
The largest curvature is the largest eigenvalue of the loss's Hessian. It differs between networks
by far more than their accuracy tells: 12 for a CIFAR-10 ResNet-20, 720 for a MobileNetV2 whose
BatchNorms are the identity. The method is that of LeCun, Simard and Pearlmutter 1992, "Automatic
Learning Rate Maximization by On-Line Estimation of the Hessian's Eigenvectors": power iteration, in
which a difference of two gradients is the Hessian times a direction.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError, one_line
from qat_tricks.graph.inputs import Inputs, batch_size, call_network, check_batches, split
from qat_tricks.graph.logits import drawn_classes, rows_of_logits
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.random_state import kept_random_state, seed_all
from qat_tricks.graph.snapshot import Snapshot
from qat_tricks.progress import track

BATCH = 64  # images of a gradient: less memory than training takes, and statistics of BatchNorm
ITERATIONS = 8  # from there on the estimate changes by a tenth
STEP = 1e-3  # of a direction, relative to the weights of the parameter that it changes most
SMALLEST = 1e-2  # of a bias, a gain or a LayerScale: it may begin at zero, or near it


def sharpness(traced: fx.GraphModule, batches: Sequence[Inputs]) -> float:
    """The largest eigenvalue of the Hessian of the cross entropy, in float.

    The labels are drawn from the network's own probabilities, so that none are needed. The
    quantizers are off, for a rounded weight has no difference of gradients.

    Args:
        traced: a traced network in the mode in which it is trained; it is left as it was.
        batches: the network's inputs, as training has them.

    Returns:
        The eigenvalue by its size, in units of loss per squared unit of the weights; 0 where the
        network is so sure of its classes that its loss is flat.

    Raises:
        QatTricksError: no batches, no gradients, or a network whose gradients are not finite.
    """
    check_batches(batches, "to measure the learning rate on")
    pieces = [p for batch in batches for p in split(batch, min(BATCH, batch_size(batch)))]
    full = max(map(batch_size, pieces))  # a rest may have too few images for a BatchNorm
    pieces = [piece for piece in pieces if batch_size(piece) == full]
    parameters = [p for p in traced.parameters() if p.requires_grad]
    values = [p.detach().clone() for p in parameters]
    before = Snapshot(traced)  # statistics of BatchNorm move in training mode
    try:
        with float_mode(traced), kept_random_state():
            return _largest_curvature(_Gradient(traced, parameters, pieces), values)
    finally:
        before.restore()


class _Gradient:
    """The gradient of the mean loss over all images, at other weights than the network's own.

    Args:
        traced: the network.
        parameters: those that the loss is differentiated by.
        pieces: its inputs.
    """

    def __init__(
        self, traced: fx.GraphModule, parameters: list[nn.Parameter], pieces: list[Inputs]
    ) -> None:
        self.traced, self.parameters, self.pieces = traced, parameters, pieces
        self.classes: list[Tensor] = []  # drawn in the first pass, the same in every other

    def at(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The gradient where the parameters have ``values``."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)
        total = [torch.zeros_like(value) for value in values]
        for index, piece in enumerate(self.pieces):
            for sum_, part in zip(total, self._of_piece(index, piece), strict=True):
                if part is not None:
                    sum_ += part / len(self.pieces)
        return total

    def _of_piece(self, index: int, piece: Inputs) -> Sequence[Tensor | None]:
        seed_all(index)  # dropout leaves out the same units each time
        with torch.enable_grad():
            rows = rows_of_logits(call_network(self.traced, piece))
            if not torch.isfinite(rows).all():
                raise _no_curvature("logits are not finite")
            if index == len(self.classes):
                self.classes.append(drawn_classes(rows))
            loss = F.cross_entropy(rows, self.classes[index])
            if not loss.requires_grad:
                raise QatTricksError(
                    "lr=auto needs gradients, and the network computes its output without: give "
                    "a number"
                )
            try:
                return torch.autograd.grad(loss, self.parameters, allow_unused=True)
            except RuntimeError as error:  # as of checkpointing with use_reentrant=True
                raise QatTricksError(
                    f"lr=auto cannot differentiate the network ({one_line(error)}): give a number"
                ) from error


def _largest_curvature(gradient: _Gradient, values: list[Tensor]) -> float:
    """Power iteration: the size of ``H v`` for a ``v`` of length 1 that turns to the steepest."""
    here = gradient.at(values)
    # It begins with the gradient, which is steep already, and the same on every machine.
    direction, curvature = here, 0.0
    for _ in track(range(ITERATIONS), "measure the learning rate"):
        length = _norm(direction)
        if not math.isfinite(length):
            raise _no_curvature("gradient is not finite")
        if length == 0:
            return 0.0
        direction = [part / length for part in direction]
        relative = [
            float(part.norm()) / size
            for part, value in zip(direction, values, strict=True)
            if (size := _size(value)) > 0  # a classifier of zeros has none to compare with
        ]
        step = STEP / (max(relative, default=0.0) or 1.0)
        there = gradient.at(
            [value + step * part for value, part in zip(values, direction, strict=True)]
        )
        direction = [(b - a) / step for a, b in zip(here, there, strict=True)]
        curvature = _norm(direction)
    return curvature


def _size(value: Tensor) -> float:
    """How large a parameter is, to tell how large a change of it is small."""
    size = float(value.norm())
    # A layer before a BatchNorm has the same output whatever its weights' size, and a change is
    # large as it is in relation to them. What is added, or multiplies a channel, is no such thing:
    # beside a bias of 1e-8 a step would be lost in the rounding of all other weights.
    is_vector = sum(length > 1 for length in value.shape) <= 1
    return max(size, SMALLEST * math.sqrt(value.numel())) if is_vector else size


def _no_curvature(reason: str) -> QatTricksError:
    return QatTricksError(f"lr=auto finds no curvature, for the network's {reason}: give a number")


def _norm(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))
