"""Take each BatchNorm into the conv or linear before it, for the trick and for export.

A BatchNorm that cannot be folded multiplies channels by numbers and adds numbers. That is a
depthwise conv with one weight for each channel, which eight bits hold without an error and integer
kernels compute.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.foldable import MATRIX, folds_into, is_supposed_matrix
from qat_tricks.graph.layers import OWN_BATCHNORMS, Layer
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.submodules import layer_at, module_of
from qat_tricks.graph.surgery import (
    attach_batchnorm,
    batchnorm_to_conv,
    erase_batchnorm,
    fold_own_batchnorms,
    give_bias,
    note_folded,
)


def fold_batchnorm(traced: fx.GraphModule, skip: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Folds every BatchNorm that is the only reader of a conv or linear, or of a concat of some.

    So is a BatchNorm that a layer has of its own. The network's function in evaluation stays the
    same. Other BatchNorms stay: those before a conv
    or after an activation, those without running statistics, and those that do not follow the same
    layers at each call of either. Behind a linear, a BatchNorm1d is folded where it takes rows
    ``[N, C]``. If neither the graph nor ``note_ranks`` tells that it does, the linear refuses other
    inputs from then on (QatTricksError).

    Args:
        traced: the network, changed in place.
        skip: names of BatchNorms that stay.

    Returns:
        The pairs ``(layer, batchnorm)`` folded.
    """
    uses = n.uses_of_weights(traced)
    supposed = _supposed(traced, uses, skip)
    own = fold_own_batchnorms(traced, skip)
    # By name, so that a BatchNorm that is called twice is folded once.
    layers_of = {str(node.target): folds_into(node, traced, uses) for node in traced.graph.nodes}
    pairs = [
        (str(part.target), batchnorm)
        for batchnorm, parts in layers_of.items()
        for part in parts
        if batchnorm not in skip
    ]
    begins: dict[str, int] = {}  # the first channel of each BatchNorm that is not folded yet
    for layer_name, name in pairs:
        layer, batchnorm = layer_at(traced, layer_name), layer_at(traced, name)
        norms = layer.weight.detach().flatten(1).norm(dim=1)
        is_frozen = traced.training and not batchnorm.training
        note_folded(layer, batchnorm, norms=norms, is_frozen=is_frozen)
        give_bias(layer, batchnorm)
        # Behind a concat, each layer has its own part of the BatchNorm's channels, in order.
        begin = begins.get(name, 0)
        begins[name] = begin + layer.weight.shape[0]
        _fold(layer, batchnorm, slice(begin, begins[name]))
    for name in begins:
        erase_batchnorm(traced, name, [layer for layer, of in pairs if of == name])
    for linear, dimensions in supposed:
        linear.register_forward_pre_hook(_Dimensions(dimensions))
    traced.recompile()
    spec_of(traced).setdefault("folded", []).extend([list(pair) for pair in pairs])
    return own + pairs


def attach_batchnorms(traced: fx.GraphModule) -> list[tuple[str, str]]:
    """Gives each BatchNorm that could be folded to its layer, which folds it in evaluation only.

    So a network whose BatchNorms are kept for training is simulated as it is exported. BatchNorms
    behind a concat stay where they are, and are folded at export.

    Args:
        traced: the network, changed in place.

    Returns:
        The pairs ``(layer, batchnorm)``.
    """
    uses = n.uses_of_weights(traced)
    parts_of = {str(node.target): folds_into(node, traced, uses) for node in traced.graph.nodes}
    pairs = [
        (str(parts[0].target), name)
        for name, parts in parts_of.items()
        if len(parts) == 1 and type(traced.get_submodule(name)) in OWN_BATCHNORMS
    ]
    for layer, batchnorm in pairs:
        attach_batchnorm(traced, layer, batchnorm)
    traced.recompile()
    if pairs:
        spec_of(traced).setdefault("attached", []).extend([list(pair) for pair in pairs])
    return pairs


