"""Cuts a quantized network into blocks, each with one output, by the structure of its graph.

The tensors on grids that are batches of images are the places where the graph may be cut. What
computes one of them from others is a *cell*: mostly one conv or linear with what follows it. Where
a single tensor carries everything that the rest of the network needs, as between residual blocks,
the graph falls into *units*. Units are joined to blocks:

- a unit of several layers, such as a residual block, is a block;
- one whose branches end in a concat also takes in a single layer before it, as in SqueezeNet;
- single layers in a row become blocks of two, or of three where the second works on each channel by
  itself, such as the parts of an inverted residual without a shortcut;
- a unit of very many layers, such as a stage of DenseNet, becomes a block a cell.

``mrecg`` joins neighbouring blocks whose capacities differ most: Ma et al. 2023, "Solving
Oscillation Problem in Post-Training Quantization Through a Theoretical Perspective" (arXiv
2303.11906), section 3.3. Reconstruction leaves more error in a block of little capacity, and the
loss of the blocks behind it oscillates.

Where this differs: capacities are compared by their ratio, which needs no unit, and a block joined
once is not joined again.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import nodes as n
from qat_tricks.graph.layers import Layer
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.two_modes import EVALUATION, graph_in

GRANULARITIES = ("block", "layer", "mrecg")
MOST_LAYERS = 12  # of a unit that is reconstructed as a whole
OF_A_CHAIN = 2  # layers of a block of single layers, the last of them mixing channels
OF_A_STRIDE = 1.6  # the paper's factor
JOINED_SHARE = 0.25  # of the neighbouring blocks, those that ``mrecg`` joins


@dataclass(frozen=True, eq=False)
class Block:
    """A part of a network that computes one tensor from others.

    Attributes:
        nodes: what is computed, in order.
        inputs: nodes outside whose values are needed.
        output: the last of ``nodes``.
        layers: those of ``nodes`` that call a layer with a quantized weight.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    layers: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """For people: the first and last layer, or the output."""
        names = [str(node.target) for node in self.layers] or [self.output.name]
        return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


class Cells:
    """A network in evaluation, cut at tensors.

    Args:
        network: a traced network.
        cuts: names of nodes at which it is cut; its output is one more.

    Attributes:
        graph: what the network computes in evaluation.
        inputs: nodes of the network's inputs.
        outputs: the nodes at which it is cut, in order; its output is the last.
    """

    def __init__(self, network: fx.GraphModule, cuts: Collection[str]) -> None:
        self.network = network
        self.graph = graph_in(network.graph, EVALUATION)
        nodes = list(self.graph.nodes)
        self._place = {node: index for index, node in enumerate(nodes)}
        self._cuts = {node for node in nodes if node.name in cuts or node.op == "output"}
        self._cuts.update(filter(_is_input, nodes))
        self.inputs = [node for node in nodes if _is_input(node)]
        self.outputs = [node for node in nodes if self.is_cut(node)]
        self._by_name = {node.name: node for node in nodes}
        self._uses = {
            node.name: [self._by_name[user.name] for user in users if user.name in self._by_name]
            for node, users in n.uses_of_weights(network).items()
        }

    def node(self, name: str) -> fx.Node:
        """The node called ``name``.

        Raises:
            QatTricksError: there is none.
        """
        if name not in self._by_name:
            raise QatTricksError(
                f'the float reference has no "{name}": give the network that was quantized'
            )
        return self._by_name[name]

    def uses(self, node: fx.Node) -> Sequence[fx.Node]:
        """All nodes that use the weight of the layer that ``node`` calls."""
        return self._uses[node.name]

    def between(self, outputs: Iterable[fx.Node]) -> Block:
        """The block that computes the last of ``outputs``, and the others where it needs them."""
        outputs = list(outputs)
        inside, needed = set(outputs), set[fx.Node]()
        found, left = set[fx.Node](), list(outputs)
        while left:  # not recursive: deep networks would exceed Python's limit
            node = left.pop()
            if node in found:
                continue
            if _is_input(node) or (node in self._cuts and node not in inside):
                needed.add(node)
                continue
            found.add(node)
            left += node.all_input_nodes
        ordered = sorted(found, key=self._place.__getitem__)
        return Block(
            nodes=tuple(ordered),
            inputs=tuple(sorted(needed, key=self._place.__getitem__)),
            output=max(outputs, key=self._place.__getitem__),
            layers=tuple(node for node in ordered if self._is_quantized(node)),
        )

    def is_cut(self, node: fx.Node) -> bool:
        """Whether ``node`` is the output of a cell."""
        return node in self._cuts and not _is_input(node)

    def _is_quantized(self, node: fx.Node) -> bool:
        layer = module_of(node, self.network)
        return isinstance(layer, Layer) and layer.weight_quantizer is not None

    def units(self) -> list[list[fx.Node]]:
        """The cells' outputs in runs, each of which ends where one tensor carries everything."""
        last_use: dict[fx.Node, int] = {}
        for place, output in enumerate(self.outputs):
            for node in self.between([output]).inputs:
                last_use[node] = place
        units, current = [], list[fx.Node]()
        live = set(self.inputs)
        for place, output in enumerate(self.outputs):
            current.append(output)
            live.add(output)
            live = {node for node in live if last_use.get(node, -1) > place}
            if live <= {output}:
                units.append(current)
                current = []
        return units


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and n.is_tensor(node)


