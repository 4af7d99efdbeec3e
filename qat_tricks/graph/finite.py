"""Refuses networks whose numbers are not finite: one NaN would reach every value behind it."""

import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.layers import BATCHNORMS
from qat_tricks.numerics import ActivationQuantizer


def check_finite(network: nn.Module) -> None:
    """Raises QatTricksError if a parameter, or a statistic of a BatchNorm, is NaN or infinite.

    A negative variance, whose root is NaN, counts as well.

    The scale of a quantizer is NaN until it is calibrated, and a mask in a buffer may be infinite:
    these do not count.

    Args:
        network: any network.
    """
    for prefix, module in network.named_modules():
        if isinstance(module, ActivationQuantizer):
            continue
        tensors = dict(module.named_parameters(recurse=False))
        if isinstance(module, BATCHNORMS):
            tensors |= dict(module.named_buffers(recurse=False))
        for name, values in tensors.items():
            if values.is_meta or not values.is_floating_point():
                continue
            is_finite = bool(torch.isfinite(values).all())
            if not is_finite or (name == "running_var" and bool((values < 0).any())):
                kind = "negative" if is_finite else "NaN or infinite"
                raise QatTricksError(
                    f'"{prefix + "." if prefix else ""}{name}" of the network holds {kind} '
                    "numbers: give a network whose training has not diverged"
                )
