"""Cross-layer equalization, with bias absorption.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv
1906.04721), sections 4.1.1 to 4.1.3: channel ``i`` between two layers is scaled by ``1 / s_i`` and
back by ``s_i`` with ``s_i = sqrt(r1_i * r2_i) / r2_i``, where ``r1``, ``r2`` are the channel's
largest absolute weights in either layer; then ``c = max(0, beta - 3 * gamma)`` of a ReLU's input
moves into the next layer's bias.

Where this differs: with images, ``r1`` is the largest value of the channel between the layers, not
the largest weight that makes it, and ``r2`` is relative to the largest weight of each output
channel: weights have a scale an output channel, which takes up any factor, while an activation has
one for all of its channels (as in Xiao et al. 2023, "SmoothQuant", arXiv 2211.10438, equation 4,
with alpha 1/2). Scaling passes through whatever is positively homogeneous (ReLU, max and average
pools, flatten), so through ReLU but not through ReLU6, unless ``uncap`` says that ReLU6 may become
ReLU; biases are absorbed only where the next layer does not pad, since at a padded border the shift
would not cancel. With images, a channel between a ReLU6 and a depthwise conv is scaled up towards
the cap, as far as its largest values leave room: the activation's grid is used in full, and the
depthwise conv's scale a channel takes it back at no cost. Only that can change the function, for
images unlike those seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.inputs import Inputs, as_tensors
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.surgery import uncap as uncap_nodes
from qat_tricks.graph.trace import layer_at
from qat_tricks.graph.two_modes import EvaluationInterpreter
from qat_tricks.graph.workbench import Workbench
from qat_tricks.progress import track
from qat_tricks.trainer.trick import Trick

CAP = 6.0  # of a ReLU6
SPLITS = 8  # parts of the images whose maxima are compared
# Headroom above the largest value of all, in units of (that value - mean of the parts' maxima).
TAIL = 6


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two layers with nothing but channel-wise homogeneous operations between them."""

    first: str
    second: str
    relu: bool  # whether a ReLU, or ReLU6, is one of these operations
    # How many inputs of the second layer come from one channel of the first: more than one where
    # positions are flattened before a linear.
    flat: int
    between: str  # the node whose channels are scaled


def equalize(
    traced: fx.GraphModule,
    batches: Sequence[Inputs] = (),
    *,
    iterations: int = 20,
    absorb_bias: bool = True,
    uncap: bool = False,
) -> list[Pair]:
    """Equalizes all pairs of ``traced`` in place and returns them.

    The network's function stays the same, except where values exceed a cap.

    Args:
        traced: a traced network without quantizers, BatchNorm folded.
        batches: the network's inputs, that show the ranges of channels; without any, only weights
            decide, and channels before a ReLU6 stay as they are.
        iterations: how often to sweep over the pairs; chains converge geometrically.
        absorb_bias: also move large biases before a ReLU into the next layer.
        uncap: let ReLU6 become ReLU, so that the pairs around it can be equalized; this changes the
            function.

    Raises:
        QatTricksError: iterations below 1.
    """
    if iterations < 1:
        raise QatTricksError(f"iterations={iterations} is not allowed: give 1 or more")
    if uncap:
        uncap_all(traced)
    pairs, capped = find_pairs(traced), _capped(traced)
    with torch.no_grad():
        # Measured once: each step below scales the maxima along with the channels.
        largest = _channel_maxima(traced, [*pairs, *capped], batches)
        # A layer belongs to two pairs, so a change of one unsettles the other.
        for _ in range(iterations):
            change = max((_equalize_pair(traced, pair, largest) for pair in pairs), default=0.0)
            if change < 1e-3:
                break
        # After the scaling, which changes means and standard deviations.
        if absorb_bias:
            for pair in pairs:
                _absorb(traced, pair)
        if batches:
            for pair in capped:
                _fill_cap(traced, pair, largest[pair.between])
    return pairs


def uncap_all(traced: fx.GraphModule) -> None:
    """Lets every ReLU6 of ``traced`` become a ReLU, and records it in the spec."""
    names = [node.name for node in traced.graph.nodes if n.activation_of(node, traced) == "relu6"]
    uncap_nodes(traced, names)
    spec_of(traced).setdefault("uncapped", []).extend(names)


def _capped(traced: fx.GraphModule) -> list[Pair]:
    """The pairs of a layer with a ReLU6 and the depthwise conv after it."""
    uses = n.uses_of_weights(traced)
    pairs = []
    for node in traced.graph.nodes:
        if n.activation_of(node, traced) != "relu6":
            continue
        layer = node.all_input_nodes[0]
        depthwise = _depthwise_after(node, traced, uses)
        if depthwise is not None and n.calls_layer(layer, traced) and len(layer.users) == 1:
            pairs.append(
                Pair(
                    first=str(layer.target),
                    second=depthwise,
                    relu=True,
                    flat=1,
                    between=node.name,
                )
            )
    return pairs


