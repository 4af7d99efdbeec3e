"""From the user's network to a ``torch.fx.GraphModule``.

The names of submodules, and so the keys of checkpoints, stay the user's.
"""

import operator
import traceback
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph import attention
from qat_tricks.graph.functional import functions_to_modules
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.operations import entries_for


class Tracer(fx.Tracer):
    """Does not trace through a module that behaves differently in training.

    Traced through, it would be frozen in one mode.

    Attributes:
        untraced: name patterns of other modules that it does not trace through.
        culprit: the innermost module that could not be traced.
    """

    def __init__(self, untraced: Sequence[str] = ()) -> None:
        super().__init__()
        self.untraced = untraced
        self.culprit: str | None = None

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
        """Traces through self-attention, so that its projections are linears like any other."""
        if isinstance(m, nn.MultiheadAttention) and attention.is_plain(m, args, kwargs):
            return attention.attend(m, args[0]), None
        try:
            if attention.is_in_windows(m) and not self.is_leaf_module(m, self.path_of_module(m)):
                return attention.attend_in_windows(m, *args, **kwargs)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            # The error passes the innermost module first.
            self.culprit = self.culprit or self.path_of_module(m)
            raise


def check_untraced(network: nn.Module, untraced: Sequence[str]) -> None:
    """Raises QatTricksError if a name pattern matches no submodule of ``network``."""
    names = [name for name, _ in network.named_modules() if name]
    for pattern in untraced:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise QatTricksError(
                f'untraced: pattern "{pattern}" matches no submodule: '
                f"{did_you_mean(pattern, names)}"
            )


def trace(network: nn.Module, untraced: Sequence[str] = ()) -> fx.GraphModule:
    """Returns ``network`` as a graph module that shares its parameters.

    A network that was traced here before is returned as it is.

    Args:
        network: takes images, or several inputs, and yields logits.
        untraced: name patterns (``fnmatch``) of submodules to keep whole, in float.

    Raises:
        QatTricksError: the network's control flow depends on the values of its inputs (names the
            line of its code and the submodule), or a pattern matches no submodule.
    """
    if isinstance(network, fx.GraphModule) and "qat_tricks" in network.meta:
        return network
    check_untraced(network, untraced)
    tracer = Tracer(untraced)
    was_training = network.training
    try:
        with evaluating(network):  # auxiliary heads and stochastic branches belong to training only
            graph = tracer.trace(network)
    except Exception as error:  # whatever user code raises when it meets a proxy
        part = f'keep that part in float with untraced=["{tracer.culprit}"]'
        way_out = part if tracer.culprit else "hand over the part that can be"
        raise QatTricksError(
            f"{type(network).__name__} cannot be traced: {_user_line(error)}: "
            f"{_first_line(error)}; mend that line so that it does not depend on the values or the "
            f"shape of the input, or {way_out}"
        ) from error
    traced = fx.GraphModule(network, graph, class_name=type(network).__name__)
    _dropout_to_modules(traced)
    _erase_assertions(traced)
    _erase_identities(traced)
    functions_to_modules(traced, network)
    traced.train(was_training)  # also the modules that tracing has added
    traced.meta["qat_tricks"] = {"untraced": list(untraced)} if untraced else {}
    return traced


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


def _dropout_to_modules(traced: fx.GraphModule) -> None:
    """Turns functional dropout into modules, which follow ``train()`` and ``eval()``.

    It was traced with ``training=False`` and would stay so.
    """
    for node in list(traced.graph.nodes):
        dropout = _dropout_module(node.target) if node.op == "call_function" else None
        if dropout is not None:
            # torch's functions have 0.5 as their default.
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            name = f"dropouts.{node.name}"
            replace_with_module(traced, node, name, dropout(p), node.all_input_nodes[:1])
    traced.recompile()


def _dropout_module(function: Any) -> type[nn.Module] | None:
    """The module class of the entry that ``function`` is a dropout of, or None."""
    calls = [call for entry in entries_for(function) if entry.is_dropout for call in entry.calls]
    return next((call for call in calls if isinstance(call, type)), None)


def _erase_assertions(traced: fx.GraphModule) -> None:
    """Removes checks of shapes, which held while tracing, and the numbers that only they read."""
    # Backwards: a check is gone before the numbers that only it has read.
    for node in reversed(list(traced.graph.nodes)):
        is_read = node.target is getattr or node.target in (operator.eq, operator.ne)
        if (
            node.op == "call_function"
            and not node.users
            and (node.target is torch._assert or is_read)
        ):
            traced.graph.erase_node(node)


def _erase_identities(traced: fx.GraphModule) -> None:
    """Removes ``nn.Identity``, and additions of the number 0, with which ``sum`` begins."""
    for node in list(traced.graph.nodes):
        adds_zero = node.target in (operator.add, operator.iadd) and any(
            isinstance(arg, int) and arg == 0 for arg in node.args
        )
        # Two tensors would be a true sum.
        tensors = node.all_input_nodes
        if len(tensors) == 1 and (adds_zero or type(module_of(node, traced)) is nn.Identity):
            node.replace_all_uses_with(tensors[0])
            traced.graph.erase_node(node)


def replace_with_module(
    traced: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, inputs: list[fx.Node]
) -> fx.Node:
    """Puts a call of ``module`` in the place of ``node``; the caller recompiles.

    Args:
        traced: the network; ``module`` becomes its submodule ``name``.
        node: the node to replace.
        name: of the submodule.
        module: the module to call instead.
        inputs: the call's arguments.

    Returns:
        The call.
    """
    traced.add_submodule(name, module)
    with traced.graph.inserting_after(node):
        call = traced.graph.call_module(name, tuple(inputs))
    node.replace_all_uses_with(call)
    traced.graph.erase_node(node)
    return call


def module_of(node: fx.Node, traced: fx.GraphModule) -> nn.Module | None:
    """The submodule that ``node`` calls, or None if it calls none."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def layer_at(traced: fx.GraphModule, name: str) -> Any:
    """The conv, linear or BatchNorm called ``name``; ``Any``, for attributes differ by kind."""
    return traced.get_submodule(name)
