"""Parts of a module of training steps that its forward does not use: losses, metrics, a teacher.

Such a module, as Lightning's, holds more than a network. What its forward computes is traced. What
only its steps use stays the user's own object: it is neither copied, nor refused when it is called.
"""

from collections.abc import Iterable

from torch import fx, nn

from qat_tricks.graph.two_modes import OWNER

# The key in a traced network's ``meta``: the names of these parts.
OUTSIDE = "qat_tricks.outside"


def has_steps(module: nn.Module | type[nn.Module]) -> bool:
    """Whether a module, or a class of them, has training steps beside its forward."""
    return hasattr(module, "training_step")


def used_parts(graph: fx.Graph) -> set[str]:
    """The names of the parts in which a graph calls, reads or computes something.

    A part is in use also where only some of its own parts are.
    """
    used: set[str] = set()
    for node in graph.nodes:
        paths = [str(node.meta.get(OWNER, ""))]
        if node.op in ("call_module", "get_attr"):
            paths.append(str(node.target))
        for path in paths:
            names = path.split(".")
            used |= {".".join(names[: length + 1]) for length in range(len(names))}
    return used


def outside(network: nn.Module, graph: fx.Graph) -> tuple[str, ...]:
    """The parts of ``network`` that its ``graph`` does not use, without the parts of those."""
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    used = used_parts(graph)
    named = dict(network.named_modules(remove_duplicate=False))
    # A part that is in use may be held by a second name.
    objects = {id(named[name]) for name in used if name in named}
    unused = [
        name
        for name, module in named.items()
        if name and objects.isdisjoint(id(part) for part in module.modules())
    ]
    return tuple(
        name for name in unused if not is_under(name, called) and not _has_parent(name, unused)
    )


def is_under(name: str, tops: Iterable[str]) -> bool:
    """Whether the part ``name`` is one of ``tops``, or a part of one."""
    return any(f"{name}.".startswith(f"{top}.") for top in tops)


def _has_parent(name: str, names: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in names)
