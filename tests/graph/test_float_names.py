import copy

import pytest
import torch
from torch import nn

from qat_tricks.graph import activation_quantizers, trace
from qat_tricks.graph.float_names import float_names
from qat_tricks.graph.modes import float_mode
from qat_tricks.graph.spec import NARROW
from qat_tricks.tricks import calibrate, fold_batchnorm, quantize
from tests.helpers.networks import Residual, ShortcutOfZeros, images, seeded


def _values(traced, x):
    interpreter = torch.fx.Interpreter(traced, garbage_collect_values=False)
    interpreter.run(x)
    return {node.name: value for node, value in interpreter.env.items()}


# With 4 bits, layers that read a shortcut have grids of their own, which are left out.
@pytest.mark.parametrize(("kind", "bits"), [(Residual, 8), (ShortcutOfZeros, 4)])
def test_the_float_node_yields_what_the_quantizer_passes_on_in_float(kind, bits):
    traced = trace(seeded(kind))
    fold_batchnorm(traced)
    reference = copy.deepcopy(traced)
    calibrate(quantize(traced, activation_bits=bits), [images()])  # grids of residuals are shared
    names = float_names(traced)
    assert len(names) > 5
    assert not any(name.endswith(NARROW) for name in names)
    assert bits == 8 or any(name.endswith(NARROW) for name in activation_quantizers(traced))
    with float_mode(traced), torch.no_grad():
        quantized, expected = _values(traced, images()), _values(reference, images())
    for name, of_float in names.items():
        torch.testing.assert_close(quantized[name], expected[of_float], atol=1e-4, rtol=1e-4)


class ConcatOfStreams(nn.Module):
    """A layer alone reads the concat; an add reads a part of it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.joined, self.fc = nn.Conv2d(6, 3, 1), nn.Linear(3, 5)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.fc((self.joined(torch.cat([a, b], 1)) + self.c(a) + a).mean((2, 3)))


def test_a_concat_that_only_a_grid_for_layers_reads_is_named():
    traced = trace(seeded(ConcatOfStreams))
    calibrate(quantize(traced, activation_bits=4), [images()])
    assert float_names(traced)["cat"] == "cat"
