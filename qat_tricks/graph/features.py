"""Feature maps that a quantized network and its float network have in common.

The quantized network is listened to behind its quantizers; a traced copy of the float network
yields the tensors of the same names beside its output. It only evaluates, so its BatchNorms are
folded.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat_tricks.errors import QatTricksError, did_you_mean
from qat_tricks.graph.fold import fold_batchnorm
from qat_tricks.graph.layers import activation_quantizers
from qat_tricks.graph.spec import QUANTIZERS, spec_of
from qat_tricks.graph.trace import trace
from qat_tricks.graph.traceable import TraceSettings, copy_of
from qat_tricks.graph.two_modes import EVALUATION, TRAINING, only_in


class TracedTeacher:
    """A traced and folded copy of a float network, which can yield what is inside.

    Args:
        network: the float network.
        student: the traced network that was made of it.
    """

    def __init__(self, network: nn.Module, student: fx.GraphModule) -> None:
        spec = spec_of(student)
        untraced = spec.get("untraced", ())
        settings = TraceSettings.of_spec(spec)
        self.network = trace(copy_of(network), untraced, settings=settings).eval()
        # BatchNorms take a part of its time that nobody needs to pay: values differ by rounding
        # only. Those that the student calls too stay, for its tensors may have their names.
        kept = [str(node.target) for node in student.graph.nodes if node.op == "call_module"]
        fold_batchnorm(self.network, skip=kept)
        self.network.requires_grad_(False)
        self.output = self.network.graph.output_node()
        self.own_output = self.output.args[0]
        self.names: tuple[str, ...] | None = None
        nodes = {node.name: node for node in self.network.graph.nodes}
        # Behind a BatchNorm of its own that the layer which makes the tensor has in the student.
        folded = dict(spec.get("folded", []))
        of_module = {str(n.target): n for n in nodes.values() if n.op == "call_module"}
        self.order = {name: place for place, name in enumerate(nodes)}
        self.nodes = {
            name: of_module.get(folded.get(str(node.target), ""), node)
            for name, node in nodes.items()
        }
        self.tap(())

    def tap(self, names: Sequence[str]) -> None:
        """Lets a call yield the tensors of these names too."""
        if self.names == tuple(names):
            return
        graph = self.network.graph
        taps = {}
        for name in names:
            with graph.inserting_after(self.nodes[name]):
                # A copy, for a network may go on in place.
                taps[name] = graph.call_method("clone", (self.nodes[name],))
        self.output.args = ((self.own_output, taps),)
        self.network.recompile()
        self.names = tuple(names)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The network's output, and the tensors."""
        output, taps = self.network(*args, **kwargs)
        return output, taps


def quantized_tensors(student: fx.GraphModule, teacher: TracedTeacher) -> dict[str, list[str]]:
    """The tensors that training puts on a grid: names for each quantizer, in the order of calls.

    Those of the network's inputs are no features and are left out. So are quantizers with readers
    of their own, which round a tensor that another one has rounded.
    """
    absent = only_in(student.graph, EVALUATION) | only_in(student.graph, TRAINING)
    inputs = {node.name for node in teacher.network.graph.find_nodes(op="placeholder")}
    found = {}
    for name in activation_quantizers(student):
        calls = [n for n in student.graph.nodes if n.op == "call_module" and n.target == name]
        entry = spec_of(student)["activations"][name.removeprefix(f"{QUANTIZERS}.")]
        if "readers" in entry:
            continue
        names = [tensor for tensor in entry["nodes"] if tensor in teacher.nodes]
        # Calls of one mode only would shift the others.
        if len(names) != len(calls) or not absent.isdisjoint(calls) or set(names) & inputs:
            continue
        found[name] = sorted(names, key=teacher.order.__getitem__)
    return found


class Listener:
    """Notes what comes out of quantizers, for the length of a ``with`` block.

    Args:
        student: the quantized network.
        tensors: from ``quantized_tensors``, all of them or some.
    """

    def __init__(self, student: fx.GraphModule, tensors: Mapping[str, Sequence[str]]) -> None:
        self.student, self.tensors = student, tensors
        self.heard: dict[str, Tensor] = {}  # by the tensor's name, of the last call of the network
        self._handles: list[Any] = []

    def __enter__(self) -> "Listener":
        self._calls = dict.fromkeys(self.tensors, 0)
        for name in self.tensors:
            module = self.student.get_submodule(name)

            def note(_: Any, __: Any, output: Tensor, name: str = name) -> None:
                names = self.tensors[name]
                self.heard[names[self._calls[name] % len(names)]] = output
                self._calls[name] += 1

            self._handles.append(module.register_forward_hook(note))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.heard.clear()

    def take(self) -> dict[str, Tensor]:
        """What was heard in the last call of the network, which is then forgotten."""
        heard, self.heard = self.heard, {}
        # The next call begins anew: a number that grew with each would be compiled each time.
        self._calls = dict.fromkeys(self.tensors, 0)
        return heard


def chosen_tensors(
    tensors: Mapping[str, Sequence[str]], patterns: Sequence[str]
) -> dict[str, list[str]]:
    """Those quantizers of which a tensor has a name that matches, with all of their tensors.

    Args:
        tensors: from ``quantized_tensors``.
        patterns: of names (``fnmatch``); a dot stands for an underscore too, so that names of
            modules will do.

    Raises:
        QatTricksError: a pattern matches none.
    """
    names = [name for group in tensors.values() for name in group]
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in names):
            raise QatTricksError(
                f'features: pattern "{pattern}" matches no quantized tensor: '
                f"{did_you_mean(pattern, names)}"
            )
    return {
        quantizer: list(group)
        for quantizer, group in tensors.items()
        if any(_matches(name, patterns) for name in group)
    }


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of ``names`` that match a pattern, as of ``chosen_tensors``."""
    return [name for name in names if _matches(name, patterns)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern.replace(".", "_")) for pattern in patterns)


def last_of_each_size(heard: Mapping[str, Tensor], order: Mapping[str, int]) -> list[str]:
    """The names of the last map of each size, such as the outputs of a network's stages.

    Args:
        heard: maps ``[N, C, ...]``, and other tensors, by name.
        order: of the names in the network.
    """
    last: dict[tuple[int, ...], str] = {}
    for name in sorted(heard, key=order.__getitem__):
        size = tuple(heard[name].shape[2:])
        if heard[name].dim() > 3 and any(extent > 1 for extent in size):
            last[size] = name
    return list(last.values())
