import torch
from torch import nn

from qat_tricks.graph import as_layer, is_layer, layers, place_quantizers, trace
from qat_tricks.tricks import calibrate, equalize, fold_batchnorm
from tests.helpers.nets import images, small_net


def _quantized():
    traced = trace(small_net())
    fold_batchnorm(traced)
    place_quantizers(traced)
    return calibrate(traced, [images()])


def test_a_layer_keeps_its_identity_and_parameters():
    conv = torch.nn.Conv2d(2, 3, 1)
    weight = conv.weight
    layer = as_layer(conv)
    assert layer is conv
    assert layer.weight is weight
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert isinstance(layer, torch.nn.Conv2d)


def test_mask_comes_before_the_quantizer():
    layer = layers(_quantized())["block.conv1"]
    layer.weight_mask = torch.ones_like(layer.weight)
    layer.weight_mask[0, 0] = 0
    assert (layer.effective_weight()[0, 0] == 0).all()
    assert layer.effective_weight()[1].abs().sum() > 0


def test_bias_is_on_the_integer_grid_in_evaluation_only():
    layer = layers(_quantized())["stem.0"].eval()
    steps = layer.effective_bias().double() / layer.bias_scale()
    assert torch.allclose(steps, steps.round(), atol=1e-2)
    assert layer.train().effective_bias() is layer.bias


def test_a_dead_channels_bias_still_fits_int32():
    layer = layers(_quantized())["stem.0"].eval()
    with torch.no_grad():
        layer.weight[2] = 1e-20
        layer.bias[2] = 5.0
    assert (layer.bias.double() / layer.bias_scale()).abs().max() < 2**31
    torch.testing.assert_close(layer.effective_bias(), layer.bias, rtol=1e-4, atol=1e-4)


def test_bias_gets_its_gradient_in_evaluation_too():
    traced = _quantized().eval()
    traced(images()).sum().backward()
    assert layers(traced)["stem.0"].bias.grad.abs().sum() > 0


def test_a_weight_that_a_hook_computes_makes_no_layer():
    """A change of it would be undone at the next call."""
    conv = nn.utils.weight_norm(nn.Conv2d(1, 2, 3))
    assert not is_layer(conv)
    net = nn.Sequential(conv, nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3)).eval()
    expected = net(images())
    traced = trace(net, ["0"])
    assert fold_batchnorm(traced) == []
    assert equalize(traced) == []
    torch.testing.assert_close(traced(images()), expected)
