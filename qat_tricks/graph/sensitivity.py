"""Measures what each change alone does to a network's output, such as one layer in integers.

The graph is walked once in float. Where a change begins to matter, the rest of the graph is run
with it, from the values that there are so far. A change so costs a part of a pass: the prefix that
it shares with the float network is not run again.

Ranking layers by the error that each alone causes is common practice (Wu et al. 2020, "Integer
quantization for deep learning inference", arXiv 2004.09602, section 5.3).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, as_tensors, batch_size, call_network, check_batches
from qat_tricks.graph.layers import activation_quantizers, layers
from qat_tricks.graph.logits import logits_of
from qat_tricks.graph.modes import evaluating, float_mode
from qat_tricks.graph.output_error import OutputError, output_error
from qat_tricks.graph.random_state import kept_random_state
from qat_tricks.graph.spec import QUANTIZERS
from qat_tricks.graph.two_modes import EvaluationInterpreter
from qat_tricks.numerics import ActivationQuantizer, WeightQuantizer
from qat_tricks.progress import Bar

WEIGHTS, ACTIVATIONS = "weights", "activations"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change to one module of a network, to be tried alone."""

    module: str  # name of a submodule that the graph calls
    # Makes the change, and takes it back at the end of its block.
    applied: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The error of the output with nothing but one part of the network on its grid."""

    name: str  # of the layer, or of the activation quantizer
    kind: str  # "weights" or "activations"
    bits: int
    error: OutputError
    # Weights that were put on their grid already, as by gptq: nothing is left to be rounded, and
    # so no error of theirs to be measured.
    is_rounded: bool = False


@dataclass(frozen=True, kw_only=True)
class Sensitivities:
    """Every part of a network alone, the worst first."""

    parts: Sequence[Sensitivity]
    together: OutputError  # of the quantized network as it is
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for a report."""
        return {
            "images": self.images,
            "together": asdict(self.together),
            "parts": [
                {
                    "name": part.name,
                    "kind": part.kind,
                    "bits": part.bits,
                    "is_rounded": part.is_rounded,
                    **asdict(part.error),
                }
                for part in self.parts
            ],
        }


@torch.no_grad()
def measure_sensitivity(traced: fx.GraphModule, batches: Sequence[Inputs]) -> Sensitivities:
    """Measures the weights of each layer, and each activation, with all others in float.

    Args:
        traced: a quantized, calibrated network; it stays as it is.
        batches: the network's inputs, a batch each; few images, such as 64, will do.

    Raises:
        QatTricksError: nothing is quantized, or no batches.
    """
    check_batches(batches, "to measure sensitivity on")
    quantizers = quantizers_of(traced)
    if not quantizers:
        raise QatTricksError("there is no sensitivity to measure: quantize the network first")
    with evaluating(traced):
        whole = torch.cat([logits_of(call_network(traced, batch)) for batch in batches])
        with float_mode(traced):
            changes = [_only(name, quantizer) for name, quantizer in quantizers.items()]
            reference, errors = errors_alone(traced, batches, changes, "measure sensitivity")
            rounded = _rounded(traced)
    parts = [
        Sensitivity(
            name=name.removeprefix(f"{QUANTIZERS}."),
            kind=WEIGHTS if isinstance(quantizer, WeightQuantizer) else ACTIVATIONS,
            bits=quantizer.scheme.bits,
            error=error,
            is_rounded=name in rounded,
        )
        for (name, quantizer), error in zip(quantizers.items(), errors, strict=True)
    ]
    return Sensitivities(
        parts=sorted(parts, key=lambda part: (-part.error.kl, part.error.sqnr_db)),
        together=output_error(reference, whole),
        images=sum(map(batch_size, batches)),
    )


def quantizers_of(traced: fx.GraphModule) -> dict[str, WeightQuantizer | ActivationQuantizer]:
    """The quantizers by the name of the module that uses them: the layer, or the quantizer."""
    weights = {
        name: layer.weight_quantizer
        for name, layer in layers(traced).items()
        if layer.weight_quantizer is not None
    }
    return {**weights, **activation_quantizers(traced)}


