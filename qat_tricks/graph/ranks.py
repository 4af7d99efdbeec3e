"""The number of dimensions of a node's value, as far as the graph or a run shows it."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.graph import nodes as n
from qat_tricks.graph.inputs import Inputs, as_tensors, first_images
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.submodules import module_of
from qat_tricks.graph.two_modes import EvaluationInterpreter

# The key in a node's meta under which ``note_ranks`` says how many dimensions its value has.
RANK = "qat_tricks.rank"

# Modules whose output has a rank of their own, whatever comes in: that of a batch.
_FIXED: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.Conv1d, 3),
    (nn.Conv2d, 4),
    (nn.Conv3d, 5),
    (nn.ConvTranspose1d, 3),
    (nn.ConvTranspose2d, 4),
    (nn.ConvTranspose3d, 5),
    (nn.BatchNorm2d, 4),
    (nn.BatchNorm3d, 5),
)
# Operations, by their names in the table, that keep the number of dimensions.
_KEPT = {
    "avg_pool1d", "avg_pool2d", "padded_avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "max_pool1d", "max_pool2d", "adaptive_max_pool2d", "identity", "permute", "channel_shuffle",
    "pixel_shuffle", "pixel_unshuffle", "pad", "upsample", "cat", "layer_norm", "group_norm",
}  # fmt: skip


def rank_of(node: fx.Node, traced: fx.GraphModule) -> int | None:
    """How many dimensions the value of ``node`` has; None where the graph does not show it.

    What ``note_ranks`` noted counts first.
    """
    path = [node]
    while True:  # not recursive: deep networks would exceed Python's limit
        last = path[-1]
        rank = _own_rank(last, traced)
        if rank is not None or not _keeps_rank(last, traced):
            break
        path.append(last.all_input_nodes[0])
    for step in reversed(path[:-1]):
        rank = _rank_behind(step, rank, traced)
    return rank


@torch.no_grad()
def note_ranks(traced: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """Notes at each node of ``traced`` how many dimensions its value has.

    Args:
        traced: a traced network; it is run once, in evaluation mode.
        inputs: of two images or more.
    """
    with evaluating(traced):
        _Notes(traced).run(*as_tensors(first_images(inputs, 2)))
    return traced


class _Notes(EvaluationInterpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta[RANK] = result.dim()
        return result


def _own_rank(node: fx.Node, traced: fx.GraphModule) -> int | None:
    """The rank that does not depend on that of the input."""
    if RANK in node.meta:
        return int(node.meta[RANK])
    module = module_of(node, traced)
    for kind, rank in _FIXED:
        if isinstance(module, kind):
            return rank
    operation = n.operation_of(node, traced)
    if operation.name == "flatten":
        arguments = n.arguments_of(node, traced)
        ends = arguments.get("start_dim", 0), arguments.get("end_dim", -1)
        return {(0, -1): 1, (1, -1): 2, (2, -1): 3, (0, -2): 2}.get(ends)
    return None


def _keeps_rank(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether the rank of ``node`` follows from that of its first input."""
    if not node.all_input_nodes:
        return False
    operation = n.operation_of(node, traced)
    return (
        operation.name in (*_KEPT, "flatten", "mean_of_positions")
        or operation.is_elementwise
        or operation.is_dropout
        or isinstance(module_of(node, traced), nn.Linear)
        or n.calls_batchnorm(node, traced)
    )


def _rank_behind(node: fx.Node, rank: int | None, traced: fx.GraphModule) -> int | None:
    """The rank of ``node`` whose first input has ``rank``."""
    if rank is None:
        return None
    operation = n.operation_of(node, traced)
    arguments = n.arguments_of(node, traced)
    if operation.name == "flatten":
        start, end = arguments.get("start_dim", 0), arguments.get("end_dim", -1)
        return rank - (end % rank - start % rank)
    if operation.name == "mean_of_positions" and not arguments.get("keepdim", False):
        return rank - len({dim % rank for dim in arguments["dim"]})
    return rank
