import copy

import torch

from qat_tricks.graph import trace
from qat_tricks.graph.float_names import float_names
from qat_tricks.graph.modes import float_mode
from qat_tricks.tricks import calibrate, fold_batchnorm, quantize
from tests.helpers.networks import Residual, images, seeded


def _values(traced, x):
    interpreter = torch.fx.Interpreter(traced, garbage_collect_values=False)
    interpreter.run(x)
    return {node.name: value for node, value in interpreter.env.items()}


def test_the_float_node_yields_what_the_quantizer_passes_on_in_float():
    traced = trace(seeded(Residual))
    fold_batchnorm(traced)
    reference = copy.deepcopy(traced)
    calibrate(quantize(traced), [images()])  # grids of residuals are shared
    names = float_names(traced)
    assert len(names) > 5
    with float_mode(traced), torch.no_grad():
        quantized, expected = _values(traced, images()), _values(reference, images())
    for name, of_float in names.items():
        torch.testing.assert_close(quantized[name], expected[of_float], atol=1e-4, rtol=1e-4)
