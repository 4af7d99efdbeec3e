"""A traced network that is still the user's: an object of the user's class, with all its parts.

``torch.fx`` makes an object of a class of its own, and keeps only what the graph calls. Here the
object has the user's class among its bases, and the user's attributes and parts. What would compute
beside the graph, and so without quantizers, is refused by name when it is called.
"""

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.calls_beside import (
    RefusedSequential,
    guarded_method,
    is_stand_in,
    refuse_calls_beside,
    shallow_copy,
)
from qat_tricks.graph.outside import OUTSIDE, has_steps, outside
from qat_tricks.graph.spec import QUANTIZERS
from qat_tricks.graph.two_modes import EVALUATION, OWNER, TRAINING, acts_on_mode, by_mode, graph_in

# Keys in the ``meta`` of a network: the names and defaults of arguments that were traced with their
# default; why the network cannot be run in training mode.
DEFAULTS, NO_TRAINING = "qat_tricks.defaults", "qat_tricks.no_training"

# What to do instead of writing a network with torch's own exporters.
EXPORT = 'write it with qat_tricks.export_onnx(network, "model.onnx", example)'


class TracedNetwork(fx.GraphModule):
    """A base of every traced network; the user's class is the other (see ``adopt``)."""

    _user_class: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new float network of the user's class, for ``type(network)`` stands for that class."""
        return cls._user_class(*args, **kwargs)

    def recompile(self) -> Any:
        """Generates ``forward`` from the graph: one for each mode where it acts on the mode."""
        code = super().recompile()
        kind = type(self)
        defaults = self.meta.get(DEFAULTS) if "meta" in vars(self) else None
        reason = self.meta.get(NO_TRAINING) if "meta" in vars(self) else None
        if acts_on_mode(self.graph):
            kind.forward = _forward_of_both(self)
        if reason is not None:
            kind.forward = _evaluation_only(kind.forward, reason)
        if defaults:
            kind.forward = _with_defaults(kind.forward, defaults)
        refuse_calls_beside(self)
        return code

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``torch.jit.trace`` calls, as ``add_graph`` of TensorBoard does.

        It compares the graphs with and without gradients, which differ where gradients have a path
        of their own. A graph has none.
        """
        if torch.onnx.is_in_onnx_export() and hasattr(self, QUANTIZERS):
            raise QatTricksError(f"torch.onnx.export would write floats: {EXPORT}")
        with torch.no_grad():
            return super()._slow_forward(*args, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` calls, which cannot take quantizers."""
        if hasattr(self, QUANTIZERS):
            raise QatTricksError(f"TorchScript cannot hold a quantized network: {EXPORT}")
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "TracedNetwork":
        twin = object.__new__(_class_for(self._user_class))
        memo[id(self)] = twin
        state = {key: value for key, value in _state_of(self).items() if key != "_graph"}
        vars(twin).update(copy.deepcopy(state, memo))
        twin.graph = copy.deepcopy(self.graph)
        return twin

    def __copy__(self) -> "TracedNetwork":
        twin = object.__new__(_class_for(self._user_class))
        vars(twin).update(vars(self))
        vars(twin).pop("_compiled_call_impl", None)
        twin.graph = copy.deepcopy(self.graph)
        return twin

    def __reduce__(self) -> Any:
        # A pickle of torch.fx traces its own code again, and forgets the spec.
        state = {
            key: value
            for key, value in _state_of(self).items()
            if key not in ("_graph", "_code", "_lineno_map", "_prologue_start")
        }
        # The state by itself, for it may hold the network.
        return _unpickle, (self._user_class,), {_GRAPH: _as_plain(self.graph), **state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nodes = state.pop(_GRAPH)
        vars(self).update(state)
        self.graph = _as_graph(nodes)


def adopt(network: nn.Module, graph: fx.Graph) -> TracedNetwork:
    """A network of the class of ``network`` that computes ``graph``.

    The modules that the graph calls are the user's own objects. Those that it passes through are
    copies without a ``forward``, so that surgery leaves the user's network its parts.

    Args:
        network: the user's, which was traced.
        graph: its nodes name parts and attributes of ``network``.
    """
    plain = fx.GraphModule(network, graph, class_name=type(network).__name__)
    traced = object.__new__(_class_for(type(network)))
    whole = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    fx_state = {key: vars(plain)[key] for key in vars(plain).keys() - vars(nn.Module()).keys()}
    if has_steps(network):
        fx_state["meta"] = {**fx_state["meta"], OUTSIDE: outside(network, graph)}
        whole |= set(fx_state["meta"][OUTSIDE])
    vars(traced).update({**vars(_shell(network, "", whole, {})), **fx_state})
    vars(traced).pop("_compiled_call_impl", None)
    if isinstance(traced, nn.Sequential):
        vars(traced)["_layer_names"] = tuple(network._modules)
    for node in graph.nodes:
        if node.op == "get_attr":
            _register(traced, str(node.target))
    traced.graph = graph
    return traced


def become(network: nn.Module, traced: TracedNetwork) -> TracedNetwork:
    """Makes the user's own object the traced network; returns that object.

    So every reference to it goes on being right: a variable, a list, another attribute.

    Args:
        network: the object that was traced, or rebuilt.
        traced: what came of it; it shares everything with ``network`` from then on.
    """
    if network is traced or isinstance(network, TracedNetwork):
        return traced
    state = vars(traced)
    network.__class__ = type(traced)
    object.__setattr__(network, "__dict__", state)
    own: Any = network
    own.graph.owning_module = own
    return own


def _shell(module: nn.Module, path: str, whole: set[str], done: dict[int, Any]) -> nn.Module:
    """A copy of ``module`` and its parts that shares parameters, and all parts that stay whole."""
    if path in whole:
        return module
    if id(module) not in done:
        shell = done[id(module)] = shallow_copy(module)
        prefix = f"{path}." if path else ""
        for name, child in module._modules.items():
            if child is not None:
                shell._modules[name] = _shell(child, f"{prefix}{name}", whole, done)
    return done[id(module)]


def _register(traced: nn.Module, target: str) -> None:
    """Makes a tensor that is a plain attribute a buffer, which follows the device."""
    path, _, name = target.rpartition(".")
    owner = traced.get_submodule(path)
    value = vars(owner).get(name)
    if isinstance(value, torch.Tensor):
        delattr(owner, name)
        owner.register_buffer(name, value)


def order_by_use(traced: TracedNetwork) -> None:
    """Puts parts and parameters into the order in which the graph uses them first.

    So networks were built before, and the states of optimizers in their checkpoints go by it.
    """
    targets = [str(n.target) for n in traced.graph.nodes if n.op in ("call_module", "get_attr")]
    places: dict[str, int] = {}
    for place, target in enumerate(targets):
        parts = target.split(".")
        for length in range(1, len(parts) + 1):
            places.setdefault(".".join(parts[:length]), place)
    for path, module in traced.named_modules():
        if path in targets:  # the user's own object, which is called as it is
            continue
        prefix = f"{path}." if path else ""
        for table in (module._modules, module._parameters):
            entries = sorted(
                table.items(), key=lambda entry: places.get(prefix + entry[0], len(targets))
            )
            table.clear()
            table.update(entries)


def drop_unused(traced: TracedNetwork) -> None:
    """Removes parts, parameters and buffers that the graph does not use.

    Checkpoints written before networks kept them have no values for them.
    """
    used = {str(n.target) for n in traced.graph.nodes if n.op in ("call_module", "get_attr")}
    for name, module in list(traced.named_modules()):
        if not name or any(name == u or name.startswith(f"{u}.") for u in used):
            continue
        if not any(u.startswith(f"{name}.") for u in used):
            owner, _, last = name.rpartition(".")
            traced.get_submodule(owner)._modules.pop(last, None)
            continue
        _drop_tensors(module, name, used)
    _drop_tensors(traced, "", used)


def _drop_tensors(module: nn.Module, path: str, used: set[str]) -> None:
    prefix = f"{path}." if path else ""
    for table in (module._parameters, module._buffers):
        for name in list(table):
            if prefix + name not in used:
                del table[name]


# Classes -----------------------------------------------------------------------------------------


# Their own methods call no parts of a network.
_FRAMEWORKS = ("torch.nn.modules.", "pytorch_lightning.", "lightning.")


def _class_for(kind: type[nn.Module]) -> type[TracedNetwork]:
    """A class for one network, as torch.fx has it, because ``forward`` belongs to the class."""
    methods = {name: guarded_method(name, method) for name, method in _methods_of(kind).items()}
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__init__": kind.__init__,  # for its signature
    }
    bases = (_TracedSequential, kind) if issubclass(kind, nn.Sequential) else (TracedNetwork, kind)
    make: Any = type(kind)  # the metaclass
    return make(kind.__name__, bases, {**methods, **names, "_user_class": kind})


