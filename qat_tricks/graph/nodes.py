"""Questions about a node of a traced network: which layer, BatchNorm or operation it calls.

Every other module asks here, and not in the graph or the table itself.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from qat_tricks.graph.integer_ops import Elementwise, Mean
from qat_tricks.graph.layers import is_layer
from qat_tricks.graph.operations import UNKNOWN, Arguments, Operation, entries_for
from qat_tricks.graph.trace import layer_at, module_of
from qat_tricks.graph.two_modes import TRAINING, only_in

# The key in a node's meta under which ``note_integers`` says that it yields integers.
INTEGERS = "qat_tricks.integers"
_SIZES = {"size", "dim", "numel", "shape"}  # methods that yield no tensor
# 1d to 3d, synchronized, and Lightning's replacement of a synchronized one
BATCHNORMS = (nn.modules.batchnorm._BatchNorm,)


def operation_of(node: fx.Node, traced: fx.GraphModule) -> Operation:
    """The entry in the table of operations for the call of ``node``, or ``UNKNOWN``."""
    if not node.op.startswith("call_"):
        return UNKNOWN
    module = module_of(node, traced)
    for operation in entries_for(node.target if module is None else type(module)):
        if operation.when(_arguments(node, module, operation)):
            return operation
    return UNKNOWN


def _arguments(node: fx.Node, module: nn.Module | None, operation: Operation) -> Arguments:
    """A module's attributes, or the arguments of a function or method by name."""
    if module is not None:
        return vars(module)
    return {**dict(zip(("input", *operation.arguments), node.args, strict=False)), **node.kwargs}


def is_tensor(node: fx.Node) -> bool:
    """Whether ``node`` yields a tensor.

    Others yield sizes, numbers worked out from sizes, or an argument's default.
    """
    # An argument of ``forward`` with a default, which no batch fills.
    if node.op == "placeholder" and node.args:
        return False
    if node.op == "call_method" and node.target in _SIZES:
        return False
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] not in ("shape", "ndim", "dtype", "device")
    if node.op == "call_function" and (
        # Part of a tuple of tensors, or arithmetic with sizes: the inputs tell which.
        node.target is operator.getitem or getattr(node.target, "__module__", "") == "_operator"
    ):
        return any(is_tensor(n) for n in node.all_input_nodes)
    return True


def depends_on_images(node: fx.Node) -> bool:
    """Whether the result of ``node`` depends on the network's input, if only on its shape.

    Otherwise it is the same for all images. ``nodes_from_images`` asks it of all nodes at once.
    """
    # Not recursive: deep networks would exceed Python's limit.
    seen, left = {node}, [node]
    while left:
        node = left.pop()
        if node.op == "placeholder":
            return True
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        left += new
    return False


def nodes_from_images(traced: fx.GraphModule) -> set[fx.Node]:
    """All nodes of which ``depends_on_images`` is true, collected in one pass.

    Nodes of training only are left out: they are never deployed.
    """
    dependent: set[fx.Node] = set()
    absent = only_in(traced.graph, TRAINING)
    for node in traced.graph.nodes:
        if node in absent:
            continue
        if node.op == "placeholder" or not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent


