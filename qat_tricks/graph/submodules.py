"""Finds the submodules that a traced network calls, and the attributes that it reads."""

from typing import Any

from torch import fx, nn


def module_of(node: fx.Node, traced: fx.GraphModule) -> nn.Module | None:
    """The submodule that ``node`` calls, or None if it calls none."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def layer_at(traced: fx.GraphModule, name: str) -> Any:
    """The conv, linear or BatchNorm called ``name``; ``Any``, for attributes differ by kind."""
    return traced.get_submodule(name)


def attribute_at(traced: fx.GraphModule, name: str) -> Any:
    """What the graph reads under ``name``, such as a parameter or a part of one."""
    value: Any = traced
    for part in name.split("."):
        value = getattr(value, part)
    return value
