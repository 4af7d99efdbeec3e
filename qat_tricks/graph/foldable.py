"""Finds the convs and linears that can take in a BatchNorm."""

from typing import Any

from torch import fx, nn

from qat_tricks.graph import nodes as n
from qat_tricks.graph.ranks import rank_of
from qat_tricks.graph.submodules import layer_at, module_of

MATRIX = 2  # dimensions of rows ``[N, C]``, of which a BatchNorm's channels are a linear's


def folds_into(node: fx.Node, traced: fx.GraphModule, uses: n.Uses) -> list[fx.Node]:
    """The calls of the convs or linears that can take in the BatchNorm that ``node`` calls.

    The BatchNorm must have running statistics and be the layers' only reader. It may follow them
    directly, behind a concat of channels, or behind a flatten of a linear's rows to one matrix. If
    the layers are called several times, that must hold at each call.

    Behind a linear, channels come last, and a BatchNorm has them in dimension 1: it must take a
    matrix. Where neither the graph nor ``note_ranks`` tells, that is supposed of a BatchNorm1d
    (``is_supposed_matrix``).

    Returns:
        The calls in the order of their channels; none if it cannot be folded.
    """
    batchnorm: Any = module_of(node, traced)
    if not n.calls_batchnorm(node, traced) or batchnorm.running_var is None:
        return []
    layers_before = {
        use: _layers_before(use, traced) for use in uses[node] if use.target == node.target
    }
    if len(layers_before) < len(uses[node]):  # something else uses its weight
        return []
    parts = layers_before[node]
    names = [part.target for part in parts]
    # At another call, the BatchNorm follows other layers.
    if any([part.target for part in others] != names for others in layers_before.values()):
        return []
    for calls in zip(*layers_before.values(), strict=True):  # of one layer, at each call
        if set(uses[calls[0]]) != set(calls):
            return []
    channels = sum(layer_at(traced, str(part.target)).weight.shape[0] for part in parts)
    return parts if channels == batchnorm.num_features else []


def is_supposed_matrix(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a BatchNorm that can be folded takes a matrix only by supposition."""
    before = node.all_input_nodes[0]
    layer = before.all_input_nodes[0] if _flattens_rows(before, traced) else before
    return isinstance(module_of(layer, traced), nn.Linear) and rank_of(before, traced) is None


def _layers_before(node: fx.Node, traced: fx.GraphModule) -> list[fx.Node]:
    """The calls of convs or linears whose outputs only the BatchNorm ``node`` reads.

    Returns:
        The calls; an empty list if the BatchNorm reads anything else, or other channels.
    """
    before = node.all_input_nodes[0]
    is_only_reader = len(before.users) == 1
    # A BatchNorm1d takes ``[N, C]``: of a linear's rows, channels stay last.
    if is_only_reader and _flattens_rows(before, traced):
        parts = [before.all_input_nodes[0]]
        if not isinstance(module_of(parts[0], traced), nn.Linear):  # channels last
            return []
    elif is_only_reader and _concats_channels(before, traced):
        parts = list(before.all_input_nodes)
    else:
        parts = [before]
    are_layers = all(n.calls_layer(part, traced) and len(_readers(part)) == 1 for part in parts)
    if not are_layers:
        return []
    if any(isinstance(module_of(part, traced), nn.Linear) for part in parts):
        # Images and volumes are no matrix, whatever is known.
        of_volumes = isinstance(module_of(node, traced), (nn.BatchNorm2d, nn.BatchNorm3d))
        if of_volumes or rank_of(before, traced) not in (MATRIX, None):
            return []
    return parts


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of the values of ``node``, without those that read only its shape."""
    # A tensor given only for its shape is read for no values.
    as_shape = {"reshape_as", "view_as"}
    return [
        user
        for user in node.users
        if n.is_tensor(user) and not (user.target in as_shape and user.args[0] is not node)
    ]


def _concats_channels(node: fx.Node, traced: fx.GraphModule) -> bool:
    if not n.is_cat(node, traced):
        return False
    # torch accepts "axis" for "dim".
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return bool(dim == 1)


def _flattens_rows(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` makes one matrix of ``[N, L, C]``."""
    is_flatten = n.operation_of(node, traced).name == "flatten"
    return is_flatten and node.args[1:] in ((0, 1), (0, -2))