def _fill_cap(traced: fx.GraphModule, pair: Pair, largest: Tensor) -> None:
    """Scales channels between a layer's ReLU6 and a depthwise conv up to the cap.

    Later values above the cap are lost. So a channel that only some images excite gets headroom:
    the more, the more the maxima of parts of the images differ.

    Args:
        traced: the network, changed in place.
        pair: the two layers.
        largest: the largest value of each image and channel between them, ``[images, C]``.
    """
    first, second = layer_at(traced, pair.first), layer_at(traced, pair.second)
    parts = torch.stack([part.amax(0) for part in largest.chunk(SPLITS)])
    most = parts.amax(0)
    reach = most + TAIL * (most - parts.mean(0))
    # Never down, which would use less of the grid; and not without bounds.
    scale = (CAP / reach.clamp_min(1e-6)).clamp(1.0, 64.0)
    first.weight.mul_(_per_output(scale, first.weight))
    if first.bias is not None:
        first.bias.mul_(scale)
    # A depthwise conv makes one output of each input, so the scale of an input is an output's.
    second.weight.div_(_per_output(scale, second.weight))


def _per_output(values: Tensor, weight: Tensor) -> Tensor:
    """``values``, one for each output channel of ``weight``, in a shape that broadcasts to it."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def _depthwise_after(node: fx.Node, traced: fx.GraphModule, uses: n.Uses) -> str | None:
    """The depthwise conv that is the only reader of ``node``, if need be behind a pad.

    Each of its input channels makes one output channel.
    """
    user = n.only_user(node, lambda user: True)
    if user is not None and user.op == "call_function" and n.pads_with_zeros(user, traced):
        user = n.only_user(user, lambda user: True)
    if user is None or not n.calls_layer(user, traced):
        return None
    second = layer_at(traced, str(user.target))
    is_depthwise = getattr(second, "groups", 1) == second.weight.shape[0] > 1
    return str(user.target) if is_depthwise and n.is_used_once(user, uses) else None


def _channel_maxima(
    traced: fx.GraphModule, pairs: Sequence[Pair], batches: Sequence[Inputs]
) -> dict[str, Tensor]:
    """The largest absolute value of each image and channel between the layers of ``pairs``.

    Returns:
        ``[images, C]`` by the name of the node between; nothing without ``batches``.
    """
    # Behind a linear, channels come last.
    last = {pair.between: isinstance(layer_at(traced, pair.first), nn.Linear) for pair in pairs}
    largest: dict[str, list[Tensor]] = {}

    class Watch(EvaluationInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            output = super().run_node(n)
            if n.name in last:
                # Channels to dimension 1; all behind it are positions.
                values = output.abs().movedim(-1 if last[n.name] else 1, 1)
                largest.setdefault(n.name, []).append(
                    values.flatten(2).amax(2) if values.dim() > 2 else values
                )
            return output

    with evaluating(traced):
        for batch in track(batches if pairs else [], "equalize"):
            Watch(traced).run(*as_tensors(batch))
    return {name: torch.cat(parts) for name, parts in largest.items()}


def find_pairs(traced: fx.GraphModule) -> list[Pair]:
    """The pairs that can be equalized, in the order of the graph."""
    uses, from_images = n.uses_of_weights(traced), n.nodes_from_images(traced)
    pairs = []
    for node in traced.graph.nodes:
        if node in from_images and n.calls_layer(node, traced) and n.is_used_once(node, uses):
            pair = _pair_from(node, traced, uses)
            if pair is not None:
                pairs.append(pair)
    return pairs


def _pair_from(node: fx.Node, traced: fx.GraphModule, uses: n.Uses) -> Pair | None:
    """The pair that begins with the layer that ``node`` calls, or None."""
    # The maxima are read behind the last ReLU, which is where the quantizer will be.
    relu, between, after = False, node, node
    # Down the graph, as long as one operation reads each tensor and leaves channels apart.
    while len(after.users) == 1:
        (after,) = after.users
        if n.activation_of(after, traced) == "relu":
            relu, between = True, after
        elif not _is_channelwise(after, traced):
            break
    if after is node or not n.calls_layer(after, traced) or not n.is_used_once(after, uses):
        return None
    first, second = layer_at(traced, str(node.target)), layer_at(traced, str(after.target))
    channels, inputs = first.weight.shape[0], second.weight.shape[1] * getattr(second, "groups", 1)
    # Flattened behind a conv, the values of a channel lie side by side; behind a linear they do
    # not.
    is_flattened = isinstance(second, nn.Linear) and not isinstance(first, nn.Linear)
    if inputs % channels != 0 or (inputs != channels and not is_flattened):
        return None
    return Pair(
        first=str(node.target),
        second=str(after.target),
        relu=relu,
        flat=inputs // channels,
        between=between.name,
    )


def _is_channelwise(node: fx.Node, traced: fx.GraphModule) -> bool:
    return n.operation_of(node, traced).is_homogeneous


def _by_input(weight: Tensor, channels: int, flat: int) -> Tensor:
    """A view of the second layer's weight by input channel.

    Args:
        weight: of the second layer.
        channels: output channels of the first layer.
        flat: see ``Pair``.

    Returns:
        ``[groups, out / groups, in / groups, flat * kernel]``.
    """
    groups = channels * flat // weight.shape[1]
    return weight.view(groups, weight.shape[0] // groups, channels // groups, -1)


def _equalize_pair(traced: fx.GraphModule, pair: Pair, largest: dict[str, Tensor]) -> float:
    """Equalizes one pair and returns the largest relative change.

    Args:
        traced: the network, changed in place.
        pair: the two layers.
        largest: the values between the layers, see ``_channel_maxima``; those of this pair are
            scaled along.
    """
    first, second = layer_at(traced, pair.first), layer_at(traced, pair.second)
    channels = first.weight.shape[0]
    by_input = _by_input(second.weight, channels, pair.flat)
    seen = largest.get(pair.between)
    if seen is None:
        r1 = first.weight.abs().flatten(1).amax(1)
        r2 = by_input.abs().amax((1, 3)).flatten()
    else:
        # The share of the tensor's range that each channel uses, and of each output channel's.
        r1 = seen.amax(0) / seen.max().clamp_min(1e-12)
        per_output = by_input.abs().amax((2, 3), keepdim=True).clamp_min(1e-12)
        r2 = (by_input.abs() / per_output).amax((1, 3)).flatten()
    # s = r1 / sqrt(r1 * r2): both ranges become sqrt(r1 * r2). Channels that one side does not use
    # stay as they are.
    is_used = (r1 > 0) & (r2 > 0)
    scale = torch.where(is_used, (r1 / r2.clamp_min(1e-12)).sqrt(), 1.0).clamp(1e-4, 1e4)
    first.weight.div_(_per_output(scale, first.weight))
    if first.bias is not None:
        first.bias.div_(scale)
    # ``by_input`` is a view, so this scales the second layer's weight.
    by_input.mul_(scale.view(by_input.shape[0], 1, by_input.shape[2], 1))
    if seen is not None:
        # The channel between was divided by the scale.
        largest[pair.between] = seen / scale
    statistics = getattr(first, "output_statistics", None)
    if statistics is not None:
        first.output_statistics = (statistics[0] / scale, statistics[1] / scale)
    return float((scale - 1).abs().max())


def _absorb(traced: fx.GraphModule, pair: Pair) -> None:
    """Moves ``max(0, mean - 3 * std)`` of the first layer's output into the second layer's bias."""
    first, second = layer_at(traced, pair.first), layer_at(traced, pair.second)
    statistics = getattr(first, "output_statistics", None)
    has_biases = first.bias is not None and second.bias is not None
    if not pair.relu or statistics is None or not has_biases or _pads(second):
        return
    mean, std = statistics
    # Nearly no value of the ReLU's input lies below it: the ReLU passes the shift on.
    shift = (mean - 3 * std).clamp_min(0)
    by_input = _by_input(second.weight, first.weight.shape[0], pair.flat)
    groups, _, per_group, _ = by_input.shape
    carried = (by_input.sum(3) * shift.view(groups, 1, per_group)).sum(2).flatten()
    first.bias.sub_(shift)
    second.bias.add_(carried)
    first.output_statistics = (mean - shift, std)


def _pads(layer: nn.Module) -> bool:
    """Whether a layer takes zeros at the border, where a shift of its input would not cancel."""
    return not isinstance(layer, nn.Linear) and any(
        padding != 0
        for padding in layer.padding  # type: ignore[union-attr]
    )


class Equalize(Trick):
    """Callback of ``equalize``; ``num_images=0`` lets only weights decide."""

    after = ("fold_batchnorm",)

    def __init__(
        self,
        iterations: int = 20,
        absorb_bias: bool = True,
        uncap: bool = False,
        num_images: int = 128,
    ) -> None:
        super().__init__()
        if num_images < 0:
            raise QatTricksError(
                f"num_images={num_images} is not allowed: give 0 (only weights decide) or more"
            )
        self.settings: dict[str, Any] = {
            "iterations": iterations,
            "absorb_bias": absorb_bias,
            "uncap": uncap,
        }
        self.num_images = num_images

    def restructure(self, work: Workbench) -> None:
        """Replaces ReLU6 where ``uncap`` asks for it: no other structure changes."""
        if self.settings["uncap"]:
            uncap_all(work.network)

    def apply(self, work: Workbench) -> None:
        """Equalizes the network on the first ``num_images`` training images."""
        batches = work.batches(self.num_images) if self.num_images else []
        equalize(work.network, batches, **self.settings)
