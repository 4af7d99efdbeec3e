"""Between which values the activation function behind a layer yields the layer's output."""

from torch import fx

from qat_tricks.graph import nodes as n
from qat_tricks.graph.submodules import module_of
from qat_tricks.numerics import ActivationQuantizer


def activation_limits(node: fx.Node, traced: fx.GraphModule) -> tuple[float, float]:
    """The least and the largest value behind ``node``; infinite without a ReLU or ReLU6.

    Args:
        node: calls a layer.
        traced: a network with quantizers, which apply the activation functions.
    """
    quantizer = n.only_user(node, lambda user: True)
    module = None if quantizer is None else module_of(quantizer, traced)
    if isinstance(module, ActivationQuantizer) and module.activation is not None:
        return 0.0, module.cap
    return float("-inf"), float("inf")
