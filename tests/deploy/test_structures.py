"""Each structure, quantized, is close to the user's network, and its file runs as simulated."""

import pytest
import torch

from qat_tricks.deploy.cost.forecast import forecast_network
from qat_tricks.deploy.export import export_onnx
from qat_tricks.graph import activation_quantizers
from qat_tricks.recipes.ptq import quantize
from tests.helpers.structures import STRUCTURES, built, inputs, ratio

# Which of several values is the largest, and the integers made of that, may change with rounding.
DISCRETE = {"embedding_of_argmax", "tied_embedding"}
# PyTorch's exporter takes 20 seconds for each; "lstm" goes the same way.
SLOW = {"rnn", "gru"}


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in STRUCTURES if name not in SLOW])
def test_quantized_it_is_close_and_the_file_runs_as_simulated(name, tmp_path):
    build, shape = STRUCTURES[name]
    net, x = built(build), inputs(shape)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    quantized = quantize(net, [inputs(shape, 64)])
    # the user's network stays
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    given = []
    for quantizer in activation_quantizers(quantized).values():
        quantizer.register_forward_hook(lambda module, args, output: given.append(args[0]))
    assert ratio(net(x), quantized(x)) > (10 if name in DISCRETE else 30)
    assert all(isinstance(values, torch.Tensor) and values.is_floating_point() for values in given)
    report = export_onnx(
        quantized, tmp_path / "model.onnx", x[:2], images=[x], min_top1_agreement=0.0
    )
    assert report.sqnr_db > 40
    forecast_network(net, x)