def calls_layer(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` calls a conv or linear."""
    return is_layer(module_of(node, traced))


def calls_batchnorm(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` calls a BatchNorm."""
    return isinstance(module_of(node, traced), BATCHNORMS)


Uses = Mapping[fx.Node, Sequence[fx.Node]]
"""For each call of a module, all nodes that use the module's weight, that call among them."""


def uses_of_weights(traced: fx.GraphModule) -> Uses:
    """The users of the weight of each module that is called, collected in one pass.

    A weight is used by each call of its module, or of another module that shares it, and by each
    operation that reads its values. A module without a weight counts as its own.
    """
    calls: dict[int, list[fx.Node]] = {}  # by the weight's identity
    reads: dict[str, list[fx.Node]] = {}  # by the weight's name
    keys: dict[fx.Node, tuple[int, str]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = module_of(node, traced)
            weight = getattr(module, "weight", None)
            keys[node] = id(module if weight is None else weight), f"{node.target}.weight"
            calls.setdefault(keys[node][0], []).append(node)
        elif node.op == "get_attr" and any(map(is_tensor, node.users)):
            reads.setdefault(str(node.target), []).append(node)
    return {node: calls[weight] + reads.get(name, []) for node, (weight, name) in keys.items()}


def is_used_once(node: fx.Node, uses: Uses) -> bool:
    """Whether nothing but the call ``node`` uses the weight of the module that it calls.

    Otherwise a change of the weight that suits one use is wrong for the other.
    """
    return len(uses.get(node, ())) == 1


def folds_into(node: fx.Node, traced: fx.GraphModule, uses: Uses) -> list[fx.Node]:
    """The calls of the convs or linears that can take in the BatchNorm that ``node`` calls.

    The BatchNorm must have running statistics and be the layers' only reader. It may follow them
    directly, behind a concat of channels, or behind a flatten of a linear's rows to one matrix. If
    the layers are called several times, that must hold at each call.

    Returns:
        The calls in the order of their channels; none if it cannot be folded.
    """
    batchnorm: Any = module_of(node, traced)
    if not calls_batchnorm(node, traced) or batchnorm.running_var is None:
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


def _layers_before(node: fx.Node, traced: fx.GraphModule) -> list[fx.Node]:
    """The calls of convs or linears whose outputs only the BatchNorm ``node`` reads.

    Returns:
        The calls; an empty list if the BatchNorm reads anything else.
    """
    before = node.all_input_nodes[0]
    is_only_reader = len(before.users) == 1
    # A BatchNorm1d takes ``[N, C]``: of a linear's rows, channels stay last.
    if is_only_reader and _flattens_rows(before, traced):
        parts = [before.all_input_nodes[0]]
        if not hasattr(module_of(parts[0], traced), "in_features"):  # channels last
            return []
    elif is_only_reader and _concats_channels(before, traced):
        parts = list(before.all_input_nodes)
    else:
        parts = [before]
    are_layers = all(calls_layer(part, traced) and len(_readers(part)) == 1 for part in parts)
    return parts if are_layers else []


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of the values of ``node``, without those that read only its shape."""
    # A tensor given only for its shape is read for no values.
    as_shape = {"reshape_as", "view_as"}
    return [
        user
        for user in node.users
        if is_tensor(user) and not (user.target in as_shape and user.args[0] is not node)
    ]


def _concats_channels(node: fx.Node, traced: fx.GraphModule) -> bool:
    if not is_cat(node, traced):
        return False
    # torch accepts "axis" for "dim".
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return bool(dim == 1)


def _flattens_rows(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` makes one matrix of ``[N, L, C]``."""
    is_flatten = operation_of(node, traced).name == "flatten"
    return is_flatten and node.args[1:] in ((0, 1), (0, -2))


def activation_of(node: fx.Node, traced: fx.GraphModule) -> str | None:
    """``"relu"`` or ``"relu6"`` for a node that a quantizer can stand in for, else None."""
    return operation_of(node, traced).absorbed_as


def _operands_are_activations(node: fx.Node) -> bool:
    """Whether both operands are tensors made from the images, and no integers such as token ids."""
    return all(
        isinstance(operand, fx.Node)
        and is_tensor(operand)
        and depends_on_images(operand)
        and not operand.meta.get(INTEGERS)
        for operand in node.args[:2]
    )


def is_cat(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` concatenates tensors; its inputs share one range."""
    return operation_of(node, traced).concatenates


def is_integer_op(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether an integer kernel takes and makes the quantized tensors of ``node``.

    Convs and linears are not meant: ``calls_layer`` finds them.
    """
    operation = operation_of(node, traced)
    if operation.kernel is not None:
        return _operands_are_activations(node)
    return operation.averages and is_tensor(node)


def is_arithmetic(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` adds, multiplies or the like: numbers, constants or activations."""
    return operation_of(node, traced).is_arithmetic


def is_function_of_one(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether each value of ``node`` is a function of one value, computed in float.

    That is an element-wise function, or arithmetic with a number.
    """
    operation = operation_of(node, traced)
    if operation.is_arithmetic and node.op != "call_module":  # our kernels are modules
        with_number = all(isinstance(arg, fx.Node | int | float) for arg in node.args)
        return with_number and not node.kwargs and len(node.all_input_nodes) == 1
    return operation.is_elementwise and len(node.all_input_nodes) == 1


def is_dropout(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` returns its input in evaluation, and not in training."""
    return operation_of(node, traced).is_dropout


def is_passthrough(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether the values of ``node`` are values of its first input: on a grid if that one is."""
    return operation_of(node, traced).moves_values and is_tensor(node)


def pads_with_zeros(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` adds zeros at the border, as a conv could do itself."""
    return operation_of(node, traced).pads


def only_user(node: fx.Node, test: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The one user of ``node`` if there is just one and it passes ``test``."""
    users = list(node.users)
    return users[0] if len(users) == 1 and test(users[0]) else None


def elementwise_of(node: fx.Node, traced: fx.GraphModule) -> type[Elementwise] | None:
    """The kernel for a ``node`` that adds or multiplies two activations and does nothing else."""
    kernel = operation_of(node, traced).kernel
    if kernel is None or len(node.args) != 2 or node.kwargs:
        return None
    return kernel if _operands_are_activations(node) else None


def mean_of(node: fx.Node, traced: fx.GraphModule) -> tuple[tuple[int, ...], bool] | None:
    """Over which dimensions ``node`` averages all positions, and whether it keeps them.

    None if it does something else.
    """
    module = module_of(node, traced)
    if isinstance(module, Mean):  # put there when quantizers were last connected
        return module.dims, module.keepdim
    operation = operation_of(node, traced)
    arguments = _arguments(node, module, operation)
    if operation.name == "adaptive_avg_pool2d":
        return ((-2, -1), True) if arguments["output_size"] in (1, (1, 1), [1, 1]) else None
    if operation.name != "mean_of_positions" or not node.kwargs.keys() <= {"dim", "keepdim"}:
        return None
    return tuple(arguments["dim"]), bool(arguments.get("keepdim", False))
