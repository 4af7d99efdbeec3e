"""One graph for a network that computes one thing in evaluation and another in training.

A tracer follows the code in one mode. So a network is traced in both, and ``merge`` makes one graph
of the two: nodes that both have stay single, and the others stand beside each other. Where a node
reads one value in evaluation and another in training, ``by_mode`` stands between and names both.
"""

import inspect
from collections.abc import Hashable
from difflib import SequenceMatcher
from typing import Any

from torch import fx
from torch.nn import functional as F

EVALUATION, TRAINING = "evaluation", "training"
# Keys in a node's meta: the one mode it belongs to; whether its function has a ``training``
# argument that is false in evaluation and true in training; the module whose code it comes from.
MODE, FOLLOWS_MODE, OWNER = "qat_tricks.mode", "qat_tricks.follows_mode", "qat_tricks.owner"
# Another: it was computed under ``torch.no_grad()``.
NO_GRAD = "qat_tricks.no_grad"


def by_mode(evaluation: Any, training: Any) -> Any:
    """Marks in a graph where the two modes meet; a graph of one mode has none."""
    return evaluation


def merge(evaluation: fx.Graph, training: fx.Graph) -> None:
    """Makes ``evaluation`` in place a graph of both modes.

    Args:
        evaluation: traced in evaluation mode; its nodes keep their names.
        training: traced from the same network in training mode.
    """
    nodes, others = (
        [node for node in graph.nodes if node.op != "output"] for graph in (evaluation, training)
    )
    partner = _partners(nodes, others)
    for node in set(nodes) - set(partner.values()):
        node.meta[MODE] = EVALUATION
    merged = _Merged(evaluation)
    image: dict[fx.Node, fx.Node] = {}
    last = nodes[0] if nodes else None
    for other in others:
        if other in partner:
            image[other] = last = partner[other]
            # Gradients are for training, so that mode tells where there are none.
            last.meta.pop(NO_GRAD, None)
            last.meta.update({NO_GRAD: True} if NO_GRAD in other.meta else {})
            merged.read_both(last, other, image)
            continue
        # Behind the node before it, so that the order of effects and of random numbers stays.
        assert last is not None
        with evaluation.inserting_after(last):
            image[other] = last = evaluation.node_copy(other, image.__getitem__)
        last.meta[MODE] = TRAINING
    merged.read_both(evaluation.output_node(), training.output_node(), image)


class _Merged:
    """A graph under merging: adds ``by_mode`` nodes, each once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.selections: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def read_both(self, node: fx.Node, other: fx.Node, image: dict[fx.Node, fx.Node]) -> None:
        """Lets ``node`` read in training what its partner ``other`` reads.

        Args:
            node: of the merged graph.
            other: of the training graph.
            image: the merged graph's node for each node of the training graph.
        """
        if _training_argument(node) is False and _training_argument(other) is True:
            node.meta[FOLLOWS_MODE] = True
        if _structure(node) != _structure(other):  # of outputs only: others were matched by it
            (there,) = fx.map_arg(other.args, image.__getitem__)
            with self.graph.inserting_before(node):
                node.args = (self.graph.call_function(by_mode, (node.args[0], there)),)
            return
        theirs = iter([image[source] for source in _nodes_in((other.args, other.kwargs))])

        def select(source: fx.Node) -> fx.Node:
            there = next(theirs)
            if there is source:
                return source
            if (source, there) not in self.selections:
                with self.graph.inserting_before(node):
                    selection = self.graph.call_function(by_mode, (source, there))
                selection.meta[OWNER] = _common_owner(source, there)
                self.selections[source, there] = selection
            return self.selections[source, there]

        args, kwargs = fx.map_arg((node.args, node.kwargs), select)
        node.args, node.kwargs = args, kwargs


def _common_owner(*nodes: fx.Node) -> str:
    """The path of the innermost module whose code ``nodes`` of one mode come from."""
    owners = [str(node.meta.get(OWNER, "")).split(".") for node in nodes if MODE in node.meta]
    common = owners[0] if owners else []
    for owner in owners[1:]:
        length = next(
            (i for i, pair in enumerate(zip(common, owner, strict=False)) if pair[0] != pair[1]),
            min(len(common), len(owner)),
        )
        common = common[:length]
    return ".".join(common)


def _partners(nodes: list[fx.Node], others: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For nodes of the training graph their partners in the evaluation graph, both in order."""
    keys, other_keys = [_key(node) for node in nodes], [_key(node) for node in others]
    if keys == other_keys:  # as in nearly all networks
        return dict(zip(others, nodes, strict=True))
    matcher = SequenceMatcher(None, keys, other_keys, autojunk=False)
    return {
        others[there + i]: nodes[here + i]
        for here, there, size in matcher.get_matching_blocks()
        for i in range(size)
    }


