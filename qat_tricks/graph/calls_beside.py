"""Refuses by name what would compute beside the graph of a traced network.

A part that the graph passes through, or a method that calls parts, would compute without
quantizers, and with BatchNorms that were folded elsewhere.
"""

import copy
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.outside import OUTSIDE, is_under

_TABLES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_HOOK_TABLES = tuple(
    name for name in vars(nn.Module()) if name.endswith(("_hooks", "_kwargs", "_always_called"))
)


def shallow_copy(module: nn.Module) -> nn.Module:
    """A copy of one module, with tables of its own and the same parameters and parts."""
    twin = object.__new__(type(module))
    vars(twin).update(vars(module))
    for table in (*_TABLES, *_HOOK_TABLES):
        if table in vars(module):
            vars(twin)[table] = copy.copy(vars(module)[table])
    return twin


class RefusedSequential(nn.Sequential):
    """Layers of a traced network by index and slice; calling a slice would pass its graph by."""

    def forward(self, input: Any) -> Any:
        """Refuses."""
        raise QatTricksError(_beside("a slice of its layers"))


def _beside(what: str) -> str:
    return (
        f"{what} was called beside the forward of its traced network, where it would compute "
        "without its quantizers: call the whole network, or do this work in its forward"
    )


class _Refusal:
    """Stands in for the ``forward`` of a part that the graph passes through."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise QatTricksError(_beside(f'"{self.path}"'))


class _HookRefusal:
    """Stands in for ``register_forward_hook`` of such a part, whose hooks would never be called."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Lightning's summary of a model can do without: it then shows no sizes.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if "model_summary" in caller:
            return torch.utils.hooks.RemovableHandle(OrderedDict())
        raise QatTricksError(
            f'a forward hook on "{self.path}" would never be called, because the traced network '
            "passes it by: register it on the network itself, or before on a network of its own"
        )


def refuse_calls_beside(traced: fx.GraphModule) -> None:
    """Gives each part that the graph does not call a ``forward`` that refuses by name."""
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    for path, module in list(traced.named_modules()):
        is_refused = isinstance(vars(module).get("forward"), _Refusal)
        if path in called and is_refused:
            for name in _refusals(path):
                del vars(module)[name]
        if not path or is_refused or is_inside(path, called) or is_under(path, _outside(traced)):
            continue
        owner, _, name = path.rpartition(".")
        # A copy: the user may hold the module in a network of their own.
        twin = shallow_copy(module)
        if type(module) is nn.Sequential:
            twin.__class__ = RefusedSequential
        vars(twin).update(_refusals(path))
        traced.get_submodule(owner)._modules[name] = twin


def _refusals(path: str) -> dict[str, Any]:
    hooks = dict.fromkeys(
        ("register_forward_hook", "register_forward_pre_hook"), _HookRefusal(path)
    )
    return {"forward": _Refusal(path), **hooks}


def is_inside(path: str, called: Collection[str]) -> bool:
    """Whether a module is called, or a part of one that is."""
    return caller_of(path, called) != ""


def caller_of(path: str, called: Collection[str]) -> str:
    """What is called for a module: itself, or one that holds it; "" if nothing is."""
    parts = path.split(".")
    prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((prefix for prefix in prefixes if prefix in called), "")


def guarded_method(name: str, method: FunctionType) -> Callable[..., Any]:
    """The user's method, which may call the network and none of its parts."""

    @functools.wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _parts_refused(self, f"{self._user_class.__name__}.{name}"):
            return method(self, *args, **kwargs)

    return guarded


def _outside(network: nn.Module) -> tuple[str, ...]:
    """The parts that only the steps of a module use."""
    return vars(network).get("meta", {}).get(OUTSIDE, ())


class _Forward:
    """Stands in for the ``forward`` of a network on the object, while a method of the user's runs.

    In it, parts may be called. A method that calls ``self.forward(x)`` gets ``self(x)``, with all
    hooks.
    """

    def __init__(self, network: nn.Module, guard: "_Guard") -> None:
        self.network, self.guard = network, guard
        self.is_called = False
        self.__wrapped__ = network.forward  # for its signature

    def note_call(self, *_: Any) -> None:
        """Is told that the network is called as a whole."""
        self.is_called = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_called:
            return self.network(*args, **kwargs)
        self.is_called = False
        self.guard.open()
        try:
            return type(self.network).forward(self.network, *args, **kwargs)
        finally:
            self.guard.close()


def is_stand_in(value: Any) -> bool:
    """Whether an attribute of a network is there only while a method of the user's runs."""
    return isinstance(value, _Forward)


class _Guard:
    """Refuses calls of parts of a network while it is closed."""

    def __init__(self, network: nn.Module, method: str) -> None:
        self.network, self.method = network, method
        self.handle: Any = None

    def close(self) -> None:
        """Refuses from now on."""
        self.handle = register_module_forward_pre_hook(self.refuse)

    def open(self) -> None:
        """Lets parts be called."""
        self.handle.remove()

    def refuse(self, module: nn.Module, args: Any) -> None:
        """Raises QatTricksError if ``module`` is a part of the network's graph."""
        if module is self.network:
            return
        others = _outside(self.network)
        for path, part in self.network.named_modules():
            if part is module and not is_under(path, others):
                raise QatTricksError(_beside(f'"{path}", which {self.method} calls,'))


@contextmanager
def _parts_refused(network: nn.Module, method: str) -> Iterator[None]:
    """Refuses calls of parts of ``network``, other than by its own ``forward``."""
    # A wrapper of several devices leaves the method itself there.
    before = vars(network).get("forward")
    if isinstance(before, _Forward):  # a method that was called by another
        yield
        return
    guard = _Guard(network, method)
    forward = _Forward(network, guard)
    noted = network.register_forward_pre_hook(forward.note_call)
    guard.close()
    vars(network)["forward"] = forward
    try:
        yield
    finally:
        guard.open()
        noted.remove()
        del vars(network)["forward"]
        if before is not None:
            vars(network)["forward"] = before
