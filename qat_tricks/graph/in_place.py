"""Operations that change their first input in place, and the same ones that do not."""

import inspect
import operator
from typing import Any

import torch
from torch import fx

from qat_tricks.graph.operations import entries_for
from qat_tricks.graph.submodules import module_of

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
