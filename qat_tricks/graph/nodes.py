"""What a node of a traced network is, seen from an integer kernel."""

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from qat_tricks.graph.integer_ops import Elementwise, Mean
from qat_tricks.graph.layers import is_layer
from qat_tricks.graph.operations import UNKNOWN, Arguments, Operation, entries_for
from qat_tricks.graph.trace import layer_at, module_of

# in a node's meta, where ``note_integers`` has seen what it yields
INTEGERS = "qat_tricks.integers"
_SIZES = {"size", "dim", "numel", "shape"}
# 1d to 3d, synchronized, and what Lightning makes of a synchronized one
BATCHNORMS = (nn.modules.batchnorm._BatchNorm,)


def operation_of(node: fx.Node, traced: fx.GraphModule) -> Operation:
    """The entry of what ``node`` calls in the table of operations, or ``UNKNOWN``."""
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
    """Whether the node yields a tensor rather than sizes or numbers worked out from them, or an
    argument's default.
    """
    if node.op == "placeholder" and node.args:
        return False
    if node.op == "call_method" and node.target in _SIZES:
        return False
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] not in ("shape", "ndim", "dtype", "device")
    if node.op == "call_function" and (
        node.target is operator.getitem or getattr(node.target, "__module__", "") == "_operator"
    ):
        return any(is_tensor(n) for n in node.all_input_nodes)
    return True


def depends_on_images(node: fx.Node) -> bool:
    """Whether what ``node`` yields depends on the network's input, if only on its shape; else it is
    the same for all images.
    """
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
    """All nodes of which ``depends_on_images`` is true, found in one pass."""
    dependent: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "placeholder" or not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent


def calls_layer(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` calls a conv or linear."""
    return is_layer(module_of(node, traced))


def calls_batchnorm(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` calls a BatchNorm."""
    return isinstance(module_of(node, traced), BATCHNORMS)


def folds_into(node: fx.Node, traced: fx.GraphModule) -> list[fx.Node]:
    """The calls of the convs or linears, in the order of their channels, that can take in the
    BatchNorm that ``node`` calls.

    It has running statistics and alone follows them: directly, behind a concat of channels, or
    behind a linear's rows made one matrix; so at each call of either, as where two inputs pass one
    stem. The list is empty if it cannot be folded.
    """
    batchnorm: Any = module_of(node, traced)
    if not calls_batchnorm(node, traced) or batchnorm.running_var is None:
        return []
    uses = _uses_of(node, traced)
    found = [_layers_before(use, traced) for use in uses if use.target == node.target]
    if len(found) < len(uses) or any(
        [part.target for part in parts] != [part.target for part in found[0]] for parts in found
    ):
        return []
    if any(set(_uses_of(calls[0], traced)) != set(calls) for calls in zip(*found, strict=True)):
        return []
    parts = found[uses.index(node)]
    channels = sum(layer_at(traced, str(part.target)).weight.shape[0] for part in parts)
    return parts if channels == batchnorm.num_features else []


def _layers_before(node: fx.Node, traced: fx.GraphModule) -> list[fx.Node]:
    """The calls of convs or linears whose outputs the BatchNorm ``node`` alone reads; none if it
    reads anything else.
    """
    before = node.all_input_nodes[0]
    if _flattens_rows(before, traced) and len(before.users) == 1:
        before = before.all_input_nodes[0]
        parts = [before] if hasattr(module_of(before, traced), "in_features") else []
    else:
        parts = (
            list(before.all_input_nodes)
            if _concats_channels(before, traced) and len(before.users) == 1
            else [before]
        )
    return (
        parts
        if all(calls_layer(part, traced) and len(_readers(part)) == 1 for part in parts)
        else []
    )


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who uses the values of ``node``, and not its shape alone."""
    as_shape = {"reshape_as", "view_as"}
    return [
        user
        for user in node.users
        if is_tensor(user) and not (user.target in as_shape and user.args[0] is not node)
    ]


def _concats_channels(node: fx.Node, traced: fx.GraphModule) -> bool:
    if not is_cat(node, traced):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return bool(dim == 1)


def _flattens_rows(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` makes one matrix of ``[N, L, C]``."""
    is_flatten = operation_of(node, traced).name == "flatten"
    return is_flatten and node.args[1:] in ((0, 1), (0, -2))


def is_used_once(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether nothing else uses the weight of the module that ``node`` calls: no other call of this
    module or of one that shares the weight, and no operation that reads its values.

    Otherwise what suits one is wrong for the other.
    """
    return len(_uses_of(node, traced)) == 1


def _uses_of(node: fx.Node, traced: fx.GraphModule) -> list[fx.Node]:
    """What uses the weight of the module that ``node`` calls, in order: calls, its own or of what
    shares it, and reads.
    """

    def weight(node: fx.Node) -> Any:
        module = module_of(node, traced)
        own = getattr(module, "weight", None)
        return module if own is None else own

    def reads_values(other: fx.Node) -> bool:
        return (
            other.op == "get_attr"
            and other.target == f"{node.target}.weight"
            and any(map(is_tensor, other.users))
        )

    def calls_it(other: fx.Node) -> bool:
        return other.op == "call_module" and weight(other) is weight(node)

    return [other for other in traced.graph.nodes if calls_it(other) or reads_values(other)]


def activation_of(node: fx.Node, traced: fx.GraphModule) -> str | None:
    """``"relu"`` or ``"relu6"`` for a node that a quantizer can stand in for, else None."""
    return operation_of(node, traced).absorbed_as


def _operands_are_activations(node: fx.Node) -> bool:
    operands = node.args[:2]
    return all(
        isinstance(a, fx.Node)
        and is_tensor(a)
        and depends_on_images(a)
        and not a.meta.get(INTEGERS)
        for a in operands
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
