"""Notes which values of a network are integers or truth values, such as token ids and masks.

No quantizer may round them.
"""

from typing import Any

import torch
from torch import Tensor, fx

from qat_tricks.graph.inputs import Inputs, as_tensors, first_images
from qat_tricks.graph.modes import evaluating
from qat_tricks.graph.nodes import INTEGERS
from qat_tricks.graph.two_modes import EvaluationInterpreter


@torch.no_grad()
def note_integers(traced: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """Notes at each node of ``traced`` whether it yields integers or truth values.

    Args:
        traced: a traced network; it is run once, in evaluation mode.
        inputs: of two images or more; the nodes' values show their types.
    """
    with evaluating(traced):
        _Notes(traced).run(*as_tensors(first_images(inputs, 2)))
    return traced


class _Notes(EvaluationInterpreter):
    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta[INTEGERS] = not result.is_floating_point()
        return result
