"""Turns functions with weights into modules.

Convs, linears and BatchNorms that a network calls as functions are then pruned, folded and
quantized like others.

A weight that is a parameter of the user's stays that very parameter. It keeps the user's key where
a module of its own holds it (as in timm's ``Conv2dSame``). A weight that is computed from
parameters only, as in weight standardization, is computed once and becomes a parameter itself,
which is trained only if one of those was. If one of those is used elsewhere too, as where a head
also takes its weight normalized, the two would drift apart in training: such a call stays a
function, in float.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qat_tricks.graph.submodules import attribute_at
from qat_tricks.graph.two_modes import FOLLOWS_MODE, NO_GRAD

_MODULE_OF: dict[Any, type[nn.Module]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.linear: nn.Linear,
}
# The functions' arguments in their order; linears have the first three.
_TENSORS = ("input", "weight", "bias")
_CONV_SETTINGS = ("stride", "padding", "dilation", "groups")
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_BATCHNORM_ARGUMENTS = (
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)

Arguments = dict[str, Any]
"""The arguments of one call by name; tensors are nodes."""


def functions_to_modules(traced: fx.GraphModule, network: nn.Module, *, every: bool = True) -> None:
    """Replaces functions with constant weights by modules.

    These are ``F.conv1d``, ``F.conv2d``, ``F.conv3d``, ``F.linear``, and ``F.batch_norm`` called
    from within a BatchNorm.

    Args:
        traced: the graph module just traced from ``network``; it is changed in place.
        network: the user's.
        every: also each ``F.batch_norm`` of which it is not known whether training takes it to the
            statistics of the batch.
    """
    read_before = _read_attributes(traced)
    for calls in _calls_by_weights(traced):
        first, arguments = calls[0]
        module = _module(_MODULE_OF[first.target], arguments, traced)
        # The name decides the checkpoint's keys: a made-up one only where the user has none.
        name = _user_name({node for node, _ in calls}, arguments["weight"], traced)
        name = name or f"layers.{first.name}"
        install(traced, name, module)
        for node, call_arguments in calls:
            call_instead(node, name, call_arguments["input"])
    for node in traced.graph.nodes:
        is_batchnorm = node.op == "call_function" and node.target is F.batch_norm
        # One that uses its running statistics in training too is none of torch.nn's modules.
        if is_batchnorm and (every or node.meta.pop(FOLLOWS_MODE, False)):
            _batchnorm_to_module(node, traced, network)
    _drop_unused(traced, read_before)  # the weights' nodes, and those that computed them
    traced.recompile()


def _calls_by_weights(traced: fx.GraphModule) -> list[list[tuple[fx.Node, Arguments]]]:
    """The calls that can become modules; those that compute with the same numbers together.

    Such calls become one module: a weight must not be there twice.
    """
    calls: dict[Any, list[tuple[fx.Node, Arguments]]] = {}
    for node in traced.graph.nodes:
        if node.op != "call_function" or node.target not in _MODULE_OF:
            continue
        arguments = _arguments(node)
        if arguments is not None:
            # Two calls compute with the same numbers if these come from the same parameters.
            weights = _origin(arguments["weight"]), _origin(arguments["bias"])
            settings = {key: arguments[key] for key in _CONV_SETTINGS}
            key = node.target, repr(settings), arguments["bias"] is None, weights
            calls.setdefault(key, []).append((node, arguments))
    users = _users_of_parameters(traced)
    return [group for group in calls.values() if _may_be_computed_once(group, users, traced)]


def _users_of_parameters(traced: fx.GraphModule) -> dict[int, list[fx.Node]]:
    """For each tensor that the network holds, by identity, the nodes that compute with it."""
    users: dict[int, list[fx.Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            values = users.setdefault(id(attribute_at(traced, str(node.target))), [])
            values += [user for user in node.users if not _reads_shape(user)]
        elif node.op == "call_module":
            for parameter in traced.get_submodule(str(node.target)).parameters():
                users.setdefault(id(parameter), []).append(node)
    return users


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def _may_be_computed_once(
    group: list[tuple[fx.Node, Arguments]],
    users: dict[int, list[fx.Node]],
    traced: fx.GraphModule,
) -> bool:
    """Whether the parameters that a weight or bias is computed from are used for nothing else.

    One that is a parameter itself stays that parameter, and may be shared. One that is computed
    from buffers too, from frozen parameters beside others, or without a gradient, has to go on
    being computed: as a parameter it would forget them.
    """
    calls = {node for node, _ in group}
    for name in ("weight", "bias"):
        computed: fx.Node | None = group[0][1][name]
        if computed is None or computed.op == "get_attr":
            continue
        sources = _tensors_of(computed, traced)
        parameters = [source for source in sources if isinstance(source, nn.Parameter)]
        trains = {parameter.requires_grad for parameter in parameters}
        is_mixed = len(trains) > 1 or len(parameters) < len(sources)
        if True in trains and (is_mixed or _is_detached(computed)):
            return False
        for source in parameters:
            if not all(_is_constant_for(user, calls) for user in users[id(source)]):
                return False
    return True


def _is_constant_for(node: fx.Node, calls: set[fx.Node]) -> bool:
    """Whether ``node`` is one of ``calls``, or computes a constant that only they take."""
    if node in calls:
        return True
    is_constant = node.op != "call_module" and _origin(node) is not None
    return is_constant and all(_is_constant_for(user, calls) for user in node.users)


def _tensors_of(node: fx.Node, traced: fx.GraphModule) -> list[Tensor]:
    """The parameters and buffers that a node is computed from."""
    if node.op == "get_attr":
        return [attribute_at(traced, str(node.target))]
    return [value for source in node.all_input_nodes for value in _tensors_of(source, traced)]


def _is_detached(node: fx.Node) -> bool:
    """Whether no gradient passes through the computation of a constant."""
    if node.target == "detach" or node.meta.get(NO_GRAD) or "data" in node.args[1:]:
        return True
    return any(_is_detached(source) for source in node.all_input_nodes)


def _batchnorm_to_module(node: fx.Node, traced: fx.GraphModule, network: nn.Module) -> None:
    """Makes a module of an ``F.batch_norm``.

    It was traced in evaluation mode, and as a function it would stay in that mode.
    """
    arguments = {
        "training": False,
        **dict(zip(_BATCHNORM_ARGUMENTS, node.args, strict=False)),
        **node.kwargs,
    }
    mean: Any = arguments["running_mean"]
    if not isinstance(mean, fx.Node) or mean.op != "get_attr" or arguments["training"] is not False:
        return
    # The module that holds the statistics tells the kind, and the settings that a call hides.
    owner = str(mean.target).rpartition(".")[0]
    original: Any = network.get_submodule(owner)
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    kind = next((kind for kind in kinds if isinstance(original, kind)), None)
    if kind is None or not _has_its_own(arguments, owner, original):
        return
    if type(traced.get_submodule(owner)) is not kind:
        # Of a class derived from a BatchNorm only that part is called: the rest was traced.
        module = kind(
            original.num_features,
            original.eps,
            original.momentum,
            original.affine,
            original.track_running_stats,
            device="meta",
        )
        module._parameters, module._buffers = original._parameters, original._buffers
        install(traced, owner, module.train(original.training))
    call_instead(node, owner, arguments["input"])


def _has_its_own(arguments: Arguments, owner: str, original: Any) -> bool:
    """Whether a call scales and shifts by the parameters of the BatchNorm that it is called in."""
    for name in ("weight", "bias"):
        given: Any = arguments.get(name)
        own = getattr(original, name)
        path = f"{owner}.{name}" if owner else name
        if (own is None) != (given is None) or (given is not None and given.target != path):
            return False
    return True


def install(traced: fx.GraphModule, name: str, module: nn.Module) -> None:
    """Adds ``module`` as ``name``; it takes over the parts of an earlier module of that name.

    timm's BatchNorms hold an activation as such a part.
    """
    owner, _, last = name.rpartition(".")
    try:
        before = getattr(traced.get_submodule(owner), last, None)
    except AttributeError:
        before = None
    if isinstance(before, nn.Module):
        for part, child in before.named_children():
            module.add_module(part, child)
    traced.add_submodule(name, module)


def call_instead(node: fx.Node, module: str, tensor: Any) -> None:
    """Turns ``node`` into a call of ``module`` with ``tensor``, and lets it keep its name.

    The caller recompiles.
    """
    node.op, node.target, node.args, node.kwargs = "call_module", module, (tensor,), {}


def _arguments(node: fx.Node) -> Arguments | None:
    """The arguments, or None where the weight, the bias or a setting depends on the input."""
    positional = dict(zip((*_TENSORS, *_CONV_SETTINGS), node.args, strict=False))
    arguments = {**_DEFAULTS, **positional, **node.kwargs}
    weight: Any = arguments["weight"]
    bias: Any = arguments["bias"]
    if not isinstance(weight, fx.Node) or _origin(weight) is None or _origin(bias) is None:
        return None
    settings = [value for key in _CONV_SETTINGS for value in _flat(arguments[key])]
    return None if any(isinstance(value, fx.Node) for value in settings) else arguments


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _origin(node: fx.Node | None) -> str | None:
    """How a tensor is made of the network's parameters, as text.

    Empty for no tensor, None if the tensor depends on the input.
    """
    if node is None:
        return ""
    if node.op == "get_attr":
        return str(node.target)
    if node.op in ("placeholder", "call_module") or not node.all_input_nodes:
        return None
    # A call of constants is a constant, described by its arguments' descriptions.
    if any(_origin(source) is None for source in node.all_input_nodes):
        return None
    return f"{node.target}({fx.map_arg((node.args, node.kwargs), _origin)})"


def _module(kind: type[nn.Module], arguments: Arguments, traced: fx.GraphModule) -> nn.Module:
    """A conv or linear that computes as a function does with ``arguments``."""
    weight, bias = (_parameter(arguments[name], traced) for name in ("weight", "bias"))
    assert weight is not None
    # A conv's weight has the input channels of one group only.
    out, into, *kernel = weight.shape
    # On the meta device, so that no values are drawn: random states stay as they were.
    settings: dict[str, Any] = {"bias": bias is not None, "device": "meta"}
    if kind is nn.Linear:
        sizes: tuple[Any, ...] = (into, out)
    else:
        sizes = (into * arguments["groups"], out, tuple(kernel))
        settings |= {key: arguments[key] for key in _CONV_SETTINGS}
    module = kind(*sizes, **settings)
    module.register_parameter("weight", weight)
    module.register_parameter("bias", bias)
    return module


def _parameter(node: fx.Node | None, traced: fx.GraphModule) -> nn.Parameter | None:
    """The parameter that ``node`` yields: the user's own, or a new one with the computed values.

    A new one is trained if it is computed from one that is: a fixed kernel in a buffer is not.
    """
    if node is None:
        return None
    with torch.no_grad():
        value = _value(node, traced)
    if isinstance(value, nn.Parameter):
        return value
    is_trained = any(source.requires_grad for source in _tensors_of(node, traced))
    return nn.Parameter(value.detach().clone(), requires_grad=is_trained)


def _value(node: fx.Node, traced: fx.GraphModule) -> Tensor:
    """The value of a node that depends on nothing but parameters."""
    if node.op == "get_attr":
        return attribute_at(traced, str(node.target))

    def value(source: fx.Node) -> Any:
        return _value(source, traced)

    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    function: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    return function(*args, **kwargs)


def _user_name(calls: set[fx.Node], weight: fx.Node, traced: fx.GraphModule) -> str | None:
    """The user's name for the module of these calls, so that the checkpoint's keys stay the user's.

    It is the path of the module that holds the weight for nothing but these calls, or ``in_proj``
    beside a weight called ``in_proj_weight``. None for others.
    """
    while weight.op != "get_attr":  # back to the parameter that it is computed from
        weight = weight.all_input_nodes[0]
    owner, _, name = str(weight.target).rpartition(".")
    prefix = name.removesuffix("_weight")
    if owner and prefix != name and not hasattr(traced.get_submodule(owner), prefix):
        return f"{owner}.{prefix}"
    # If other nodes call the owner or read its parameters, it must stay as it is.
    if any(
        node.op == "call_module" and f"{owner}.".startswith(f"{node.target}.")
        for node in traced.graph.nodes
    ):
        return None
    readers = {
        user
        for node in traced.graph.nodes
        if node.op == "get_attr" and str(node.target).rpartition(".")[0] == owner
        for user in node.users
    }
    return owner if owner and name == "weight" and _only_for(readers, calls) else None


def _only_for(users: set[fx.Node], calls: set[fx.Node]) -> bool:
    """Whether all that ``users`` compute goes into ``calls``."""
    return all(
        user in calls or (user.users and _only_for(set(user.users), calls)) for user in users
    )


def _read_attributes(traced: fx.GraphModule) -> set[str]:
    """The names of the parameters and buffers that nodes read."""
    return {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}


def _drop_unused(traced: fx.GraphModule, read_before: set[str]) -> None:
    """Removes nodes and parameters that nothing computes with any more.

    An optimizer would wait for the gradients of such parameters. Those that the user's own network
    did not use stay.

    Args:
        traced: with modules in the place of functions.
        read_before: the parameters that nodes read before.
    """
    # Backwards, so that a node's readers are gone before the node is looked at.
    for node in reversed(list(traced.graph.nodes)):
        is_constant = node.op == "get_attr" or (
            node.op.startswith("call_") and _origin(node) is not None
        )
        if is_constant and not node.users:
            traced.graph.erase_node(node)
    # Parameters outside of modules that are called, and that no node reads, are dead.
    dead = read_before - _read_attributes(traced)
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    for name, _ in list(traced.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        # A module that is called uses its parameters and those of its parts.
        is_used = any(owner == module or owner.startswith(f"{module}.") for module in called)
        if name in dead and not is_used:
            # Still an attribute, which the module's own description may read.
            traced.get_submodule(owner)._parameters[attribute] = None
