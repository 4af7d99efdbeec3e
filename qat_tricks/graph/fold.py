"""Take each BatchNorm into the conv or linear before it: the function of the trick ``fold_batchnorm``, and what export does."""

from typing import Any

import torch
from torch import fx

from qat_tricks.graph import nodes as n
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.spec import erase_batchnorm, give_bias, spec_of
from qat_tricks.graph.trace import layer_at


def fold_batchnorm(traced: fx.GraphModule) -> list[tuple[str, str]]:
    """Folds every BatchNorm that alone follows a conv or linear, or a concat of some; its function in evaluation stays the same.

    Returns the pairs ``(layer, batchnorm)`` folded. Others stay: a BatchNorm before a conv or after an activation, one
    without running statistics, and pairs of which either is called more than once.
    """
    found = {str(node.target): n.folds_into(node, traced) for node in traced.graph.nodes}
    pairs = [(str(part.target), batchnorm) for batchnorm, parts in found.items() for part in parts]
    begins: dict[str, int] = {}  # the first channel of each BatchNorm that is not folded yet
    for layer_name, name in pairs:
        layer, batchnorm = layer_at(traced, layer_name), layer_at(traced, name)
        give_bias(layer)
        begin = begins.get(name, 0)
        begins[name] = begin + layer.weight.shape[0]
        _fold(layer, batchnorm, slice(begin, begins[name]))
    for name in begins:
        erase_batchnorm(traced, name)
    traced.recompile()
    spec_of(traced).setdefault("folded", []).extend([list(pair) for pair in pairs])
    return pairs


@torch.no_grad()
def _fold(layer: Any, batchnorm: Any, channels: slice) -> None:
    mean, var = batchnorm.running_mean[channels].double(), batchnorm.running_var[channels].double()
    gamma = torch.ones_like(var) if batchnorm.weight is None else batchnorm.weight[channels].double()
    beta = torch.zeros_like(var) if batchnorm.bias is None else batchnorm.bias[channels].double()
    factor = gamma * torch.rsqrt(var + batchnorm.eps)
    per_channel = factor.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight.copy_(layer.weight.double() * per_channel)
    layer.bias.copy_((layer.bias.double() - mean) * factor + beta)
    if isinstance(layer, Layer) and layer.weight_quantizer is not None and layer.weight_quantizer.scale is not None:
        layer.weight_quantizer.scale.mul_(per_channel.abs())  # the integers stay the same
    # What the normalization said of the output, for the bias absorption of equalize: mean and standard deviation.
    layer.output_statistics = (beta.float(), gamma.abs().float())
