"""Cross-layer equalization, with bias absorption.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), sections
4.1.1 to 4.1.3: channel ``i`` between two layers is scaled by ``1 / s_i`` and back by ``s_i`` with
``s_i = sqrt(r1_i * r2_i) / r2_i``, where ``r1``, ``r2`` are the channel's largest absolute weights in either layer; then
``c = max(0, beta - 3 * gamma)`` of a ReLU's input moves into the next layer's bias.

Where this differs: scaling passes through whatever is positively homogeneous (ReLU, max and average pools, flatten), so
through ReLU but not through ReLU6, unless ``uncap`` says that ReLU6 may become ReLU; biases are absorbed only where the next
layer does not pad, since at a padded border the shift would not cancel.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.spec import uncap as uncap_nodes
from qat_tricks.graph.trace import layer_at
from qat_tricks.trick import Trick
from qat_tricks.workbench import Workbench


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing but channel-wise homogeneous operations between them."""

    first: str
    second: str
    relu: bool
    flat: int  # how many of the second layer's inputs stem from one channel of the first (flatten before a linear)


def equalize(traced: fx.GraphModule, *, iterations: int = 20, absorb_bias: bool = True, uncap: bool = False) -> list[Pair]:
    """Equalizes all pairs of ``traced`` in place and returns them; the network's function stays the same.

    Args:
        traced: a traced network without quantizers, BatchNorm folded.
        iterations: how often to sweep over the pairs; chains converge geometrically.
        absorb_bias: also move large biases before a ReLU into the next layer.
        uncap: let ReLU6 become ReLU, so that the pairs around it can be equalized; this changes the function.

    Raises:
        QatTricksError: iterations below 1.
    """
    if iterations < 1:
        raise QatTricksError(f"iterations={iterations} is not allowed: give 1 or more")
    if uncap:
        names = [node.name for node in traced.graph.nodes if n.activation_of(node, traced) == "relu6"]
        uncap_nodes(traced, names)
        spec_of(traced).setdefault("uncapped", []).extend(names)
    pairs = find_pairs(traced)
    with torch.no_grad():
        for _ in range(iterations):
            change = max((_equalize_pair(traced, pair) for pair in pairs), default=0.0)
            if change < 1e-3:
                break
        if absorb_bias:
            for pair in pairs:
                _absorb(traced, pair)
    return pairs


def find_pairs(traced: fx.GraphModule) -> list[Pair]:
    """The pairs that can be equalized, in the order of the graph."""
    called = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    pairs = []
    for node in traced.graph.nodes:
        if not n.calls_layer(node, traced) or called.count(str(node.target)) > 1:
            continue
        relu, after = False, node
        while len(after.users) == 1:
            (after,) = after.users
            if n.activation_of(after, traced) == "relu":
                relu = True
            elif not _is_channelwise(after, traced):
                break
        if n.calls_layer(after, traced) and after is not node and called.count(str(after.target)) == 1:
            first, second = layer_at(traced, str(node.target)), layer_at(traced, str(after.target))
            inputs = second.weight.shape[1] * getattr(second, "groups", 1)
            if inputs % first.weight.shape[0] == 0 and (inputs == first.weight.shape[0] or isinstance(second, nn.Linear)):
                pairs.append(Pair(str(node.target), str(after.target), relu, inputs // first.weight.shape[0]))
    return pairs


_SAFE: set[Any] = {nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten}
_SAFE |= {torch.flatten, "flatten"}


def _is_channelwise(node: fx.Node, traced: fx.GraphModule) -> bool:
    return n.calls(node, traced, _SAFE) or n.is_spatial_mean(node, traced)


def _by_input(weight: Tensor, channels: int, flat: int) -> Tensor:
    """A view of the second layer's weight as ``[groups, out / groups, in / groups, flat * kernel]`` by input channel."""
    groups = channels * flat // weight.shape[1]
    return weight.view(groups, weight.shape[0] // groups, channels // groups, -1)


def _equalize_pair(traced: fx.GraphModule, pair: Pair) -> float:
    """Equalizes one pair and returns the largest relative change of a channel."""
    first, second = layer_at(traced, pair.first), layer_at(traced, pair.second)
    channels = first.weight.shape[0]
    by_input = _by_input(second.weight, channels, pair.flat)
    r1 = first.weight.abs().flatten(1).amax(1)
    r2 = by_input.abs().amax((1, 3)).flatten()
    # s = r1 / sqrt(r1 * r2): both ranges become sqrt(r1 * r2). Channels that one side does not use stay as they are.
    scale = torch.where((r1 > 0) & (r2 > 0), (r1 / r2.clamp_min(1e-12)).sqrt(), 1.0).clamp(1e-4, 1e4)
    first.weight.div_(scale.view(-1, *[1] * (first.weight.dim() - 1)))
    if first.bias is not None:
        first.bias.div_(scale)
    by_input.mul_(scale.view(by_input.shape[0], 1, by_input.shape[2], 1))
    statistics = getattr(first, "output_statistics", None)
    if statistics is not None:
        first.output_statistics = (statistics[0] / scale, statistics[1] / scale)
    return float((scale - 1).abs().max())


def _absorb(traced: fx.GraphModule, pair: Pair) -> None:
    first, second = layer_at(traced, pair.first), layer_at(traced, pair.second)
    statistics = getattr(first, "output_statistics", None)
    pads = any(p != 0 for p in getattr(second, "padding", (0,))) if not isinstance(second, nn.Linear) else False
    if not pair.relu or statistics is None or pads or first.bias is None or second.bias is None:
        return
    mean, std = statistics
    shift = (mean - 3 * std).clamp_min(0)
    by_input = _by_input(second.weight, first.weight.shape[0], pair.flat)
    groups, _, per_group, _ = by_input.shape
    carried = (by_input.sum(3) * shift.view(groups, 1, per_group)).sum(2).flatten()
    first.bias.sub_(shift)
    second.bias.add_(carried)
    first.output_statistics = (mean - shift, std)


class Equalize(Trick):
    """Callback of ``equalize``."""

    after = ("fold_batchnorm",)

    def __init__(self, iterations: int = 20, absorb_bias: bool = True, uncap: bool = False) -> None:
        super().__init__()
        self.iterations, self.absorb_bias, self.uncap = iterations, absorb_bias, uncap

    def apply(self, work: Workbench) -> None:
        equalize(work.network, iterations=self.iterations, absorb_bias=self.absorb_bias, uncap=self.uncap)
