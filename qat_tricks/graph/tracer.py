"""Follows a network's code in one mode, and leaves all that is around it as it was."""

import builtins
import copy
import inspect
import linecache
import random
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import attention
from qat_tricks.graph.layers import BATCHNORMS
from qat_tricks.graph.modes import kept_modes
from qat_tricks.graph.nodes import is_tensor
from qat_tricks.graph.random_state import has_moved, random_state, restore_random_state
from qat_tricks.graph.two_modes import NO_GRAD, OWNER, structure_of

# Functions that make tensors of nothing but sizes: a tracer does not see them, for no input of
# theirs is a tensor. Those that draw random numbers have to be called each time.
_DRAWING = ("rand", "randn", "randint", "randperm")
_MAKING = ("zeros", "ones", "full", "empty", "arange", "linspace")
TRACING = threading.RLock()
"""Held while a network is traced: ``torch.fx`` then patches ``nn.Module`` for the whole process."""
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Tracer(fx.Tracer):
    """Follows a network's code.

    It does not trace through a module without parts that behaves differently in training, nor
    through torch's own modules.

    Attributes:
        untraced: name patterns of other modules that it does not trace through.
        splits_attention: whether it traces through self-attention.
        whole_functions: functions of the user's that it does not trace through.
        culprit: the innermost module that could not be traced.
        draws: the innermost module that drew random numbers while it was traced, if asked for.
    """

    def __init__(
        self,
        untraced: Sequence[str] = (),
        *,
        splits_attention: bool = True,
        watches_random: bool = False,
        whole_functions: Sequence[Callable[..., Any]] = (),
    ) -> None:
        super().__init__(autowrap_functions=tuple(whole_functions))
        self.untraced, self.splits_attention = untraced, splits_attention
        self.watches_random = watches_random
        self.culprit: str | None = None
        self.draws: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one call."""
        if super().is_leaf_module(m, module_qualified_name) or any(
            fnmatchcase(module_qualified_name, p) for p in self.untraced
        ):
            return True
        # A module with parts or parameters is traced through: surgery has to reach them.
        has_parts = any(True for _ in m.children()) or any(
            True for _ in m.parameters(recurse=False)
        )
        # Only the code tells: a module without parts that reads its mode acts on it.
        return not has_parts and "training" in type(m).forward.__code__.co_names

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Traces through self-attention, so that its projections are linears like any other.

        And through a module that ``forward`` itself makes, such as a slice of a ``Sequential``.
        """
        if self.submodule_paths is not None and m not in self.submodule_paths:
            return forward(*args, **kwargs)
        is_attention = self.splits_attention and isinstance(m, nn.MultiheadAttention)
        if is_attention and attention.is_plain(m, args, kwargs):  # type: ignore[arg-type]
            return attention.attend(m, args[0]), None  # type: ignore[arg-type]
        before = random_state() if self.watches_random else None
        try:
            result = self._follow(m, forward, args, kwargs)
        except Exception:
            # The error passes the innermost module first.
            self.culprit = self.culprit or self.path_of_module(m)
            raise
        if before is not None and has_moved(before):
            self.draws = self.draws or self.path_of_module(m)
        return result

    def _follow(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        is_windowed = self.splits_attention and attention.is_in_windows(m)
        if is_windowed and not self.is_leaf_module(m, self.path_of_module(m)):
            return attention.attend_in_windows(m, *args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Notes whose code makes the node, and whether gradients were switched off there."""
        node = super().create_node(kind, *args, **kwargs)
        # The innermost module on the stack is, at its own call, not yet the one whose code runs.
        outer = [path for path, _ in self.module_stack.values()]
        outer = outer[:-1] if kind == "call_module" else outer
        node.meta[OWNER] = outer[-1] if outer else ""
        off = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
        if off and not _is_in_checkpoint():
            node.meta[NO_GRAD] = True
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Takes an assertion as held, as it did for the network that the graph is compared with.

        What else depends on a value cannot be followed (see ``torch.fx``).
        """
        caller = sys._getframe(1)
        while caller.f_globals.get("__name__") == fx.proxy.__name__ and caller.f_back is not None:
            caller = caller.f_back
        line = linecache.getline(caller.f_code.co_filename, caller.f_lineno)
        return True if line.strip().startswith("assert ") else super().to_bool(obj)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Makes an input of each argument without a default; the others keep their default."""
        kinds = [parameter.kind for parameter in inspect.signature(root_fn).parameters.values()]
        if not _parameters(root_fn) and inspect.Parameter.VAR_POSITIONAL in kinds:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        required = [
            self.create_proxy("placeholder", parameter.name, (), {})
            for parameter in _parameters(root_fn)
            if parameter.default is inspect.Parameter.empty
        ]
        names = [str(proxy.node.target) for proxy in required]

        def call(*inputs: Any) -> Any:
            by_name = dict(zip(names, inputs, strict=True))
            positional = [
                by_name.pop(parameter.name)
                for parameter in _parameters(root_fn)
                if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and parameter.name in by_name
            ]
            return root_fn(self.root, *positional, **by_name)

        return call, list(required)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a ``forward``, without ``self`` and those of variable number."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [parameter for parameter in parameters if parameter.kind not in _VARIABLE]


def defaults_of(network: nn.Module) -> dict[str, Any]:
    """The arguments of ``forward`` that have a default, with it."""
    return {
        parameter.name: parameter.default
        for parameter in _parameters(type(network).forward)
        if parameter.default is not inspect.Parameter.empty
    }


def functions_of_mode(network: nn.Module) -> list[Callable[..., Any]]:
    """The user's functions with an argument ``training`` that the code of ``network`` can call."""
    functions: dict[Any, None] = {}
    for kind in {type(module) for module in network.modules()}:
        for value in getattr(kind.forward, "__globals__", {}).values():
            is_users = isinstance(value, FunctionType) and not value.__module__.startswith("torch.")
            if is_users and "training" in inspect.signature(value).parameters:
                functions[value] = None
    return list(functions)


@dataclass
class Followed:
    """What following the code has given."""

    graph: fx.Graph
    constants: dict[str, Tensor]  # tensors made on the way, by the names that the graph reads
    written: list[str] = field(default_factory=list)  # attributes that the code sets


def follow(network: nn.Module, tracer: Tracer, *, training: bool) -> Followed:
    """Traces ``network`` in one mode; the network, its buffers and random states stay.

    Raises:
        QatTricksError: the code cannot be followed, draws random numbers itself, or changes a
            buffer in place.
    """
    with TRACING:
        return _follow(network, tracer, training=training)


def _follow(network: nn.Module, tracer: Tracer, *, training: bool) -> Followed:
    mode = "training" if training else "evaluation"
    before = random_state()
    own = [value for module in network.modules() for value in vars(module).values()]
    generators = [(value, _state_of(value)) for value in own if _draws(value)]
    with (
        kept_modes(network),
        _in_mode(network, training),  # before attributes are kept: a train() may reset a cache
        _attributes_kept(network) as changes,
        _grad_enabled(),
        _factories_recorded(tracer),
        _extremes_of_sizes_recorded(tracer),
        _gradients_recorded(tracer),
    ):
        try:
            graph = tracer.trace(network)
        except Exception as error:  # whatever user code raises when it meets a proxy
            raise QatTricksError(_no_trace(network, tracer, error, mode)) from error
        finally:
            moved = has_moved(before)
            restore_random_state(before)
            draws = moved or any(_differ(state, _state_of(g)) for g, state in generators)
            for generator, state in generators:
                _set_state(generator, state)
        constants = {
            str(node.target): getattr(network, str(node.target))
            for node in graph.nodes
            if node.op == "get_attr" and str(node.target).startswith("_tensor_constant")
        }
    if moved and not tracer.watches_random:  # once more, to tell by which part
        watching = Tracer(
            tracer.untraced, splits_attention=tracer.splits_attention, watches_random=True
        )
        follow(network, watching, training=training)
    _check_effects(network, tracer.draws, mode, draws=draws, buffers=changes.buffers)
    return Followed(graph, constants, changes.attributes)


def buffers_read(
    network: nn.Module, graph: fx.Graph, follow_again: Callable[[], Followed]
) -> list[str]:
    """The buffers whose values code reads as numbers: with others, the graph is another one.

    Args:
        network: the user's; its buffers stay as they are.
        graph: traced from it.
        follow_again: traces it once more.
    """
    norms = {id(b) for m in network.modules() if isinstance(m, BATCHNORMS) for b in m.buffers()}
    names = {
        name: buffer
        for name, buffer in network.named_buffers()
        if buffer.is_floating_point() and not buffer.is_meta and id(buffer) not in norms
    }
    expected = structure_of(graph)

    def differs(buffers: Sequence[Tensor]) -> bool:
        values = [buffer.clone() for buffer in buffers]
        try:
            for buffer in buffers:
                buffer.add_(0.5)
            return structure_of(follow_again().graph) != expected
        except QatTricksError:  # a branch that these values take cannot be followed
            return True
        finally:
            for buffer, before in zip(buffers, values, strict=True):
                buffer.copy_(before)

    with torch.no_grad():
        if not names or not differs(list(names.values())):
            return []
        return [name for name, buffer in names.items() if differs([buffer])]


def _check_effects(
    network: nn.Module, culprit: str | None, mode: str, *, draws: bool, buffers: Sequence[str]
) -> None:
    """Refuses code that does something while it is traced, which the graph would not repeat."""
    if draws:
        raise QatTricksError(
            f"{_code_of(network, culprit)} draws a random number in {mode} mode before it sees an "
            "image, which a graph would repeat for ever: draw it with an operation on the input "
            "(as torchvision.ops.StochasticDepth does), or keep that part in float with "
            f'untraced=["{culprit or "PART"}"]'
        )
    if buffers:
        raise QatTricksError(
            f'{type(network).__name__} changes its buffer "{buffers[0]}" in {mode} mode '
            "without an image, which the traced network would not do: change it outside of "
            "forward, or keep that part in float with untraced"
        )


def _draws(value: Any) -> bool:
    return isinstance(value, (random.Random, np.random.Generator, torch.Generator))


def _state_of(generator: Any) -> Any:
    """The state of a random generator that a module has for itself."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _differ(state: Any, other: Any) -> bool:
    if isinstance(state, Tensor):
        return not torch.equal(state, other)
    return bool(state != other)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _no_trace(network: nn.Module, tracer: Tracer, error: Exception, mode: str) -> str:
    part = f'keep that part in float with untraced=["{tracer.culprit}"]'
    way_out = part if tracer.culprit else "hand over the part that can be"
    in_training = " in training mode" if mode == "training" else ""
    return (
        f"{type(network).__name__} cannot be traced{in_training}: {_user_line(error)}: "
        f"{_first_line(error)}; {_advice(error)}, or {way_out}"
    )


def _advice(error: Exception) -> str:
    """How to mend the line that cannot be traced."""
    if "does not support item assignment" in str(error):
        return "make the tensor anew in place of writing into it (torch.cat, torch.where)"
    return "mend that line so that it does not depend on the values or the shape of the input"


def _code_of(network: nn.Module, path: str | None) -> str:
    """A module by name, with the place of its code."""
    module = network.get_submodule(path or "")
    kind = type(module)
    name = f'{kind.__name__}.forward of "{path}"' if path else f"{kind.__name__}.forward"
    try:
        return f"{name} ({inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind.forward)[1]})"
    except (OSError, TypeError):  # made at a prompt
        return name


def _user_line(error: BaseException) -> str:
    """``file:line "code"`` of the innermost frame outside of torch and of this package."""
    # Of an error inside torch, the user's line that led to it is named.
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((*own, "<"))
    ]
    if not frames:
        return "in PyTorch itself"
    return f'{frames[-1].filename}:{frames[-1].lineno} "{(frames[-1].line or "").strip()}"'


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_in_checkpoint() -> bool:
    """Whether ``torch.utils.checkpoint`` runs the code, which switches gradients off by itself."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        frame = frame.f_back
    return False


@contextmanager
def _in_mode(network: nn.Module, training: bool) -> Iterator[None]:
    network.train(training)
    yield


@contextmanager
def _gradients_recorded(tracer: Tracer) -> Iterator[None]:
    """Lets each ``torch.autograd.Function`` be one node, which keeps its own gradient."""
    original: Any = vars(torch.autograd.Function)["apply"]

    def apply(kind: Any, *args: Any, **kwargs: Any) -> Any:
        # A checkpoint only decides what is kept for the backward pass, and is followed.
        is_checkpoint = kind.__module__ == "torch.utils.checkpoint"
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves) and not is_checkpoint:
            return tracer.create_proxy("call_function", kind.apply, args, kwargs)
        return original.__get__(None, kind)(*args, **kwargs)

    function: Any = torch.autograd.Function
    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = original


@contextmanager
def _factories_recorded(tracer: Tracer) -> Iterator[None]:
    """Lets ``torch.rand`` and the like become nodes of the graph."""

    def is_node(name: str, proxies: Sequence[fx.Proxy]) -> bool:
        return name in _DRAWING or bool(proxies)

    with _recorded(tracer, torch, (*_DRAWING, *_MAKING), is_node):
        yield


@contextmanager
def _extremes_of_sizes_recorded(tracer: Tracer) -> Iterator[None]:
    """Lets ``max`` and ``min`` of sizes become nodes, as where a padding follows the image's size.

    Of values of the input they are a branch, which cannot be followed.
    """

    def is_node(name: str, proxies: Sequence[fx.Proxy]) -> bool:
        return bool(proxies) and not any(is_tensor(proxy.node) for proxy in proxies)

    with _recorded(tracer, builtins, ("max", "min"), is_node):
        yield


@contextmanager
def _recorded(
    tracer: Tracer,
    module: ModuleType,
    names: Sequence[str],
    is_node: Callable[[str, Sequence[fx.Proxy]], bool],
) -> Iterator[None]:
    """Lets calls of a module's functions become nodes.

    Args:
        tracer: makes the nodes.
        module: whose functions they are.
        names: of the functions.
        is_node: of a name and the proxies among a call's arguments: whether that call is a node.
    """
    originals = {name: getattr(module, name) for name in names}

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            leaves = tree_leaves((args, kwargs))
            if is_node(name, [leaf for leaf in leaves if isinstance(leaf, fx.Proxy)]):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return call

    try:
        for name, function in originals.items():
            setattr(module, name, recorded(name, function))
        yield
    finally:
        for name, function in originals.items():
            setattr(module, name, function)


@contextmanager
def _grad_enabled() -> Iterator[None]:
    """Switches gradients on, so that a ``no_grad`` in the user's code can be seen."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass
class _Changes:
    """What a trace has changed, by name, and what was put back."""

    attributes: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)


@contextmanager
def _attributes_kept(network: nn.Module) -> Iterator[_Changes]:
    """Puts attributes and buffers back that code sets while it is traced."""
    changes = _Changes()
    modules = list(network.named_modules())
    attributes = [(path, module, dict(vars(module)), _contents(module)) for path, module in modules]
    tables = [(path, module._buffers, dict(module._buffers)) for path, module in modules]
    buffers = [(name, buffer, buffer._version, buffer.clone()) for name, buffer in _own(network)]
    try:
        yield changes
    finally:
        for path, module, before, contents in attributes:
            prefix = f"{path}." if path else ""
            now = vars(module)
            names = [k for k in now.keys() | before.keys() if now.get(k, now) is not before.get(k)]
            changes.attributes += [
                prefix + name
                for name in sorted(names)
                if name != "training" and not name.startswith("_tensor_constant")
            ]
            now.clear()
            now.update(before)
            for name, content in contents.items():
                if now[name] != content:
                    changes.attributes.append(prefix + name)
                    now[name] = content
        for path, table, entries in tables:
            changes.buffers += [f"{path}.{k}" for k in table if table[k] is not entries.get(k)]
            table.clear()
            table.update(entries)
        for name, buffer, version, values in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)
                # A BatchNorm written out counts its batches; as a module it will do so again.
                if not name.endswith("num_batches_tracked"):
                    changes.buffers.append(name)


def _own(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in network.named_buffers() if not buffer.is_meta]


def _contents(module: nn.Module) -> dict[str, Any]:
    """Copies of the containers among a module's own attributes."""
    return {
        name: copy.copy(value)
        for name, value in vars(module).items()
        if isinstance(value, (list, set, dict, deque)) and not name.startswith("_")
    }