def _rounded(traced: fx.GraphModule) -> set[str]:
    """The layers of a network in float mode whose weights lie on their grids."""
    found = set()
    for name, layer in layers(traced).items():
        if layer.weight_quantizer is None:
            continue
        weight = layer.effective_weight()
        with _only(name, layer.weight_quantizer).applied():
            if torch.equal(layer.effective_weight(), weight):
                found.add(name)
    return found


def _only(name: str, quantizer: WeightQuantizer | ActivationQuantizer) -> Change:
    @contextmanager
    def applied() -> Iterator[None]:
        quantizer.enabled = True
        try:
            yield
        finally:
            quantizer.enabled = False

    return Change(module=name, applied=applied)


@torch.no_grad()
def errors_alone(
    traced: fx.GraphModule,
    batches: Sequence[Inputs],
    changes: Sequence[Change],
    description: str,
) -> tuple[Tensor, list[OutputError]]:
    """The error of the output with each of ``changes`` alone, against the network as it is.

    Args:
        traced: the network, in the modes in which it is to be run.
        batches: of its inputs.
        changes: each to a module that the graph calls.
        description: of the progress bar.

    Returns:
        The logits of the network as it is, and the error of each change.
    """
    begins = _first_calls(traced, {change.module for change in changes})
    outputs: list[list[Tensor]] = [[] for _ in changes]
    references: list[Tensor] = []
    bar = Bar(description, len(batches) * len(changes))
    try:
        # A network may draw random numbers in evaluation too: the same ones for each change.
        with evaluating(traced), kept_random_state():
            for batch in batches:
                walk = _Walk(traced, batch)
                for place, node in enumerate(walk.nodes):
                    for index, change in enumerate(changes):
                        if begins.get(change.module) is not node:
                            continue
                        with change.applied():
                            outputs[index].append(walk.end_from(place))
                        bar.advance()
                    walk.step(node)
                references.append(walk.logits)
    finally:
        bar.close()
    reference = torch.cat(references)
    return reference, [output_error(reference, torch.cat(logits)) for logits in outputs]


def _first_calls(traced: fx.GraphModule, names: Iterable[str]) -> dict[str, fx.Node]:
    """The first node that calls each of the modules ``names``."""
    found: dict[str, fx.Node] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module" and node.target in names:
            found.setdefault(str(node.target), node)
    missing = sorted(set(names) - set(found))
    if missing:
        raise QatTricksError(f"the network does not call {', '.join(missing)}: name what it calls")
    return found


class _Walk:
    """Runs a graph node by node, and can run the rest from any place, as often as is asked."""

    def __init__(self, traced: fx.GraphModule, inputs: Inputs) -> None:
        self.nodes = list(traced.graph.nodes)
        self._interpreter = EvaluationInterpreter(traced)
        self._inputs = as_tensors(inputs)
        self._interpreter.args_iter = iter(self._inputs)
        self._taken = 0  # how many of the inputs the walk has read

    @property
    def logits(self) -> Tensor:
        """Of the whole network, at the end of the walk."""
        return logits_of(self._interpreter.env[self.nodes[-1]])

    def step(self, node: fx.Node) -> None:
        """Runs the next node."""
        self._taken += node.op == "placeholder"
        self._run(node)

    def end_from(self, place: int) -> Tensor:
        """The logits of the network, with all nodes from ``place`` on run anew."""
        kept, interpreter = self._interpreter.env, self._interpreter
        # In copies, for a node may change its input in place. Copied as one, so that views of a
        # value are views of its copy.
        interpreter.env = dict(zip(kept, copy.deepcopy(list(kept.values())), strict=True))
        interpreter.args_iter = iter(self._inputs[self._taken :])
        try:
            with kept_random_state():
                for node in self.nodes[place:]:
                    self._run(node)
            return self.logits
        finally:
            interpreter.env = kept
            interpreter.args_iter = iter(self._inputs[self._taken :])

    def _run(self, node: fx.Node) -> None:
        interpreter = self._interpreter
        interpreter.env[node] = interpreter.run_node(node)
        for done in interpreter.user_to_last_uses.get(node, []):
            del interpreter.env[done]
