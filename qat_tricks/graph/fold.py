"""Take each BatchNorm into the conv or linear before it: the function of the trick
``fold_batchnorm``, and what export does.

What cannot be folded multiplies channels by numbers and adds numbers. That is a depthwise conv of
one weight a channel, which eight bits hold without an error and integer kernels compute.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.graph import nodes as n
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import batchnorm_to_conv, erase_batchnorm, give_bias
from qat_tricks.graph.trace import layer_at, module_of


def fold_batchnorm(traced: fx.GraphModule) -> list[tuple[str, str]]:
    """Folds every BatchNorm that alone follows a conv or linear, or a concat of some; its function
    in evaluation stays the same.

    Returns the pairs ``(layer, batchnorm)`` folded. Others stay: a BatchNorm before a conv or after
    an activation, one without running statistics, and those that do not follow the same layers at
    each call of either.
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
def batchnorms_to_convs(traced: fx.GraphModule) -> list[str]:
    """Turns each BatchNorm of images that takes what integer kernels make into a depthwise conv,
    and returns their names.

    Behind a concat it stays: an integer kernel takes one scale, and the parts may differ much in
    theirs.
    """
    names = [str(node.target) for node in traced.graph.nodes if _takes_integers(node, traced)]
    for name in names:
        factor, mean, beta, gamma = _affine_of(layer_at(traced, name))
        conv = batchnorm_to_conv(traced, name)
        conv.weight.copy_(factor.view(conv.weight.shape))
        assert conv.bias is not None
        conv.bias.copy_(beta - mean * factor)
        conv.output_statistics = (beta.float(), gamma.abs().float())  # type: ignore[assignment]
    traced.recompile()
    if names:
        spec_of(traced).setdefault("convs", []).extend(names)
    return names


def _takes_integers(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` calls a BatchNorm with running statistics, once, on the output of an integer
    kernel or its ReLU.
    """
    batchnorm = module_of(node, traced)
    if (
        not isinstance(batchnorm, nn.BatchNorm2d)
        or batchnorm.running_var is None
        or not n.is_used_once(node, traced)
    ):
        return False
    source = node.all_input_nodes[0]
    while n.is_passthrough(source, traced):
        source = source.all_input_nodes[0]
    if n.activation_of(source, traced) is not None:
        source = source.all_input_nodes[0]
    return n.calls_layer(source, traced) or n.is_integer_op(source, traced)


def _affine_of(
    batchnorm: Any, channels: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a BatchNorm multiplies ``channels`` by, their mean, and its ``beta`` and ``gamma``, in
    float64, ``[C]`` each.
    """
    mean, var = batchnorm.running_mean[channels].double(), batchnorm.running_var[channels].double()
    gamma = (
        torch.ones_like(var) if batchnorm.weight is None else batchnorm.weight[channels].double()
    )
    beta = torch.zeros_like(var) if batchnorm.bias is None else batchnorm.bias[channels].double()
    return gamma * torch.rsqrt(var + batchnorm.eps), mean, beta, gamma


@torch.no_grad()
def _fold(layer: Any, batchnorm: Any, channels: slice) -> None:
    factor, mean, beta, gamma = _affine_of(batchnorm, channels)
    per_channel = factor.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight.copy_(layer.weight.double() * per_channel)
    layer.bias.copy_((layer.bias.double() - mean) * factor + beta)
    if (
        isinstance(layer, Layer)
        and layer.weight_quantizer is not None
        and layer.weight_quantizer.scale is not None
    ):
        layer.weight_quantizer.scale.mul_(per_channel.abs())  # the integers stay the same
    # What the normalization said of the output, for the bias absorption of equalize: mean and
    # standard deviation.
    layer.output_statistics = (beta.float(), gamma.abs().float())
