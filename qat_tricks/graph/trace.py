"""From the user's network to a ``torch.fx.GraphModule`` whose submodule names, and so checkpoint
keys, stay the user's.
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


class Tracer(fx.Tracer):
    """Keeps whole every module that behaves differently in training: traced through, it would be
    frozen in one mode.

    Attributes:
        whole: name patterns of other modules to keep whole.
        culprit: the innermost module that could not be traced.
    """

    def __init__(self, whole: Sequence[str] = ()) -> None:
        super().__init__()
        self.whole = whole
        self.culprit: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name) or any(
            fnmatchcase(module_qualified_name, p) for p in self.whole
        ):
            return True
        has_parts = any(True for _ in m.children()) or any(
            True for _ in m.parameters(recurse=False)
        )
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
            self.culprit = self.culprit or self.path_of_module(m)
            raise


def trace(network: nn.Module, whole: Sequence[str] = ()) -> fx.GraphModule:
    """Returns ``network`` as a graph module that shares its parameters; a graph module of ours is
    returned as it is.

    Args:
        network: takes images, or several inputs, and yields logits.
        whole: name patterns (``fnmatch``) of submodules to keep as they are, in float: what they do
            is not looked at.

    Raises:
        QatTricksError: the network's control flow depends on the values of its inputs (names the
            line of its code and the submodule), or a pattern matches no submodule.
    """
    if isinstance(network, fx.GraphModule) and "qat_tricks" in network.meta:
        return network
    names = [name for name, _ in network.named_modules() if name]
    for pattern in whole:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise QatTricksError(
                f'untraced: pattern "{pattern}" matches no submodule: {did_you_mean(pattern, names)}'
            )
    tracer = Tracer(whole)
    was_training = network.training
    network.eval()  # auxiliary heads and stochastic branches belong to training only
    try:
        graph = tracer.trace(network)
    except Exception as error:  # whatever user code raises when it meets a proxy
        part = f'keep that part in float with untraced=["{tracer.culprit}"]'
        way_out = part if tracer.culprit else "hand over the part that can be"
        raise QatTricksError(
            f"{type(network).__name__} cannot be traced: {_user_line(error)}: "
            f"{_first_line(error)}; mend that line so that it does not depend on the values or the "
            f"shape of the input, or {way_out}"
        ) from error
    finally:
        network.train(was_training)
    traced = fx.GraphModule(network, graph, class_name=type(network).__name__)
    _dropout_to_modules(traced)
    _erase_assertions(traced)
    _erase_identities(traced)
    functions_to_modules(traced, network)
    traced.train(was_training)
    traced.meta["qat_tricks"] = {"whole": list(whole)} if whole else {}
    return traced


def _user_line(error: BaseException) -> str:
    """``file:line "code"`` of the innermost frame that belongs neither to torch nor to this
    package.
    """
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


_DROPOUTS: dict[object, type[nn.Module]] = {
    nn.functional.dropout: nn.Dropout,
    nn.functional.dropout2d: nn.Dropout2d,
    nn.functional.dropout3d: nn.Dropout3d,
    nn.functional.alpha_dropout: nn.AlphaDropout,
}


def _dropout_to_modules(traced: fx.GraphModule) -> None:
    """Turns functional dropout, traced with ``training=False``, into modules that follow
    ``train()`` and ``eval()``.
    """
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUTS:
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            replace_with_module(
                traced,
                node,
                f"dropouts.{node.name}",
                _DROPOUTS[node.target](p),
                node.all_input_nodes[:1],
            )
    traced.recompile()


def _erase_assertions(traced: fx.GraphModule) -> None:
    """Takes out checks of shapes, which have held while tracing, and what was worked out for them
    alone.
    """
    for node in reversed(list(traced.graph.nodes)):
        is_read = node.target is getattr or node.target in (operator.eq, operator.ne)
        if (
            node.op == "call_function"
            and not node.users
            and (node.target is torch._assert or is_read)
        ):
            traced.graph.erase_node(node)


def _erase_identities(traced: fx.GraphModule) -> None:
    """Takes out what returns its input: ``nn.Identity``, and additions of the number 0, with which
    sums over branches begin.
    """
    for node in list(traced.graph.nodes):
        adds_zero = node.target in (operator.add, operator.iadd) and any(
            isinstance(arg, int) and arg == 0 for arg in node.args
        )
        tensors = node.all_input_nodes
        if len(tensors) == 1 and (adds_zero or type(module_of(node, traced)) is nn.Identity):
            node.replace_all_uses_with(tensors[0])
            traced.graph.erase_node(node)


def replace_with_module(
    traced: fx.GraphModule, node: fx.Node, name: str, module: nn.Module, inputs: list[fx.Node]
) -> fx.Node:
    """Puts a call of ``module``, added as submodule ``name``, in the place of ``node``; the caller
    recompiles.
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
    """The conv, linear or BatchNorm called ``name``; typed loosely, for its attributes differ by
    kind.
    """
    return traced.get_submodule(name)
