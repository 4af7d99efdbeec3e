"""Each structure keeps its function at every step, and its file runs as it is simulated."""

import copy

import pytest
import torch

from qat_tricks.deploy.cost.forecast import forecast_network
from qat_tricks.deploy.export import export_onnx
from qat_tricks.graph import activation_quantizers, trace
from qat_tricks.graph.ranks import note_ranks
from qat_tricks.recipes.ptq import quantize
from qat_tricks.tricks.equalize import equalize
from qat_tricks.tricks.fold_batchnorm import batchnorms_to_convs, fold_batchnorm
from tests.helpers.structures import STRUCTURES, built, inputs

# Without images a bias is absorbed by statistics: of a few values that lie below, some is lost.
BY_STATISTICS = {
    "avg_pool_without_zeros", "avg_pool_ceil", "padded_max_pool", "max_pool_ceil", "adaptive_pool",
}  # fmt: skip
# Which of several values is the largest, and the integers made of that, may change with rounding.
DISCRETE = {"embedding_of_argmax", "tied_embedding"}


def ratio(expected, found):
    """The signal to noise ratio in dB."""
    noise = (found - expected).double().square().mean()
    return float(10 * torch.log10(expected.double().square().mean() / noise.clamp_min(1e-300)))


@torch.no_grad()
@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("seen", [True, False], ids=["images", "no_images"])
def test_each_step_keeps_the_function(name, seen):
    build, shape = STRUCTURES[name]
    net, x = built(build), inputs(shape)
    expected = net(x)
    traced = trace(copy.deepcopy(net))
    assert ratio(expected, traced(x)) > 130
    note_ranks(traced, x)
    fold_batchnorm(traced)
    batchnorms_to_convs(traced)
    assert ratio(expected, traced(x)) > 120  # float32, rounded a few times more
    equalize(traced, [x] if seen else [])
    assert ratio(expected, traced(x)) > (40 if name in BY_STATISTICS and not seen else 120)


@torch.no_grad()
@pytest.mark.parametrize("name", STRUCTURES)
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
