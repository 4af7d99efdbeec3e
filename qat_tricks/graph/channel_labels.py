"""Follows every channel of a network from the layers that make it to the layers that read it.

Each output channel of a conv or linear gets a label, a number. The graph is run once, and beside
each tensor runs one of labels, of the same shape: it says of every value which channel it came
from. What moves values about (a view, a concat, a channel shuffle) moves labels in the same way, so
that it needs no rule of its own. Where two labels meet, as in a sum, the two channels can only be
removed together: they are tied. What computes with all channels, such as a LayerNorm, holds them
fixed, for a reason that is kept.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning" (arXiv 2301.12900), section 3.2, finds
such groups from rules for pairs of layers and of operations. Labels need a rule for arithmetic and
for pools only.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.graph import nodes as n
from qat_tricks.graph.inputs import Inputs, as_tensors, batch_size, first_images, map_tensors
from qat_tricks.graph.layers import BATCHNORMS, is_layer
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.graph.submodules import attribute_at, module_of
from qat_tricks.graph.two_modes import EvaluationInterpreter, by_mode

NO_CHANNEL = 0  # the label of values that come from no channel, such as those of the image
_POOLS = (
    *("avg_pool1d", "avg_pool2d", "padded_avg_pool2d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "max_pool1d", "max_pool2d", "adaptive_max_pool2d", "upsample"),
)
_SIZED = ("reshape", "expand", "unflatten", "windows")  # they are given the sizes of their result


class Labels:
    """Labels of channels, and which of them can only be removed together."""

    def __init__(self) -> None:
        self._parents = [NO_CHANNEL]
        self._reasons: dict[int, str] = {}  # of labels that are fixed, by the root of their ties

    def new(self, count: int) -> Tensor:
        """So many labels that nothing has yet, int64 ``[count]``."""
        first = len(self._parents)
        self._parents += range(first, first + count)
        return torch.arange(first, first + count)

    def root(self, label: int) -> int:
        """The label that stands for all that are tied to ``label``."""
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def roots(self, labels: Tensor) -> Tensor:
        """``root`` of each of ``labels``."""
        core = core_of(labels)
        values, places = core.unique(return_inverse=True)
        found = torch.tensor([self.root(int(value)) for value in values], dtype=torch.int64)
        return found[places].expand(labels.shape)

    def tie(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Lets each label of ``first`` be removed only with that of ``second`` at the same place.

        Args:
            first, second: of shapes that broadcast.
            reason: why a channel is fixed that meets a value of no channel.
        """
        cores = torch.broadcast_tensors(core_of(first), core_of(second))
        pairs = torch.stack([core.flatten() for core in cores], 1).unique(dim=0)
        for one, other in pairs.tolist():
            self._tie(one, other, reason)

    def _tie(self, one: int, other: int, reason: str) -> None:
        if NO_CHANNEL in (one, other):
            self._fix(one + other, reason)
            return
        one, other = self.root(one), self.root(other)
        if one == other:
            return
        self._parents[other] = one
        if other in self._reasons:
            self._reasons.setdefault(one, self._reasons.pop(other))

    def fix(self, labels: Tensor, reason: str) -> None:
        """Lets none of ``labels`` be removed."""
        for label in core_of(labels).unique().tolist():
            self._fix(label, reason)

    def _fix(self, label: int, reason: str) -> None:
        if label != NO_CHANNEL:
            self._reasons.setdefault(self.root(label), reason)

    def reason(self, label: int) -> str | None:
        """Why ``label`` cannot be removed; None if it can."""
        return self._reasons.get(self.root(label))


def core_of(labels: Tensor) -> Tensor:
    """``labels`` with size 1 in each dimension along which they do not vary."""
    for dim, size in enumerate(labels.shape):
        if size < 2:
            continue
        first = labels.narrow(dim, 0, 1)
        if labels.stride(dim) == 0 or bool((labels == first).all()):
            labels = first
    return labels


def _varying(labels: Tensor) -> list[int]:
    return [dim for dim, size in enumerate(core_of(labels).shape) if size > 1]


