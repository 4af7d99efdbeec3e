"""Which nodes of a float network hold what a quantized one, made from it, has on its grids."""

from torch import fx

from qat_tricks.graph import nodes as n
from qat_tricks.graph.spec import QUANTIZERS, spec_of
from qat_tricks.graph.submodules import module_of
from qat_tricks.numerics import ActivationQuantizer


def float_names(traced: fx.GraphModule) -> dict[str, str]:
    """For the node of each quantizer and concat by name, the name of that in the float network.

    Quantizers with readers of their own are left out: the one before each has the same tensor.

    Args:
        traced: a network with quantizers.
    """
    entries = spec_of(traced)["activations"]

    def entry_of(node: fx.Node) -> str | None:
        """The entry of the quantizer for all readers that ``node`` calls, or None."""
        if not isinstance(module_of(node, traced), ActivationQuantizer):
            return None
        name = str(node.target).removeprefix(f"{QUANTIZERS}.")
        return None if "readers" in entries[name] else name

    names, absorbed = {}, dict[str, list[str]]()
    for node in traced.graph.nodes:
        if n.is_cat(node, traced) and not any(map(entry_of, node.users)):
            names[node.name] = node.name
        name = entry_of(node)
        if name is None:
            continue
        # It rounds what the node before it yields, or stands in the place of a ReLU.
        names[node.name] = node.all_input_nodes[0].name
        if entries[name]["activation"] is not None:
            absorbed.setdefault(name, []).append(node.name)
    for name, called in absorbed.items():
        names |= dict(zip(called, entries[name]["nodes"], strict=True))
    return names
