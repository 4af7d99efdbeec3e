"""Operations that change their first input in place, and the same ones that do not."""

import inspect
import operator
from typing import Any

import torch
from torch import fx

from qat_tricks.graph.nodes import is_tensor
from qat_tricks.graph.operations import entries_for
from qat_tricks.graph.submodules import module_of

_PARTS = ("chunk", "split", "unbind", torch.chunk, torch.split, torch.unbind)
"""They yield several tensors, of which one is changed and not the others."""
_VIEWS = {
    *("chunk", "split", "unbind", "view", "view_as", "reshape", "flatten", "unflatten", "t"),
    *("transpose", "permute", "movedim", "swapaxes", "squeeze", "unsqueeze", "narrow", "select"),
    *("expand", "expand_as", "detach", "contiguous"),
}
_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ipow")


def works_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether ``node`` changes its first input in place."""
    module = module_of(node, traced)
    if module is not None:  # of others it is not known what their attribute means
        return bool(entries_for(type(module))) and getattr(module, "inplace", False) is True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        return name in ("setitem", *_OPERATORS)
    is_named_so = name.endswith("_") and not name.endswith("__")
    return is_named_so or bool(_inplace_argument(node))


def _inplace_argument(node: fx.Node) -> Any:
    """The value of a function's argument ``inplace``, given by name or by its place, or None."""
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"]
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a function of C tells none
        return None
    place = names.index("inplace") if "inplace" in names else len(node.args)
    return node.args[place] if place < len(node.args) else None


def read_after_change(node: fx.Node, traced: fx.GraphModule) -> fx.Node | None:
    """The tensor that is read behind ``node``, which changes a view of it in place, or None.

    With quantizers between, or in a file, a view is a tensor of its own: the change is lost, or
    comes behind the rounding.
    """
    if not works_in_place(node, traced) or node.target is operator.setitem or not node.args:
        return None
    view: Any = node.args[0]
    if not isinstance(view, fx.Node) or not _is_view(view):  # most are none
        return None
    position = {n: place for place, n in enumerate(traced.graph.nodes)}
    chain: set[fx.Node] = set()
    while isinstance(view, fx.Node):
        chain.add(view)
        if not _is_view(view):
            break
        view = view.args[0]
        is_whole = isinstance(view, fx.Node) and view.target not in _PARTS
        later = (u for u in view.users if position[u] > position[node] and u not in chain)
        if is_whole and any(_reads_values(user, view) for user in later):
            return view
    return None


def _reads_values(node: fx.Node, tensor: fx.Node) -> bool:
    """Whether ``node`` reads the values of ``tensor``, and not only its shape."""
    takes_shape = str(node.target).endswith("_as") and node.args[0] is not tensor
    return is_tensor(node) and not takes_shape


def _is_view(node: fx.Node) -> bool:
    """Whether ``node`` yields a part of its first input, or the same values in another shape."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is operator.getitem:
        # Other indices, such as a tensor's, copy.
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(isinstance(part, (int, slice, type(None), type(Ellipsis))) for part in index)
    if node.target is getattr:
        return node.args[1] in ("T", "mT", "H", "mH", "data")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _VIEWS


def leave_input(node: fx.Node, traced: fx.GraphModule) -> None:
    """Lets an operation that works in place yield a new tensor; ``setitem`` stays as it is."""
    module, name = module_of(node, traced), str(node.target)
    if module is not None:
        module.inplace = False  # type: ignore[assignment]
    elif node.op == "call_method":
        node.target = name.removesuffix("_")
    elif node.target is not operator.setitem:
        name = getattr(node.target, "__name__", "")
        if name in _OPERATORS:
            node.target = getattr(operator, name.removeprefix("i"))
        elif _inplace_argument(node):
            names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
            # All that comes before it was given by place too, if it was.
            given = dict(zip(names, node.args, strict=False))
            node.args, node.kwargs = (), {**given, **node.kwargs, "inplace": False}
        else:
            node.target = getattr(torch, name.removesuffix("_"))
