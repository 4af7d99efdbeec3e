"""Which values of a network are integers or truth values, such as token ids and masks: no quantizer
may round them.
"""

from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.graph.inputs import Inputs, as_tensors, first_images
from qat_tricks.graph.nodes import INTEGERS


@torch.no_grad()
def note_integers(traced: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """Notes at each node of ``traced`` that yields integers or truth values that it does;
    ``inputs`` show which.
    """
    was_training = traced.training
    _Notes(traced.eval()).run(*as_tensors(first_images(inputs, 2)))
    return traced.train(was_training)


class _Notes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta[INTEGERS] = not result.is_floating_point()
        return result
