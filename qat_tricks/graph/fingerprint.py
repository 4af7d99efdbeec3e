"""A fingerprint of a traced network's code, by which a checkpoint tells whether it has changed."""

import hashlib
from typing import Any

import torch
from torch import fx

CODE = "code"  # the entry in a spec


def fingerprint(traced: fx.GraphModule) -> dict[str, str]:
    """What a network computes, in short: its operations, their order, and all settings.

    Weights do not count. Names of nodes do not either: other versions of torch number them anew.

    Args:
        traced: just traced, before any trick.

    Returns:
        Plain data: the version of torch, which may trace the same code otherwise, and the hash.
    """
    place = {node: index for index, node in enumerate(traced.graph.nodes)}
    parts = []
    for node in traced.graph.nodes:
        arguments = fx.map_arg((node.args, node.kwargs), lambda source: f"%{place[source]}")
        parts.append(f"{node.op} {_target(node, traced)} {arguments}")
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return {"torch": str(torch.__version__), "sha256": digest[:16]}


def _target(node: fx.Node, traced: fx.GraphModule) -> str:
    target: Any = node.target
    if node.op == "call_module":
        module = traced.get_submodule(str(target))
        # The settings of a module, such as a stride, stand in its own description.
        settings = module.extra_repr()
        if getattr(module, "running_mean", None) is not None:
            # A callback that freezes a BatchNorm lets it count no more for a while.
            settings = settings.replace("track_running_stats=False", "track_running_stats=True")
        return f"{target} {type(module).__name__} {settings}"
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', target)}"


def has_changed(traced: fx.GraphModule, saved: dict[str, str] | None) -> bool:
    """Whether ``traced`` computes something else than the network whose fingerprint was ``saved``.

    Nobody knows of a network that another version of torch has traced, or without a fingerprint.
    """
    now = fingerprint(traced)
    return saved is not None and saved["torch"] == now["torch"] and saved != now
