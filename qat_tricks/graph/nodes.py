"""Questions about a node of a traced network: which layer, BatchNorm or operation it calls.

Every other module asks here, and not in the graph or the table itself.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from qat_tricks.graph.integer_ops import Elementwise, Mean
from qat_tricks.graph.layers import BATCHNORMS, is_layer
from qat_tricks.graph.logits import part_with_logits
from qat_tricks.graph.operations import (
    BITWISE,
    INDICES_SECOND,
    INTEGER_RESULTS,
    UNKNOWN,
    Arguments,
    Operation,
    entries_for,
)
from qat_tricks.graph.submodules import attribute_at, layer_at, module_of
from qat_tricks.graph.two_modes import TRAINING, by_mode, only_in

# The key in a node's meta under which ``note_integers`` says that it yields integers.
INTEGERS = "qat_tricks.integers"
_SIZES = {"size", "dim", "numel", "shape"}  # methods that yield no tensor
# Modules of functions that yield a tensor only of tensors, as ``+``, ``math.ceil`` and ``max``.
_OF_NUMBERS = ("_operator", "math", "builtins")


def operation_of(node: fx.Node, traced: fx.GraphModule) -> Operation:
    """The entry in the table of operations for the call of ``node``, or ``UNKNOWN``."""
    if not node.op.startswith("call_"):
        return UNKNOWN
    module = module_of(node, traced)
    for operation in entries_for(node.target if module is None else type(module)):
        if operation.when(arguments_of(node, traced, operation)):
            return operation
    return UNKNOWN


def arguments_of(
    node: fx.Node, traced: fx.GraphModule, operation: Operation | None = None
) -> Arguments:
    """A module's attributes, or the arguments of a function or method by name.

    Args:
        node: a call.
        traced: the network.
        operation: the entry that names the arguments; None: that of ``node``.
    """
    module = module_of(node, traced)
    operation = operation_of(node, traced) if operation is None else operation
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
        node.target is operator.getitem or getattr(node.target, "__module__", "") in _OF_NUMBERS
    ):
        return any(is_tensor(n) for n in node.all_input_nodes)
    return True


def depends_on_images(node: fx.Node) -> bool:
    """Whether the result of ``node`` depends on the network's input, if only on its shape.

    Otherwise it is the same for all images. ``nodes_from_images`` asks it of all nodes at once.
    """
    return any(source.op == "placeholder" for source in _upstream(node))


def _upstream(node: fx.Node) -> Iterator[fx.Node]:
    """``node``, and the nodes that its result depends on."""
    # Not recursive: deep networks would exceed Python's limit.
    seen, left = {node}, [node]
    while left:
        node = left.pop()
        yield node
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        left += new


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


def modules_before_logits(traced: fx.GraphModule) -> set[str]:
    """The names of the modules that the logits depend on, in evaluation.

    A network may yield more than its logits. Of what only those other values depend on, the error
    of the logits says nothing, and it would seem to do no harm whatever becomes of it.
    """
    logits = part_with_logits(traced.graph.output_node().args[0])
    if isinstance(logits, fx.Node) and logits.target is by_mode:
        logits = part_with_logits(logits.args[0])
    if not isinstance(logits, fx.Node):
        return {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    return {str(node.target) for node in _upstream(logits) if node.op == "call_module"}


def calls_layer(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` calls a conv or linear."""
    return is_layer(module_of(node, traced))


