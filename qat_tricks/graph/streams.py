"""Runs a network node by node on several batches at once: two networks can so be walked together.

A trick that works layer by layer needs each layer's inputs and outputs, in the float network and in
the quantized one, with the layers before already done. Walking both graphs once costs two forward
passes, not one a layer.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from qat_tricks.errors import QatTricksError
from qat_tricks.graph.inputs import Inputs, as_tensors
from qat_tricks.graph.two_modes import EvaluationInterpreter


class Stream:
    """Runs a graph node by node on all batches at once; a value is kept until its last use."""

    def __init__(self, traced: fx.GraphModule, batches: Sequence[Inputs]) -> None:
        self.interpreter = [EvaluationInterpreter(traced) for _ in batches]
        for interpreter, batch in zip(self.interpreter, batches, strict=True):
            interpreter.args_iter = iter(as_tensors(batch))
        self.nodes = iter(traced.graph.nodes)

    def advance(self) -> list[Tensor]:
        """Runs the next node; returns its output for each batch."""
        return self._run(next(self.nodes))

    def inputs_of(self, node: fx.Node) -> list[Any]:
        """What ``node``, the next one to run, reads first, for each batch."""
        return [interpreter.env[node.all_input_nodes[0]] for interpreter in self.interpreter]

    def run_until(self, name: str) -> list[Tensor]:
        """Runs up to and with the node called ``name``."""
        for node in self.nodes:
            outputs = self._run(node)
            if node.name == name:
                return outputs
        raise QatTricksError(
            f'the float reference has no "{name}": give the network that was quantized'
        )

    def _run(self, node: fx.Node) -> list[Any]:
        outputs = []
        for interpreter in self.interpreter:
            output = interpreter.run_node(node)
            # Outputs that no later node reads are dropped: all batches are in memory at once.
            interpreter.env[node] = output
            for done in interpreter.user_to_last_uses.get(node, []):
                del interpreter.env[done]
            outputs.append(output)
        return outputs