def _key(node: fx.Node) -> Hashable:
    """What a node has to share with another to be its partner; tensors may differ."""
    target = node.target if isinstance(node.target, str) else id(node.target)
    return node.op, target, _structure(node)


def structure_of(graph: fx.Graph) -> list[Hashable]:
    """What a graph computes, but for the values of its tensors."""
    return [_key(node) for node in graph.nodes]


def _structure(node: fx.Node) -> str:
    """A node's arguments as text, each tensor as a mark, and those left out that follow the mode.

    They are ``training``, and the momentum of a BatchNorm, which may count its batches.
    """
    args, kwargs = list(node.args), dict(node.kwargs)
    if _training_place(node) is not None:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        args = []
        for name in ("training", *(["momentum"] if node.target is F.batch_norm else [])):
            kwargs.pop(name, None)
    return repr(fx.map_arg((args, kwargs), lambda source: "•"))


def _training_place(node: fx.Node) -> int | None:
    """The place of the argument ``training`` in a function's signature, None if it has none."""
    if node.op != "call_function":
        return None
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # built in, without a signature
        return None
    return names.index("training") if "training" in names else None


def _training_argument(node: fx.Node) -> bool | None:
    """The value of the argument ``training`` in a call, None if its function has none."""
    place = _training_place(node)
    if place is None:
        return None
    default = inspect.signature(node.target).parameters["training"].default  # type: ignore[arg-type]
    value = node.kwargs.get("training", node.args[place] if place < len(node.args) else default)
    return bool(value)


def split_by_training(traced: fx.GraphModule) -> None:
    """Splits each function that still follows the mode into two calls, one for each mode."""
    for node in list(traced.graph.nodes):
        if not node.meta.pop(FOLLOWS_MODE, False) or node.op != "call_function":
            continue
        place = _training_place(node)
        assert place is not None
        with traced.graph.inserting_after(node):
            other = traced.graph.node_copy(node)
        if place < len(node.args):
            other.args = (*node.args[:place], True, *node.args[place + 1 :])
        else:
            other.kwargs = {**node.kwargs, "training": True}
        node.meta[MODE], other.meta[MODE] = EVALUATION, TRAINING
        with traced.graph.inserting_after(other):
            both = traced.graph.call_function(by_mode, (node, other))
        both.meta[OWNER] = str(node.meta.get(OWNER, ""))
        node.replace_all_uses_with(both, delete_user_cb=lambda user, both=both: user is not both)


def acts_on_mode(graph: fx.Graph) -> bool:
    """Whether a graph computes one thing in evaluation and another in training."""
    return any(node.target is by_mode or MODE in node.meta for node in graph.nodes)


def yields_by_mode(graph: fx.Graph) -> bool:
    """Whether a network's outputs are others in training, and not only their values."""
    return any(node.target is by_mode for node in graph.output_node().all_input_nodes)


def only_in(graph: fx.Graph, mode: str) -> set[fx.Node]:
    """The nodes that compute nothing in the other mode than ``mode``."""
    # What reads a value that is not there is not there either.
    absent: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is by_mode:
            missing = not absent.isdisjoint(_nodes_in(node.args[mode == EVALUATION]))
        else:
            missing = not absent.isdisjoint(node.all_input_nodes)
        if missing or node.meta.get(MODE) == mode:
            absent.add(node)
    return absent


def _nodes_in(argument: Any) -> list[fx.Node]:
    """Each node in an argument, in order, repetitions included."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(argument, note)
    return found


def graph_in(graph: fx.Graph, mode: str) -> fx.Graph:
    """A copy of ``graph`` that computes what it computes in ``mode``; nodes keep their names."""
    absent = only_in(graph, TRAINING if mode == EVALUATION else EVALUATION)
    copy, values = fx.Graph(), dict[fx.Node, Any]()
    for node in graph.nodes:
        if node in absent:
            continue
        if node.target is by_mode:
            values[node] = fx.map_arg(node.args[mode == TRAINING], values.__getitem__)
        else:
            values[node] = copy.node_copy(node, values.__getitem__)
    return copy


class EvaluationInterpreter(fx.Interpreter):
    """Runs the nodes of a graph one by one, and passes over those of training only."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.absent = only_in(traced.graph, TRAINING)

    def run_node(self, n: fx.Node) -> Any:
        """The result of a node, None for one of training only."""
        return None if n in self.absent else super().run_node(n)