def calls_batchnorm(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` calls a BatchNorm."""
    return isinstance(module_of(node, traced), BATCHNORMS)


Uses = Mapping[fx.Node, Sequence[fx.Node]]
"""For each call of a module, all nodes that use its weight or bias, that call among them."""


def uses_of_weights(traced: fx.GraphModule) -> Uses:
    """The users of the weight and of the bias of each module that is called, found in one pass.

    They are used by each call of their module, or of another module that shares one of them or has
    a part that does, and by each operation that reads their values. A module without a weight
    counts as its own.
    """
    users: dict[int, list[fx.Node]] = {}  # by the identity of a parameter, or of a module
    own: dict[fx.Node, list[int]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            module = layer_at(traced, str(node.target))
            named = dict(module.named_parameters(recurse=False))
            own[node] = [id(named[key]) for key in ("weight", "bias") if key in named]
            own[node] = own[node] if "weight" in named else [id(module), *own[node]]
            # Those of its parts are used too, where they are shared with modules that are called.
            for key in {*own[node], *map(id, module.parameters())}:
                users.setdefault(key, []).append(node)
        elif node.op == "get_attr" and any(map(is_tensor, node.users)):
            users.setdefault(id(attribute_at(traced, str(node.target))), []).append(node)
    return {
        node: list(dict.fromkeys(user for key in keys for user in users[key]))
        for node, keys in own.items()
    }


def is_used_once(node: fx.Node, uses: Uses) -> bool:
    """Whether nothing but the call ``node`` uses the weight of the module that it calls.

    Otherwise a change of the weight that suits one use is wrong for the other.
    """
    return len(uses.get(node, ())) == 1


def activation_of(node: fx.Node, traced: fx.GraphModule) -> str | None:
    """``"relu"`` or ``"relu6"`` for a node that a quantizer can stand in for, else None."""
    return operation_of(node, traced).absorbed_as


def yields_integers(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` yields integers or truth values, which no quantizer may round.

    What ``note_integers`` noted counts first; else it is seen in the graph.
    """
    # Not recursive: deep networks would exceed Python's limit. All that is left must be integers.
    seen, left = {node}, [node]
    while left:
        node = left.pop()
        known = _is_known_integer(node, traced)
        if known is False:
            return False
        if known is None:
            operands = _operands_of_integers(node, traced)
            if not operands or any(isinstance(operand, float) for operand in operands):
                return False
            new = [o for o in operands if isinstance(o, fx.Node) and o not in seen]
            seen.update(new)
            left += new
    return True


def _is_known_integer(node: fx.Node, traced: fx.GraphModule) -> bool | None:
    """Whether ``node`` yields integers; None where that depends on its operands."""
    if INTEGERS in node.meta:
        return bool(node.meta[INTEGERS])
    dtypes = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype)]
    if dtypes:
        return not bool(dtypes[0].is_floating_point or dtypes[0].is_complex)
    return True if node.target in INTEGER_RESULTS or _is_index_part(node, traced) else None


def _is_index_part(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` takes the indices out of a tuple of values and indices."""
    if node.target is getattr:
        return bool(node.args[1] == "indices")
    if node.target is not operator.getitem or node.args[1] not in (1, -1):
        return False
    source: Any = node.args[0]
    return (
        source.target in INDICES_SECOND
        or operation_of(source, traced).name == "max_pool_with_indices"
    )


def _operands_of_integers(node: fx.Node, traced: fx.GraphModule) -> Sequence[Any]:
    """The operands of which a node makes integers if all of them are; none of other nodes."""
    operation = operation_of(node, traced)
    if node.target in BITWISE or (operation.is_arithmetic and operation.name != "div"):
        return node.args
    if node.target in (torch.where, "where") and len(node.args) == 3:
        return node.args[1:]
    if node.target is torch.arange:
        return node.args
    return node.all_input_nodes[:1] if is_passthrough(node, traced) else ()


def _operands_are_activations(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether both operands are tensors made from the images, and no integers such as token ids."""
    return all(
        isinstance(operand, fx.Node)
        and is_tensor(operand)
        and depends_on_images(operand)
        and not yields_integers(operand, traced)
        for operand in node.args[:2]
    )


def is_cat(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` concatenates tensors; its inputs share one range."""
    if not operation_of(node, traced).concatenates:
        return False
    parts: Any = node.args[0] if node.args else node.kwargs.get("tensors")
    # A tuple that some operation has computed is no list of tensors with a grid each.
    if isinstance(parts, fx.Node):
        return is_passthrough(parts, traced)
    return not any(yields_integers(part, traced) for part in node.all_input_nodes)


def is_integer_op(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether an integer kernel takes and makes the quantized tensors of ``node``.

    Convs and linears are not meant: ``calls_layer`` finds them.
    """
    operation = operation_of(node, traced)
    if operation.kernel is not None:
        return _operands_are_activations(node, traced)
    if not operation.averages or not is_tensor(node):
        return False
    return not yields_integers(node.all_input_nodes[0], traced)


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
    operation = operation_of(node, traced)
    if not operation.moves_values or not is_tensor(node):
        return False
    return node.target is not operator.getitem or not is_computed_part(node, traced)


def is_computed_part(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` takes an entry of what an operation has computed, such as a tuple.

    Then its values are new ones, and not those of the operation's input. What an operation without
    an entry in the table yields is taken for a tuple if it is asked for an entry by its number.
    """
    if node.target is getattr:
        return node.args[1] not in ("shape", "ndim", "dtype", "device", "T", "mT", "H", "data")
    if node.target is not operator.getitem:
        return False
    source, index = cast("tuple[fx.Node, Any]", node.args)
    operation = operation_of(source, traced)
    if operation.yields_parts:
        return operation.name == "max_pool_with_indices" and index != 0
    if not isinstance(index, (int, str)) or not source.op.startswith("call_"):
        return False
    if source.target is operator.getitem:
        return is_computed_part(source, traced)
    is_known = operation is not UNKNOWN or calls_layer(source, traced)
    return not is_known and not calls_batchnorm(source, traced)


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
    return kernel if _operands_are_activations(node, traced) else None


def mean_of(node: fx.Node, traced: fx.GraphModule) -> tuple[tuple[int, ...], bool] | None:
    """Over which dimensions ``node`` averages all positions, and whether it keeps them.

    None if it does something else.
    """
    module = module_of(node, traced)
    if isinstance(module, Mean):  # put there when quantizers were last connected
        return module.dims, module.keepdim
    operation = operation_of(node, traced)
    arguments = arguments_of(node, traced, operation)
    if operation.name == "adaptive_avg_pool2d":
        return ((-2, -1), True) if arguments["output_size"] in (1, (1, 1), [1, 1]) else None
    if operation.name != "mean_of_positions" or not node.kwargs.keys() <= {"dim", "keepdim"}:
        return None
    return tuple(arguments["dim"]), bool(arguments.get("keepdim", False))
