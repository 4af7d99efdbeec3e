"""Cross-layer equalization, with bias absorption.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv 1906.04721), sections
4.1.1 to 4.1.3: channel ``i`` between two layers is scaled by ``1 / s_i`` and back by ``s_i`` with
``s_i = sqrt(r1_i * r2_i) / r2_i``, where ``r1``, ``r2`` are the channel's largest absolute weights in either layer; then
``c = max(0, beta - 3 * gamma)`` of a ReLU's input moves into the next layer's bias.

Where this differs: scaling passes through whatever is positively homogeneous (ReLU, max and average pools, flatten), so
through ReLU but not through ReLU6, unless ``uncap`` says that ReLU6 may become ReLU; biases are absorbed only where the next
layer does not pad, since at a padded border the shift would not cancel. With images, a channel between a ReLU6 and a depthwise
conv is scaled up as far as the largest value seen stays below the cap: the activation's grid is used in full, and the depthwise
conv's scale a channel takes it back at no cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.spec import uncap as uncap_nodes
from qat_tricks.graph.trace import layer_at
from qat_tricks.progress import track
from qat_tricks.trick import Trick
from qat_tricks.workbench import Workbench


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing but channel-wise homogeneous operations between them."""

    first: str
    second: str
    relu: bool
    flat: int  # how many of the second layer's inputs stem from one channel of the first (flatten before a linear)


def equalize(
    traced: fx.GraphModule,
    batches: Sequence[Tensor] = (),
    *,
    iterations: int = 20,
    absorb_bias: bool = True,
    uncap: bool = False,
) -> list[Pair]:
    """Equalizes all pairs of ``traced`` in place and returns them; the network's function stays the same.

    Args:
        traced: a traced network without quantizers, BatchNorm folded.
        batches: images ``[N, C, H, W]`` each, that show how far below a ReLU6's cap channels stay; none leaves those alone.
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
        _fill_caps(traced, batches)
    return pairs


CAP = 6.0
HEADROOM = 1.02  # images to come may reach a little higher than those seen


def _fill_caps(traced: fx.GraphModule, batches: Sequence[Tensor]) -> None:
    """Scales channels between a layer's ReLU6 and a depthwise conv up to the cap, by the largest values in ``batches``."""
    capped = {}
    for node in traced.graph.nodes:
        layer, depthwise = node.all_input_nodes[0] if node.all_input_nodes else node, _depthwise_after(node, traced)
        if n.activation_of(node, traced) == "relu6" and n.calls_layer(layer, traced) and len(layer.users) == 1 and depthwise:
            capped[node] = (str(layer.target), depthwise)
    if not capped or not batches:
        return
    largest = _channel_maxima(traced, set(capped), batches)
    for node, (first_name, second_name) in capped.items():
        first, second = layer_at(traced, first_name), layer_at(traced, second_name)
        scale = (CAP / HEADROOM / largest[node].clamp_min(1e-6)).clamp(1.0, 64.0)
        first.weight.mul_(scale.view(-1, *[1] * (first.weight.dim() - 1)))
        first.bias.mul_(scale)
        second.weight.div_(scale.view(-1, *[1] * (second.weight.dim() - 1)))


def _depthwise_after(node: fx.Node, traced: fx.GraphModule) -> str | None:
    """The depthwise conv that alone uses ``node``, if need be after a pad; each input channel makes one output channel."""
    user = n.only_user(node, lambda user: True)
    if user is not None and user.target is nn.functional.pad and n.is_passthrough(user, traced):
        user = n.only_user(user, lambda user: True)
    if user is None or not n.calls_layer(user, traced):
        return None
    second = layer_at(traced, str(user.target))
    is_depthwise = getattr(second, "groups", 1) == second.weight.shape[0] > 1
    called_once = sum(other.target == user.target for other in traced.graph.nodes) == 1
    return str(user.target) if is_depthwise and called_once else None


def _channel_maxima(traced: fx.GraphModule, wanted: set[fx.Node], batches: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    """The largest value of each channel of the ``wanted`` nodes, ``[C]``, over all images."""
    largest: dict[fx.Node, Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            output = super().run_node(n)
            if n in wanted:
                seen = output.transpose(0, 1).flatten(1).amax(1)
                largest[n] = torch.maximum(largest.get(n, seen), seen)
            return output

    was_training = traced.training
    traced.eval()
    for batch in track(batches, "equalize"):
        Watch(traced).run(batch)
    traced.train(was_training)
    return largest


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

    def __init__(
        self, iterations: int = 20, absorb_bias: bool = True, uncap: bool = False, num_images: int = 128
    ) -> None:
        super().__init__()
        if num_images < 0:
            raise QatTricksError(f"num_images={num_images} is not allowed: give 0 (leave ReLU6 alone) or more")
        self.settings: dict[str, Any] = {"iterations": iterations, "absorb_bias": absorb_bias, "uncap": uncap}
        self.num_images = num_images

    def apply(self, work: Workbench) -> None:
        has_caps = any(n.activation_of(node, work.network) == "relu6" for node in work.network.graph.nodes)
        batches = work.batches(self.num_images) if has_caps and self.num_images else []
        equalize(work.network, batches, **self.settings)