def find_blocks(cells: Cells, granularity: str = "block") -> list[Block]:
    """The blocks of a network in the order in which they are computed; together they are all of it.

    Args:
        cells: the network, cut at its grids.
        granularity: one of ``GRANULARITIES``.
    """
    if granularity == "layer":
        return [cells.between([output]) for output in cells.outputs]
    blocks = []
    for outputs in _groups(cells):
        whole = cells.between(outputs)
        is_large = len(whole.layers) > MOST_LAYERS
        blocks += [cells.between([output]) for output in outputs] if is_large else [whole]
    return _joined(blocks, cells) if granularity == "mrecg" else blocks


def _groups(cells: Cells) -> list[list[fx.Node]]:
    """The outputs of the cells of each block."""
    units = cells.units()
    wholes = [cells.between(unit) for unit in units]
    groups, current = [], list[int]()

    def close() -> None:
        if current:
            groups.append([output for unit in current for output in units[unit]])
        current.clear()

    def layers_in_current() -> list[fx.Node]:
        return [layer for unit in current for layer in wholes[unit].layers]

    for place, whole in enumerate(wholes):
        if len(whole.layers) > 1:
            if not _is_fork(whole, cells):
                close()
            current.append(place)
            close()
            continue
        # The layer directly before a fork belongs to it, and not to those before.
        if place + 1 < len(wholes) and _is_fork(wholes[place + 1], cells) and layers_in_current():
            close()
        current.append(place)
        chain = layers_in_current()
        if len(chain) >= OF_A_CHAIN and _mixes_channels(chain[-1], cells):
            close()
    close()
    return groups


def _is_fork(block: Block, cells: Cells) -> bool:
    """Whether the branches of a unit end in a concat."""
    return len(block.layers) > 1 and any(n.is_cat(node, cells.network) for node in block.nodes)


def _mixes_channels(node: fx.Node, cells: Cells) -> bool:
    layer: Any = module_of(node, cells.network)
    return getattr(layer, "groups", 1) < layer.weight.shape[layer.channel_axis]


def _joined(blocks: Sequence[Block], cells: Cells) -> list[Block]:
    """Joins those neighbouring blocks whose capacities differ most."""
    capacities = [_capacity(block, cells) for block in blocks]
    gaps = {
        place: abs(math.log(after / before))
        for place, (before, after) in enumerate(pairwise(capacities))
        if before > 0 and after > 0
    }
    joined: set[int] = set()
    # The widest gap first, of equal ones the earlier.
    for place in sorted(gaps, key=lambda place: (-gaps[place], place)):
        is_free = joined.isdisjoint((place - 1, place + 1))
        small = len(blocks[place].layers) + len(blocks[place + 1].layers) <= MOST_LAYERS
        if is_free and small and len(joined) < JOINED_SHARE * len(blocks):
            joined.add(place)
    result, place = [], 0
    while place < len(blocks):
        both = blocks[place : place + 2] if place in joined else blocks[place : place + 1]
        outputs = [node for block in both for node in block.nodes if cells.is_cut(node)]
        result.append(cells.between(outputs) if place in joined else both[0])
        place += len(both)
    return result


def _capacity(block: Block, cells: Cells) -> float:
    """The bits of a block's weights; those of a conv with stride count ``OF_A_STRIDE`` times."""
    capacity = 0.0
    for node in block.layers:
        layer: Any = module_of(node, cells.network)
        strides = max(getattr(layer, "stride", (1,))) > 1
        bits = layer.weight.numel() * layer.weight_quantizer.scheme.bits
        capacity += bits * (OF_A_STRIDE if strides else 1)
    return capacity
