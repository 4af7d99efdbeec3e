"""States that a network is in for the length of a ``with`` block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qat_tricks.graph.layers import layers
from qat_tricks.numerics import ActivationQuantizer, WeightQuantizer


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Puts ``networks`` into evaluation mode, and each of their modules back into its own mode after."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def unrounded_sums(network: nn.Module) -> Iterator[None]:
    """Within it the layers of ``network`` hand out their sums as they are, for a quantizer to
    round.
    """
    quantized = list(layers(network).values())
    try:
        for layer in quantized:
            layer.rounds = False
        yield
    finally:
        for layer in quantized:
            layer.rounds = True


@contextmanager
def float_mode(network: nn.Module) -> Iterator[None]:
    """Within it every quantizer of ``network`` lets its values through as they are: the float
    function, masks applied.
    """
    quantizers = [
        m for m in network.modules() if isinstance(m, (ActivationQuantizer, WeightQuantizer))
    ]
    was_enabled = [quantizer.enabled for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in zip(quantizers, was_enabled, strict=True):
            quantizer.enabled = enabled