class Followed(EvaluationInterpreter):
    """The labels of a network's channels, after ``follow_channels``.

    Attributes:
        labels: all of them, and their ties.
        written: by the identity of a parameter or buffer, the labels of its first dimension. A
            weight is one whose rows make channels.
        read: of each conv and linear that is called, by name, the labels of its input channels.
        attributes: of each parameter or buffer that the graph reads by itself, by name, its labels.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.traced = traced
        self.labels = Labels()
        self.written: dict[int, Tensor] = {}
        self.read: dict[str, Tensor] = {}
        self.attributes: dict[str, Tensor] = {}
        self.of_nodes: dict[fx.Node, Any] = {}  # a tensor of labels, or several; None: no tensor
        # Parameters that something else than the call of their one module reads.
        self._shared = _shared_parameters(traced)

    def run_node(self, n: fx.Node) -> Any:
        """The result of a node, whose labels are noted."""
        value = super().run_node(n)
        if n in self.absent:
            for source in n.all_input_nodes:
                self._fix(self.of_nodes.get(source), f"{n.name} reads it in training")
        else:
            found = self._labels_of(n, value)
            self.of_nodes[n] = _map(found, lambda t: self.labels.roots(core_of(t).expand(t.shape)))
        return value

    def _labels_of(self, node: fx.Node, value: Any) -> Any:
        if node.op == "output":
            self._fix_inputs(node, "it is an output of the network")
            return None
        if not n.is_tensor(node):  # a size, or a number worked out from sizes
            return None
        if node.op == "get_attr" and isinstance(value, Tensor):
            return self._of_attribute(str(node.target), value)
        if node.op == "placeholder":
            return _without_channel(value)
        module = module_of(node, self.traced)
        if is_layer(module) and isinstance(value, Tensor):
            return self._of_layer(str(node.target), module, self._source(node), value)
        if isinstance(module, (*BATCHNORMS, nn.PReLU)):
            return self._of_channelwise(node, module, self._source(node))
        return self._of_operation(node, value)

    def _source(self, node: fx.Node) -> Tensor:
        """The labels of a node's first input; of no channel where they were lost."""
        source = node.all_input_nodes[0]
        found = self.of_nodes.get(source)
        return _without_channel(self.env[source]) if found is None else found

    # Parameters ----------------------------------------------------------------------------------

    def _of_attribute(self, name: str, value: Tensor) -> Tensor:
        """Labels for a parameter or buffer: of its one dimension, or of no channel."""
        dims = [dim for dim, size in enumerate(value.shape) if size > 1]
        path, _, last = name.rpartition(".")
        owner = self.traced.get_submodule(path)
        # Numbers that index; what a checkpoint does not hold; and what a layer computes with too.
        is_apart = (
            not value.is_floating_point()
            or last in owner._non_persistent_buffers_set
            or is_layer(owner)
            or isinstance(owner, (*BATCHNORMS, nn.PReLU))
        )
        if len(dims) != 1 or is_apart:
            return _without_channel(value)
        if name not in self.attributes:
            self.attributes[name] = self.labels.new(value.numel())
        shape = [-1 if dim in dims else 1 for dim in range(value.dim())]
        return self.attributes[name].view(shape)

    def _rows(self, name: str, parameter: Tensor) -> Tensor:
        """The labels of a parameter's first dimension, the same at each call, ``[rows]``."""
        if id(parameter) not in self.written:
            self.written[id(parameter)] = self.labels.new(len(parameter))
            if id(parameter) in self._shared:
                self.labels.fix(self.written[id(parameter)], f"{name} shares its parameters")
        return self.written[id(parameter)]

    def _of_layer(self, name: str, layer: Any, source: Tensor, value: Tensor) -> Tensor:
        is_linear = isinstance(layer, nn.Linear)
        axis = source.dim() - 1 if is_linear else source.dim() - layer.weight.dim() + 1
        read = self._of_slices(source, axis)
        if name in self.read:
            self.labels.tie(self.read[name], read, f"{name} is called for several tensors")
        self.read.setdefault(name, read)
        rows = self._rows(name, layer.weight)
        if id(layer.weight) in self._shared:
            self.labels.fix(read, f"{name} shares its parameters")
        if layer.bias is not None:
            self.labels.tie(rows, self._rows(name, layer.bias), f"{name} shares its parameters")
        groups = 1 if is_linear else layer.groups
        if groups > 1:  # a group of channels goes as a whole
            reason = f"{name} has {groups} groups, and reads what has no channels"
            for inputs, outputs in zip(read.chunk(groups), rows.chunk(groups), strict=True):
                self.labels.tie(inputs[:1], torch.cat([inputs, outputs]), reason)
        shape = [1] * value.dim()
        shape[axis] = -1
        return rows.view(shape).expand(value.shape)

    def _of_slices(self, labels: Tensor, axis: int) -> Tensor:
        """The label of each slice along ``axis``; where a slice holds several, they are tied."""
        core = core_of(labels)
        size = labels.shape[axis]
        slices = core.movedim(axis, 0).flatten(1).expand(size, -1)
        if slices.shape[1] > 1:
            self.labels.tie(slices[:, :1], slices, "a channel holds values of no channel")
        return self.labels.roots(slices[:, 0])

    def _of_channelwise(self, node: fx.Node, module: Any, source: Tensor) -> Tensor:
        """Labels behind a module with one parameter, or statistic, for each channel."""
        name = str(node.target)
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        of_channels = [tensor for tensor in own if tensor.dim() == 1 and len(tensor) > 1]
        read = self._of_slices(source, 1) if of_channels else source
        for tensor in of_channels:
            rows = self._rows(name, tensor)
            self.labels.tie(rows, read, f"{name} reads what has no channels")
        return source

    # Operations ----------------------------------------------------------------------------------

    def _of_operation(self, node: fx.Node, value: Any) -> Any:
        operation = n.operation_of(node, self.traced)
        sources: list[Any] = [self.of_nodes.get(source) for source in node.all_input_nodes]
        if sources and sources[0] is None and not operation.is_arithmetic:
            self._fix_inputs(node, f"{node.name} computes with all channels, or nobody knows how")
            return _without_channel(value)
        if operation.is_arithmetic and isinstance(value, Tensor):
            return self._of_arithmetic(node, sources, value)
        if node.target is by_mode:
            both = [labels for labels in sources if isinstance(labels, Tensor)]
            for other in both[1:]:
                self.labels.tie(both[0], other, f"{node.name} reads no channels in one mode")
            return sources[0]
        if operation.is_elementwise or operation.is_dropout or operation.name == "identity":
            return sources[0]
        if operation.name in _POOLS and isinstance(value, Tensor):
            dims = {"1d": 1, "2d": 2}.get(operation.name[-2:], value.dim() - 2)
            return self._of_pool(node, sources[0], value, dims)
        if operation.averages and isinstance(value, Tensor):
            return self._of_mean(node, sources[0], value)
        if operation.pads:
            return self._of_pad(node, sources[0], value)
        if operation.concatenates or operation.moves_values:
            return self._of_moved(node, operation.name, value)
        self._fix_inputs(node, f"{node.name} computes with all channels, or nobody knows how")
        return _without_channel(value)

    def _of_arithmetic(self, node: fx.Node, sources: Sequence[Any], value: Tensor) -> Tensor:
        found = [
            labels.reshape([1] * (value.dim() - labels.dim()) + list(labels.shape))
            for labels in sources
            if isinstance(labels, Tensor)
        ]
        of_channels = {dim for labels in found for dim in _varying(labels)}
        meet: list[Tensor] = []
        for labels in found:
            # A factor of the whole tensor, or of each position, serves any number of channels.
            if of_channels and all(labels.shape[dim] == 1 for dim in of_channels):
                self.labels.fix(labels, f"{node.name} spreads it over all channels")
            else:
                meet.append(labels)
        if not meet:
            return _without_channel(value)
        for other in meet[1:]:
            self.labels.tie(meet[0], other, f"{node.name} combines it with what has no channels")
        # Where several meet, each stands for all: they are tied.
        cores = torch.broadcast_tensors(*(core_of(self.labels.roots(one)) for one in meet))
        return torch.stack(cores).amax(0).expand(value.shape)

    def _of_pool(self, node: fx.Node, source: Tensor, value: Tensor, dims: int) -> Tensor:
        core = core_of(source)
        if any(size > 1 for size in core.shape[-dims:]):  # it pools over the last dimensions
            return self._mixed(node, value)
        return core.expand(value.shape)

    def _of_mean(self, node: fx.Node, source: Tensor, value: Tensor) -> Tensor:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        given = [dims] if isinstance(dims, int) else dims
        if not isinstance(given, (list, tuple)) or not all(isinstance(d, int) for d in given):
            return self._mixed(node, value)
        over: list[int] = [dim for dim in given if isinstance(dim, int)]
        least, most = source.amin(over, bool(keep)), source.amax(over, bool(keep))
        return least if torch.equal(least, most) else self._mixed(node, value)

    def _of_pad(self, node: fx.Node, source: Tensor, value: Any) -> Any:
        core = core_of(source)
        grown = [
            i for i, (a, b) in enumerate(zip(source.shape, value.shape, strict=True)) if a != b
        ]
        if any(core.shape[dim] > 1 for dim in grown):
            self._fix_inputs(node, f"{node.name} adds a constant number of channels")
            return _without_channel(value)
        return core.expand(value.shape)

    def _of_moved(self, node: fx.Node, name: str, value: Any) -> Any:
        """The labels, moved as the values are."""
        source = self.of_nodes.get(node.all_input_nodes[0])
        if name == "getitem" and isinstance(source, list):
            return source[node.args[1]]  # type: ignore[index]
        if not list(_tensors(value)) or name == "max_pool_with_indices":
            return self._mixed(node, value)
        if name == "channel_shuffle":
            self._keep_parts(node, source.chunk(self._groups_of(node), 1))  # type: ignore[union-attr]
        moved = self._call_with_labels(node)
        if name == "getitem":
            self._keep_all(node, source, moved)  # type: ignore[arg-type]
        if name == "chunk":
            self._keep_parts(node, moved)
        constant: Sequence[int] = ()
        if name in _SIZED:
            constant = self._constant_dims(node, moved)
        elif name == "pixel_shuffle":
            constant = (2, 3)
        for labels in _tensors(moved):
            self._keep_one_dimension(labels, node, constant)
        return moved

    def _groups_of(self, node: fx.Node) -> int:
        module: Any = module_of(node, self.traced)
        return int(node.args[1] if module is None else module.groups)  # type: ignore[arg-type]

    def _call_with_labels(self, node: fx.Node) -> Any:
        def labels_of(source: fx.Node) -> Any:
            found, value = self.of_nodes.get(source), self.env[source]
            if isinstance(value, Tensor) and not value.is_floating_point():
                return value.cpu()  # numbers by which something is indexed; labels are there
            if found is None and isinstance(value, Tensor):  # nothing is known of it
                return torch.zeros(value.shape, dtype=torch.float64)
            if found is None:  # a size
                return value
            # As float64, which holds them and which every operation takes; and laid out, as a view
            # may need it.
            return _map(found, lambda t: t.double().contiguous())

        args, kwargs = fx.map_arg((node.args, node.kwargs), labels_of)
        if node.op == "call_module":
            moved = self.traced.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            moved = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            moved = node.target(*args, **kwargs)  # type: ignore[operator]
        return _map(moved, lambda t: t.long())

    # Rules ---------------------------------------------------------------------------------------

    def _keep_all(self, node: fx.Node, before: Tensor, after: Tensor) -> None:
        """Fixes channels of which an index takes some, or names each."""
        index: Any = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        by_number = any(isinstance(part, (list, fx.Node)) for part in parts)
        kept = torch.equal(core_of(before).flatten(), core_of(after).flatten())
        if by_number or not kept:
            self.labels.fix(before, f"{node.name} takes some channels by their number")

    def _keep_parts(self, node: fx.Node, parts: Sequence[Tensor]) -> None:
        """Ties the channels of parts of a tensor, so that the parts stay of one size."""
        if not any(_varying(part) for part in parts):
            return
        together = torch.cat([core_of(part).flatten() for part in parts])
        given = [*node.args[1:2], *node.kwargs.values()]
        sizes = given if node.target in (torch.split, "split") else []
        literal = [size for arg in sizes for size in _literals(arg)]
        if literal or len({part.shape for part in parts}) > 1:
            self.labels.fix(together, f"{node.name} splits it at a constant number")
            return
        for part in parts[1:]:
            self.labels.tie(parts[0], part, f"{node.name} splits it from values of no channel")

    def _constant_dims(self, node: fx.Node, moved: Tensor) -> list[int]:
        """The dimensions whose size the code gives as a number."""
        module = module_of(node, self.traced)
        if isinstance(module, nn.Unflatten):
            first: int = module.dim % self._source(node).dim()
            sizes: Any = module.unflattened_size
            return [first + i for i, size in enumerate(sizes) if size != -1]
        given = [*node.args[1:], *node.kwargs.values()]
        if n.operation_of(node, self.traced).name == "unflatten":
            return list(range(moved.dim()))
        sizes = given[0] if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
        if len(sizes) != moved.dim():
            return list(range(moved.dim())) if len(_varying(moved)) > 1 else []
        return [i for i, size in enumerate(sizes) if isinstance(size, int) and size != -1]

    def _keep_one_dimension(
        self, labels: Tensor, node: fx.Node, constant: Sequence[int] = ()
    ) -> None:
        """Ties labels so that removing one removes whole slices of one dimension.

        Args:
            labels: of a tensor.
            node: that yields it.
            constant: dimensions whose size cannot change.
        """
        varying = _varying(self.labels.roots(labels))
        free = [dim for dim in varying if dim not in constant]
        if varying and (not free or len(free) > 1):
            reason = f"{node.name} gives it a constant shape, or spreads it over several dimensions"
            self.labels.fix(labels, reason)
            return
        for dim in varying:
            if dim not in free:
                self.labels.tie(labels.narrow(dim, 0, 1), labels, f"{node.name} mixes it")

    def _mixed(self, node: fx.Node, value: Any) -> Any:
        self._fix_inputs(node, f"{node.name} mixes its channels")
        return _without_channel(value)

    def _fix_inputs(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            self._fix(self.of_nodes.get(source), reason)

    def _fix(self, found: Any, reason: str) -> None:
        for labels in _tensors(found):
            self.labels.fix(labels, reason)


@torch.no_grad()
def follow_channels(traced: fx.GraphModule, inputs: Inputs) -> Followed:
    """Runs ``traced`` once, on two images in evaluation mode, and follows its channels.

    Args:
        traced: a float network, which stays as it is.
        inputs: of one image or more.
    """
    two = first_images(inputs, 2)
    if batch_size(two) == 1:  # a dimension of size 1 may be squeezed away, and a batch never is
        two = map_tensors(two, lambda tensor: torch.cat([tensor, tensor]))
    followed = Followed(traced)
    with evaluating(traced), kept_random_state():
        followed.run(*as_tensors(two))
    return followed


def _shared_parameters(traced: fx.GraphModule) -> set[int]:
    """The identities of parameters that several modules have, or that the graph reads itself."""
    read = [
        id(attribute_at(traced, str(node.target)))
        for node in traced.graph.nodes
        if node.op == "get_attr"
    ]
    owned = [
        id(parameter)
        for module in traced.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    return {parameter for parameter, count in Counter(read + owned).items() if count > 1}


def _without_channel(value: Any) -> Any:
    """Labels of values that come from no channel."""
    if isinstance(value, Tensor):
        return torch.zeros([1] * value.dim(), dtype=torch.int64).expand(value.shape)
    if isinstance(value, (tuple, list)):
        return [_without_channel(part) for part in value]
    return None


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for part in found:
            yield from _tensors(part)


def _map(found: Any, change: Any) -> Any:
    if isinstance(found, Tensor):
        return change(found)
    if isinstance(found, (tuple, list)):
        return [_map(part, change) for part in found]
    return found


def _literals(size: Any) -> Iterable[int]:
    sizes = size if isinstance(size, (list, tuple)) else [size]
    return [each for each in sizes if isinstance(each, int)]
