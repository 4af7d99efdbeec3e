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
ReLU; ``channel_axis`` follows the channels on their way. Biases are absorbed only where the next
layer does not pad, since at a padded border the shift would not cancel, and not through dropout,
whose zeros it would not reach; with images, only as far as no value of them lies below the shift.
With images, a channel between a ReLU6 and a depthwise conv is scaled up towards
the cap, as far as its largest values leave room: the activation's grid is used in full, and the
depthwise conv's scale a channel takes it back at no cost. Only that can change the function, for
images unlike those seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.channels import ChannelAxis, channel_axis
from qat_tricks.graph.inputs import Inputs, as_tensors
from qat_tricks.graph.layers import Equalized
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.spec import spec_of
from qat_tricks.graph.submodules import layer_at
from qat_tricks.graph.surgery import uncap as uncap_nodes
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
    source: str  # the node that calls the first layer
    between: str  # the node whose channels are scaled
    axis: int  # of the channels there
    drops: bool  # whether dropout is one of these operations

    def __str__(self) -> str:
        return f"{self.first} → {self.second}"


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
    pairs = find_pairs(traced)
    # Measured once: each step below scales the maxima along with the channels.
    ranges = channel_ranges(traced, batches)
    scale_pairs(traced, pairs, ranges, iterations)
    # After the scaling, which changes means and standard deviations.
    if absorb_bias:
        absorb_biases(traced, pairs, ranges)
    fill_caps(traced, ranges)
    return pairs


@dataclass
class Ranges:
    """The ranges of the channels between layers; empty without images.

    Attributes:
        largest: the largest absolute value of each image and channel, ``[images, C]``, by the name
            of the node between two layers.
        smallest: the smallest value of each channel, ``[C]``, by the name of the node of the first
            layer.
    """

    largest: dict[str, Tensor] = field(default_factory=dict)
    smallest: dict[str, Tensor] = field(default_factory=dict)

    def copy(self) -> "Ranges":
        """A copy that a step may scale along."""
        return Ranges(dict(self.largest), dict(self.smallest))


@torch.no_grad()
def scale_pairs(
    traced: fx.GraphModule, pairs: Sequence[Pair], ranges: Ranges, iterations: int
) -> None:
    """Scales the channels between the layers of ``pairs``, and ``ranges`` along with them."""
    # A layer belongs to two pairs, so a change of one unsettles the other.
    for _ in range(iterations):
        changes = [_equalize_pair(traced, pair, ranges.largest, ranges.smallest) for pair in pairs]
        if max(changes, default=0.0) < 1e-3:
            break


@torch.no_grad()
def absorb_biases(traced: fx.GraphModule, pairs: Sequence[Pair], ranges: Ranges) -> None:
    """Moves large biases before a ReLU into the next layer."""
    for pair in pairs:
        _absorb(traced, pair, ranges.smallest.get(pair.source))


