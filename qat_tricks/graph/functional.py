"""Convs, linears and BatchNorms that a network calls as functions become modules, to be pruned,
folded and quantized like others.

A weight that is a parameter of the user's stays that very parameter, under the user's key where a
module of its own holds it (as in timm's ``Conv2dSame``). One that is computed from parameters
alone, as in weight standardization, is computed once: from then on it is a parameter itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_MODULE_OF: dict[Callable[..., Tensor], type[nn.Module]] = {
    F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d, F.linear: nn.Linear,
}  # fmt: skip
_CONV_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def functions_to_modules(traced: fx.GraphModule, network: nn.Module) -> None:
    """Replaces calls of ``F.conv1d``, ``F.conv2d``, ``F.conv3d`` and ``F.linear`` with a constant
    weight, and of ``F.batch_norm`` from within a BatchNorm, by modules.

    Args:
        traced: the graph module just traced from ``network``.
    """
    # by what they compute with: one module each
    calls: dict[Any, list[tuple[fx.Node, dict[str, Any]]]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target in _MODULE_OF and (given := _arguments(node)):
            settings = {
                name: value for name, value in given.items() if not isinstance(value, fx.Node)
            }
            key = node.target, repr(settings), _origin(given["weight"]), _origin(given["bias"])
            calls.setdefault(key, []).append((node, given))
    for same in calls.values():
        first, given = same[0]
        name = _name({node for node, _ in same}, given["weight"], traced) or f"layers.{first.name}"
        install(traced, name, _module(_MODULE_OF[first.target], given, traced))  # type: ignore[index]
        for node, given in same:
            node.op, node.target, node.args, node.kwargs = (
                "call_module",
                name,
                (given["input"],),
                {},
            )
    for node in traced.graph.nodes:
        if node.op == "call_function" and node.target is F.batch_norm:
            _batchnorm_to_module(node, traced, network)
    _drop_unused(traced)
    traced.recompile()


def _batchnorm_to_module(node: fx.Node, traced: fx.GraphModule, network: nn.Module) -> None:
    """Makes a module of an ``F.batch_norm``, which was traced in evaluation mode and would stay in
    it.
    """
    names = [
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    ]
    given = {"training": False, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    mean = given["running_mean"]
    if not isinstance(mean, fx.Node) or mean.op != "get_attr" or given["training"] is not False:
        return
    owner = str(mean.target).rpartition(".")[0]
    original: Any = network.get_submodule(owner)
    kind = next(
        (
            kind
            for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
            if isinstance(original, kind)
        ),
        None,
    )
    if kind is None:
        return
    if not isinstance(traced.get_submodule(owner), kind):
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
    node.op, node.target, node.args, node.kwargs = "call_module", owner, (given["input"],), {}


def install(traced: fx.GraphModule, name: str, module: nn.Module) -> None:
    """Adds ``module`` as ``name``; what was there before leaves it its parts (timm's BatchNorms
    hold an activation).
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


def _arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments by name, or None where the weight, the bias or a setting depends on the input."""
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    given = {**_CONV_DEFAULTS, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    tensors = given["weight"], given["bias"]
    if not isinstance(given["weight"], fx.Node) or any(
        _origin(t) is None for t in tensors if t is not None
    ):
        return None
    if any(isinstance(value, fx.Node) for key in names[3:] for value in _flat(given[key])):
        return None
    return given


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _origin(node: Any) -> str | None:
    """How a tensor is made of the network's parameters, as text; None if it depends on the input."""
    if node is None:
        return ""
    if node.op == "get_attr":
        return str(node.target)
    if node.op == "placeholder" or node.op == "call_module" or not node.all_input_nodes:
        return None
    if any(_origin(source) is None for source in node.all_input_nodes):
        return None
    return f"{node.target}({fx.map_arg((node.args, node.kwargs), _origin)})"


def _module(kind: type[nn.Module], given: dict[str, Any], traced: fx.GraphModule) -> nn.Module:
    weight, bias = (_parameter(given[name], traced) for name in ("weight", "bias"))
    assert weight is not None
    out, into, *kernel = weight.shape
    settings: dict[str, Any] = {"bias": bias is not None, "device": "meta"}
    if kind is not nn.Linear:
        settings |= {key: given[key] for key in ("stride", "padding", "dilation", "groups")}
    sizes = (into, out) if kind is nn.Linear else (into * given["groups"], out, tuple(kernel))
    module = kind(*sizes, **settings)
    module.register_parameter("weight", weight)
    module.register_parameter("bias", bias)
    return module


def _parameter(node: fx.Node | None, traced: fx.GraphModule) -> nn.Parameter | None:
    if node is None:
        return None
    with torch.no_grad():
        value = _value(node, traced)
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


def _value(argument: Any, traced: fx.GraphModule) -> Any:
    """What a node made of parameters alone is."""

    def of(node: fx.Node) -> Any:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            return getattr(traced.get_submodule(owner), name)
        args, kwargs = fx.map_arg(node.args, of), fx.map_arg(node.kwargs, of)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    return of(argument)


def _name(calls: set[fx.Node], weight: fx.Node, traced: fx.GraphModule) -> str | None:
    """The path of the module that holds the weight for these calls alone: the keys stay the user's.

    Of a weight called ``in_proj_weight``, ``in_proj`` beside it; None for others.
    """
    while weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    owner, _, name = str(weight.target).rpartition(".")
    users = {
        u
        for n in traced.graph.nodes
        if n.op == "get_attr" and str(n.target).rpartition(".")[0] == owner
        for u in n.users
    }
    if (
        owner
        and name.endswith("_weight")
        and not hasattr(traced.get_submodule(owner), name.removesuffix("_weight"))
    ):
        return f"{owner}.{name.removesuffix('_weight')}"
    alone = owner and name == "weight" and _only_for(users, calls)
    return owner if alone else None


def _only_for(users: set[fx.Node], calls: set[fx.Node]) -> bool:
    """Whether all that ``users`` compute goes into ``calls``."""
    return all(
        user in calls or (user.users and _only_for(set(user.users), calls)) for user in users
    )


def _drop_unused(traced: fx.GraphModule) -> None:
    """Takes out what nothing computes with any more: an optimizer would wait for the gradients of
    such parameters.
    """
    for node in reversed(list(traced.graph.nodes)):
        if not node.users and (
            node.op == "get_attr" or (node.op.startswith("call_") and _origin(node) is not None)
        ):
            traced.graph.erase_node(node)
    used = {str(node.target) for node in traced.graph.nodes if node.op == "get_attr"}
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    for name, _ in list(traced.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        if name not in used and not any(owner == c or owner.startswith(f"{c}.") for c in called):
            delattr(traced.get_submodule(owner), attribute)
