"""States that a network is in for the length of a ``with`` block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from qat_tricks.graph.layers import layers
from qat_tricks.numerics import ActivationQuantizer, WeightQuantizer


@contextmanager
def kept_modes(*networks: nn.Module) -> Iterator[None]:
    """Puts each module of ``networks``, after the block, back into its own mode."""
    # Each by itself: a user may hold some modules in evaluation mode during training.
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Puts ``networks`` into evaluation mode, and afterwards each module back into its own mode."""
    with kept_modes(*networks):
        for network in networks:
            network.eval()
        yield


@contextmanager
def unrounded_sums(network: nn.Module) -> Iterator[None]:
    """Lets the layers of ``network`` hand out their sums as they are, for a quantizer to round."""
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
    """Lets every quantizer of ``network`` pass its values on as they are.

    The network then computes its float function, with masks applied.
    """
    quantizers = [
        m for m in network.modules() if isinstance(m, (ActivationQuantizer, WeightQuantizer))
    ]
    # Blocks may be nested: the inner one must not switch the outer one's quantizers on.
    was_enabled = [quantizer.enabled for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in zip(quantizers, was_enabled, strict=True):
            quantizer.enabled = enabled