@torch.no_grad()
def fill_caps(traced: fx.GraphModule, ranges: Ranges) -> bool:
    """Scales channels between a ReLU6 and a depthwise conv up to the cap; needs images.

    Returns:
        Whether there were such channels.
    """
    capped = [pair for pair in _capped(traced) if pair.between in ranges.largest]
    for pair in capped:
        _fill_cap(traced, pair, ranges.largest[pair.between])
    return bool(capped)


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
        if not n.calls_layer(layer, traced):
            continue
        depthwise = _depthwise_after(node, layer_at(traced, str(layer.target)), traced, uses)
        if depthwise is not None and n.is_used_once(layer, uses) and len(layer.users) == 1:
            pairs.append(
                Pair(
                    first=str(layer.target),
                    second=depthwise,
                    relu=True,
                    flat=1,
                    source=layer.name,
                    between=node.name,
                    axis=1,
                    drops=False,
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
    _note(first, outputs=scale)
    _note(second, inputs=_per_output(1 / scale, second.weight).expand_as(second.weight))


def _note(layer: Any, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
    """Notes by what the channels of ``layer`` were multiplied, for a training that undoes it."""
    before = getattr(layer, "equalized", None)
    if before is None:
        ones = torch.ones_like(layer.weight)
        before = Equalized(inputs=ones, outputs=ones.flatten(1)[:, 0])
    layer.equalized = Equalized(
        inputs=before.inputs if inputs is None else before.inputs * inputs,
        outputs=before.outputs if outputs is None else before.outputs * outputs,
    )


def _per_output(values: Tensor, weight: Tensor) -> Tensor:
    """``values``, one for each output channel of ``weight``, in a shape that broadcasts to it."""
    return values.view(-1, *[1] * (weight.dim() - 1))


def _depthwise_after(node: fx.Node, first: Any, traced: fx.GraphModule, uses: n.Uses) -> str | None:
    """The depthwise conv that is the only reader of ``node``, if need be behind a pad.

    Each of its input channels is one of ``first`` and makes one output channel.
    """
    user = n.only_user(node, lambda user: True)
    if user is not None and user.op == "call_function" and n.pads_with_zeros(user, traced):
        user = n.only_user(user, lambda user: True)
    if user is None or not n.calls_layer(user, traced) or not n.is_used_once(user, uses):
        return None
    second = layer_at(traced, str(user.target))
    channels = len(second.weight)
    is_depthwise = getattr(second, "groups", 1) == channels > 1 and second.weight.shape[1] == 1
    # A linear has its channels last, where a conv takes none; and a pad may have added channels.
    follows = channel_axis(first).is_input_of(second, 1) and len(first.weight) == channels
    return str(user.target) if is_depthwise and follows else None


@torch.no_grad()
def channel_ranges(traced: fx.GraphModule, batches: Sequence[Inputs]) -> Ranges:
    """The ranges of the channels between the layers of all pairs; none without ``batches``."""
    pairs = [*find_pairs(traced), *_capped(traced)]
    channels = {pair.between: len(layer_at(traced, pair.first).weight) for pair in pairs}
    axes = {pair.between: pair.axis for pair in pairs}
    sources = {pair.source: layer_at(traced, pair.first) for pair in pairs if pair.relu}
    largest: dict[str, list[Tensor]] = {}
    smallest: dict[str, Tensor] = {}

    class Watch(EvaluationInterpreter):
        def run_node(self, n: fx.Node) -> Any:
            output = super().run_node(n)
            if n.name in axes:
                # Channels to dimension 1; all else but images are positions.
                values = output.abs().movedim(axes[n.name], 1)
                largest.setdefault(n.name, []).append(
                    values.reshape(len(values), channels[n.name], -1).amax(2)
                )
            if n.name in sources:
                axis = -1 if isinstance(sources[n.name], nn.Linear) else 1
                least = output.movedim(axis, 0).flatten(1).amin(1)
                smallest[n.name] = torch.minimum(least, smallest.get(n.name, least))
            return output

    with evaluating(traced):
        for batch in track(batches if pairs else [], "equalize"):
            Watch(traced).run(*as_tensors(batch))
    return Ranges({name: torch.cat(parts) for name, parts in largest.items()}, smallest)


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
    relu, drops, between, after = False, False, node, node
    first = layer_at(traced, str(node.target))
    axis: ChannelAxis | None = channel_axis(first)
    axis_between = axis
    # Down the graph, as long as one operation reads each tensor and leaves channels apart.
    while len(after.users) == 1 and axis is not None:
        (after,) = after.users
        if n.activation_of(after, traced) == "relu":
            relu, between, axis_between = True, after, axis
        elif n.operation_of(after, traced).is_homogeneous:
            axis = axis.behind(after, traced)
            drops = drops or n.is_dropout(after, traced)
        else:
            break
    if axis is None or axis_between is None or after is node:
        return None
    if not n.calls_layer(after, traced) or not n.is_used_once(after, uses):
        return None
    second = layer_at(traced, str(after.target))
    channels, inputs = first.weight.shape[0], second.weight.shape[1] * getattr(second, "groups", 1)
    flat, rest = divmod(inputs, channels)
    if rest or not axis.is_input_of(second, flat):
        return None
    return Pair(
        first=str(node.target),
        second=str(after.target),
        relu=relu,
        flat=flat,
        source=node.name,
        between=between.name,
        axis=axis_between.index,
        drops=drops,
    )


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


def _equalize_pair(
    traced: fx.GraphModule, pair: Pair, largest: dict[str, Tensor], smallest: dict[str, Tensor]
) -> float:
    """Equalizes one pair and returns the largest relative change.

    Args:
        traced: the network, changed in place.
        pair: the two layers.
        largest: the values between the layers, see ``_channel_ranges``; those of this pair are
            scaled along.
        smallest: the smallest values of the first layer, likewise.
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
        r1 = seen.amax(0) / seen.max().clamp_min(1e-30)
        per_output = by_input.abs().amax((2, 3), keepdim=True).clamp_min(1e-30)
        r2 = (by_input.abs() / per_output).amax((1, 3)).flatten()
    # s = r1 / sqrt(r1 * r2): both ranges become sqrt(r1 * r2). Channels that one side does not use
    # stay as they are.
    is_used = (r1 > 0) & (r2 > 0)
    scale = torch.where(is_used, (r1 / r2.clamp_min(1e-12)).sqrt(), 1.0).clamp(1e-4, 1e4)
    first.weight.div_(_per_output(scale, first.weight))
    if first.bias is not None:
        first.bias.div_(scale)
    # ``by_input`` is a view, so this scales the second layer's weight.
    of_inputs = scale.view(by_input.shape[0], 1, by_input.shape[2], 1)
    by_input.mul_(of_inputs)
    _note(first, outputs=1 / scale)
    _note(second, inputs=of_inputs.expand_as(by_input).reshape_as(second.weight))
    if seen is not None:
        # The channel between was divided by the scale.
        largest[pair.between] = seen / scale
    if pair.source in smallest:
        smallest[pair.source] = smallest[pair.source] / scale
    statistics = getattr(first, "output_statistics", None)
    if statistics is not None:
        first.output_statistics = (statistics[0] / scale, statistics[1] / scale)
    return float((scale - 1).abs().max())


def _absorb(traced: fx.GraphModule, pair: Pair, smallest: Tensor | None) -> None:
    """Moves ``max(0, mean - 3 * std)`` of the first layer's output into the second layer's bias.

    Args:
        traced: the network, changed in place.
        pair: the two layers.
        smallest: the smallest value of each channel of the first layer's output, ``[C]``, if images
            have shown it: no more than that is moved.
    """
    first, second = layer_at(traced, pair.first), layer_at(traced, pair.second)
    statistics = getattr(first, "output_statistics", None)
    has_biases = first.bias is not None and second.bias is not None
    if not pair.relu or pair.drops or statistics is None or not has_biases or _pads(second):
        return
    mean, std = statistics
    # Nearly no value of the ReLU's input lies below it: the ReLU passes the shift on.
    shift = mean - 3 * std
    if smallest is not None:
        shift = torch.minimum(shift, smallest)
    shift = shift.clamp_min(0)
    by_input = _by_input(second.weight, first.weight.shape[0], pair.flat)
    groups, _, per_group, _ = by_input.shape
    carried = (by_input.sum(3) * shift.view(groups, 1, per_group)).sum(2).flatten()
    first.bias.sub_(shift)
    second.bias.add_(carried)
    first.output_statistics = (mean - shift, std)


def _pads(layer: Any) -> bool:
    """Whether a layer takes zeros at the border, where a shift of its input would not cancel."""
    # A padding given as "same" or "valid" counts as one that is not 0.
    return not isinstance(layer, nn.Linear) and any(padding != 0 for padding in layer.padding)


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
        # Without ReLU6 the graph is another one, which is not put back; and it was asked for.
        self.judged = not uncap
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
        if self.settings["uncap"]:
            uncap_all(work.network)
            work.note_change("uncapped")
        measured = channel_ranges(work.network, batches)
        ranges = measured.copy()
        pairs = {str(pair): pair for pair in find_pairs(work.network)}

        def scale(traced: fx.GraphModule, skip: Sequence[str]) -> list[str]:
            nonlocal ranges
            ranges = measured.copy()
            names = [name for name in pairs if name not in skip]
            scale_pairs(
                traced, [pairs[name] for name in names], ranges, self.settings["iterations"]
            )
            return names

        def absorb(traced: fx.GraphModule, skip: Sequence[str]) -> list[str]:
            names = [name for name in pairs if name not in skip]
            absorb_biases(traced, [pairs[name] for name in names], ranges)
            return names

        if pairs:
            work.keep_function("equalized", scale)
        if pairs and self.settings["absorb_bias"]:
            work.keep_function("biases absorbed", absorb)
        if fill_caps(work.network, ranges):
            work.note_change("caps filled")