def _methods_of(kind: type) -> dict[str, FunctionType]:
    """The methods that the user has written, without those of ``nn.Module`` that they replace."""
    methods: dict[str, FunctionType] = {}
    for base in reversed(kind.__mro__):
        if f"{base.__module__}.".startswith(_FRAMEWORKS):
            continue
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and not hasattr(fx.GraphModule, name):
                methods[name] = value
    return {name: value for name, value in methods.items() if not name.startswith("__")}


class _TracedSequential(TracedNetwork):
    """A traced ``nn.Sequential``: what tricks have added is none of its layers."""

    def _layers(self) -> nn.Sequential:
        names = vars(self)["_layer_names"]
        return RefusedSequential(OrderedDict((name, self.get_submodule(name)) for name in names))

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._layers())

    def __len__(self) -> int:
        return len(self._layers())

    def __getitem__(self, index: Any) -> Any:
        return self._layers()[index]


# Forward -----------------------------------------------------------------------------------------


def _forward_of_both(traced: TracedNetwork) -> Callable[..., Any]:
    """A ``forward`` that computes what the network computes in the mode that it is in."""
    evaluation, training = (
        type(fx.GraphModule(traced, graph_in(traced.graph, mode))).forward
        for mode in (EVALUATION, TRAINING)
    )
    owners = tuple(
        {str(n.meta.get(OWNER, "")) for n in traced.graph.nodes if n.target is by_mode} - {""}
    )

    @functools.wraps(evaluation)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for owner in owners:
            if self.get_submodule(owner).training != self.training:
                raise QatTricksError(
                    f'"{owner}" acts on its mode, and is in another mode than its network: put '
                    f'both in one mode, or keep that part in float with untraced=["{owner}"]'
                )
        return (training if self.training else evaluation)(self, *args, **kwargs)

    return forward