def needs_ranks(traced: fx.GraphModule) -> bool:
    """Whether the graph leaves open what a BatchNorm behind a linear takes.

    ``note_ranks`` answers it.
    """
    return bool(_supposed(traced, n.uses_of_weights(traced)))


def _supposed(
    traced: fx.GraphModule, uses: n.Uses, skip: Sequence[str] = ()
) -> list[tuple[nn.Module, int]]:
    """The linears whose BatchNorm, none of ``skip``, takes a matrix only by supposition.

    Returns:
        Each with the number of dimensions that its input then has.
    """
    return [
        (layer_at(traced, str(linear.target)), MATRIX + (linear is not node.all_input_nodes[0]))
        for node in traced.graph.nodes
        if str(node.target) not in skip
        and folds_into(node, traced, uses)
        and is_supposed_matrix(node, traced)
        for linear in folds_into(node, traced, uses)
    ]


class _Dimensions:
    """Refuses inputs for which a fold that was made on a supposition is wrong."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found = inputs[0].dim()
        if found != self.dimensions:
            raise QatTricksError(
                f"a linear with a folded BatchNorm1d is given {found} dimensions, and it was "
                f"folded for {self.dimensions}: call note_ranks with images before fold_batchnorm"
            )


@torch.no_grad()
def batchnorms_to_convs(traced: fx.GraphModule, skip: Sequence[str] = ()) -> list[str]:
    """Turns each BatchNorm of images behind an integer kernel into a depthwise conv.

    Behind a concat it stays: an integer kernel takes one scale, and the parts may differ much in
    theirs.

    Args:
        traced: the network, changed in place.
        skip: names of BatchNorms that stay.

    Returns:
        The names of these BatchNorms.
    """
    uses = n.uses_of_weights(traced)
    names = [
        str(node.target)
        for node in traced.graph.nodes
        if _takes_integers(node, traced, uses) and node.target not in skip
    ]
    for name in names:
        # Read before surgery, which takes the BatchNorm out.
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


def _takes_integers(node: fx.Node, traced: fx.GraphModule, uses: n.Uses) -> bool:
    """Whether ``node`` calls a BatchNorm on the output of an integer kernel or its ReLU.

    The BatchNorm must have running statistics and be called once.
    """
    batchnorm = module_of(node, traced)
    if (
        not isinstance(batchnorm, nn.BatchNorm2d)
        or batchnorm.running_var is None
        or not n.is_used_once(node, uses)
    ):
        return False
    source = node.all_input_nodes[0]
    # Moved values are still on the kernel's grid.
    while n.is_passthrough(source, traced):
        source = source.all_input_nodes[0]
    if n.activation_of(source, traced) is not None:
        source = source.all_input_nodes[0]
    return n.calls_layer(source, traced) or n.is_integer_op(source, traced)


def _affine_of(
    batchnorm: Any, channels: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A BatchNorm's factor, mean, ``beta`` and ``gamma`` for ``channels``, float64, ``[C]`` each.

    In evaluation it computes ``(x - mean) * factor + beta``.
    """
    # In float64: the product is rounded once, when it is stored.
    mean, var = batchnorm.running_mean[channels].double(), batchnorm.running_var[channels].double()
    gamma = (
        torch.ones_like(var) if batchnorm.weight is None else batchnorm.weight[channels].double()
    )
    beta = torch.zeros_like(var) if batchnorm.bias is None else batchnorm.bias[channels].double()
    return gamma * torch.rsqrt(var + batchnorm.eps), mean, beta, gamma


@torch.no_grad()
def _fold(layer: Any, batchnorm: Any, channels: slice) -> None:
    """Folds these ``channels`` of a BatchNorm into the layer that makes them."""
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
    # The output's mean and standard deviation, which the bias absorption of equalize reads.
    layer.output_statistics = (beta.float(), gamma.abs().float())
