"""What a node of a traced network is, seen from an integer kernel."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_tricks.graph.attention import from_windows, to_windows
from qat_tricks.graph.integer_ops import Add, Elementwise, Mean, Mul
from qat_tricks.graph.layers import is_layer
from qat_tricks.graph.trace import layer_at, module_of
from qat_tricks.numerics import ActivationQuantizer

_ADD: set[Any] = {Add, operator.add, operator.iadd, torch.add, "add", "add_"}
_MUL: set[Any] = {Mul, operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_CAT: set[Any] = {torch.cat, torch.concat, torch.concatenate}
_ARITHMETIC: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.sub, torch.mul, torch.div,
    "add", "sub", "mul", "div", "add_", "mul_",
}  # fmt: skip
_POOL: set[Any] = {
    nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, torch.mean, "mean", Mean,
}  # fmt: skip
# These move values about and make no new ones: what was on a grid stays on it.
_PASS: set[Any] = {
    nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.ChannelShuffle,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d,
    F.max_pool1d, F.max_pool2d, F.adaptive_max_pool2d, F.channel_shuffle, F.pixel_shuffle, to_windows, from_windows,
    operator.getitem,
    torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.chunk, torch.split,
    "flatten", "unflatten", "view", "view_as", "reshape", "reshape_as",
    "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "chunk", "split", "expand",
}  # fmt: skip
_DROPOUTS: set[Any] = {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout}
_DROPOUT_NAMES = {"StochasticDepth", "DropPath", "DropBlock2d"}
# in a node's meta, where ``note_integers`` has seen what it yields
INTEGERS = "qat_tricks.integers"
_SIZES = {"size", "dim", "numel", "shape"}
# 1d to 3d, synchronized, and what Lightning makes of a synchronized one
BATCHNORMS = (nn.modules.batchnorm._BatchNorm,)
_ACTIVATIONS: dict[Any, str] = {
    nn.ReLU: "relu", F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu_: "relu", "relu": "relu", "relu_": "relu",
    nn.ReLU6: "relu6", F.relu6: "relu6",
}  # fmt: skip


def _kind_of(node: fx.Node, traced: fx.GraphModule) -> Any:
    """What the node calls: a module's type, a function, or a method's name."""
    module = module_of(node, traced)
    return type(module) if module is not None else node.target


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


def calls(node: fx.Node, traced: fx.GraphModule, kinds: set[Any]) -> bool:
    """Whether ``node`` is a call of one of ``kinds``."""
    return node.op.startswith("call_") and _kind_of(node, traced) in kinds


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
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    return is_cat(node, traced) and bool(dim == 1)


def _flattens_rows(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` makes one matrix of ``[N, L, C]``."""
    return calls(node, traced, {torch.flatten, "flatten"}) and node.args[1:] in ((0, 1), (0, -2))


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
    if not node.op.startswith("call_"):
        return None
    kind = _kind_of(node, traced)
    if kind is nn.Hardtanh or kind is F.hardtanh:
        module = module_of(node, traced)
        low, high = (
            (module.min_val, module.max_val)
            if isinstance(module, nn.Hardtanh)
            else (*node.args, -1.0, 1.0)[1:3]
        )
        return "relu6" if (low, high) == (0, 6) else None
    return _ACTIVATIONS.get(kind)


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
    return calls(node, traced, _CAT)


def is_integer_op(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether an integer kernel exists for ``node`` that takes and makes quantized tensors (convs
    and linears aside).
    """
    if calls(node, traced, _ADD | _MUL):
        return _operands_are_activations(node)
    return calls(node, traced, _POOL) and is_tensor(node)


def is_arithmetic(node: fx.Node) -> bool:
    """Whether ``node`` adds, multiplies or the like: numbers, constants or activations."""
    return node.target in _ARITHMETIC


def is_dropout(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` returns its input in evaluation, and not in training."""
    kind = _kind_of(node, traced)
    return kind in _DROPOUTS or (isinstance(kind, type) and kind.__name__ in _DROPOUT_NAMES)


def is_passthrough(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether the values of ``node`` are values of its first input: on a grid if that one is."""
    if node.target is F.pad:
        mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        value = node.kwargs.get("value", node.args[3] if len(node.args) > 3 else 0.0)
        return bool(mode == "constant" and value in (0, None))  # zero is on every grid
    if not node.op.startswith("call_") or not is_tensor(node):
        return False
    kind, module = _kind_of(node, traced), module_of(node, traced)
    if isinstance(module, nn.Upsample) or kind is F.interpolate:
        mode = (
            module.mode if isinstance(module, nn.Upsample) else node.kwargs.get("mode", "nearest")
        )
        return bool(mode == "nearest")
    return kind in _PASS or is_dropout(node, traced)


def only_user(node: fx.Node, test: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The one user of ``node`` if there is just one and it passes ``test``."""
    users = list(node.users)
    return users[0] if len(users) == 1 and test(users[0]) else None


def elementwise_of(node: fx.Node, traced: fx.GraphModule) -> type[Elementwise] | None:
    """The kind of kernel for a ``node`` that adds or multiplies two activations, and does nothing
    else.
    """
    if len(node.args) != 2 or node.kwargs or not _operands_are_activations(node):
        return None
    return Add if calls(node, traced, _ADD) else Mul if calls(node, traced, _MUL) else None


def mean_of(node: fx.Node, traced: fx.GraphModule) -> tuple[tuple[int, ...], bool] | None:
    """Over which dimensions ``node`` averages all positions, and whether it keeps them; None if it
    does something else.
    """
    module = module_of(node, traced)
    if isinstance(module, Mean):
        return module.dims, module.keepdim
    pools = isinstance(module, nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d
    names = ("input", "output_size") if pools else ("input", "dim", "keepdim")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if pools:
        size = (
            module.output_size if isinstance(module, nn.AdaptiveAvgPool2d) else given["output_size"]
        )
        return ((-2, -1), True) if size in (1, (1, 1), [1, 1]) else None
    if not is_spatial_mean(node, traced) or not node.kwargs.keys() <= {"dim", "keepdim"}:
        return None
    return tuple(given["dim"]), bool(given.get("keepdim", False))


def output_quantizer_of(node: fx.Node, traced: fx.GraphModule) -> ActivationQuantizer | None:
    """The quantizer that alone uses ``node``, or None."""
    user = only_user(node, lambda user: True)
    module = None if user is None else module_of(user, traced)
    return module if isinstance(module, ActivationQuantizer) else None


def input_quantizer_of(node: fx.Node, traced: fx.GraphModule) -> ActivationQuantizer | None:
    """The quantizer whose grid the first input of ``node`` is on, or None."""
    return quantizer_of(node.all_input_nodes[0], traced)


def quantizer_of(source: fx.Node, traced: fx.GraphModule) -> ActivationQuantizer | None:
    """The quantizer whose grid the values of ``source`` are on, or None."""
    while True:
        module = module_of(source, traced)
        if isinstance(module, ActivationQuantizer):
            return module
        if not source.all_input_nodes or not (
            is_passthrough(source, traced) or is_cat(source, traced)
        ):
            return None
        source = source.all_input_nodes[0]


def is_spatial_mean(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` averages over positions, not over channels or images."""
    if not calls(node, traced, {torch.mean, "mean"}):
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = [dims] if isinstance(dims, int) else dims
    return isinstance(dims, (list, tuple)) and set(dims) <= {2, 3, -1, -2} and (len(dims) == 2)