def _evaluation_only(evaluation: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """A ``forward`` that refuses to run in training mode."""

    @functools.wraps(evaluation)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            raise QatTricksError(reason)
        return evaluation(self, *args, **kwargs)

    return forward


def _with_defaults(inner: Callable[..., Any], defaults: dict[str, Any]) -> Callable[..., Any]:
    """A ``forward`` that also takes the arguments that were traced with their default."""
    required = inspect.signature(inner)
    optional = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value)
        for name, value in defaults.items()
    ]
    signature = required.replace(parameters=[*required.parameters.values(), *optional])

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        for name in defaults.keys() & arguments.keys():
            value, default = arguments.pop(name), defaults[name]
            if value is not default and not _equal(value, default):
                raise QatTricksError(
                    f"{type(self).__name__} was traced with {name}={default!r}, and cannot be "
                    "called with another value: leave the argument out"
                )
        return inner(**arguments)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def _equal(value: Any, default: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return False
    return bool(value == default)


_GRAPH = "qat_tricks.graph"  # the key in a pickled state
# Pickles -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reference:
    """A node in the arguments of another, in a pickle."""

    name: str


def _as_plain(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes of a graph as data."""

    def refer(source: fx.Node) -> Any:
        return _Reference(source.name)

    return [
        (
            node.op,
            node.name,
            _by_name(node.target),
            *fx.map_arg((node.args, node.kwargs), refer),
            {key: value for key, value in node.meta.items() if str(key).startswith("qat_tricks")},
        )
        for node in graph.nodes
    ]


@dataclass(frozen=True)
class _Named:
    """A function that cannot be pickled, by the name that ``torch.nn.functional`` has for it."""

    name: str


def _by_name(target: Any) -> Any:
    """The target of a node as something that can be pickled."""
    # Functions of two variants, such as F.max_pool2d, are closures.
    if "<locals>" in getattr(target, "__qualname__", ""):
        names = [name for name, value in vars(F).items() if value is target]
        return _Named(names[0]) if names else target
    return target


def _as_graph(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    graph, made = fx.Graph(), dict[str, fx.Node]()

    def resolve(argument: Any) -> Any:
        return made[argument.name] if isinstance(argument, _Reference) else argument

    for op, name, saved, args, kwargs, meta in nodes:
        target = getattr(F, saved.name) if isinstance(saved, _Named) else saved
        args, kwargs = fx.node.map_aggregate((args, kwargs), resolve)
        node = made[name] = graph.create_node(op, target, args, kwargs, name)
        node.meta.update(meta)
    return graph


def _state_of(traced: TracedNetwork) -> dict[str, Any]:
    """The attributes of a traced network that a copy and a pickle take along."""
    # A module of training steps leaves its trainer behind.
    own: Any = traced
    state = own.__getstate__() if has_steps(traced) else vars(traced)
    # What was compiled computes with this network, also in a copy; torch leaves it out too.
    return {
        key: value
        for key, value in state.items()
        if key != "_compiled_call_impl" and not is_stand_in(value)
    }


def _unpickle(
    kind: type[nn.Module],
    nodes: list[tuple[Any, ...]] | None = None,
    state: dict[str, Any] | None = None,
) -> TracedNetwork:
    traced = object.__new__(_class_for(kind))
    if nodes is not None and state is not None:  # pickles of before have them here
        traced.__setstate__({_GRAPH: nodes, **state})
    return traced
