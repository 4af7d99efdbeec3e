"""Averaged networks: weights are averaged, masks and zero points are not."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from qat_tricks.graph import activation_quantizers, layers
from qat_tricks.recipes.ptq import quantize
from qat_tricks.trainer.averaging import is_averaging, keep_grids
from qat_tricks.tricks import prune
from tests.helpers.lightning import pl
from tests.helpers.nets import images, small_net


def test_masks_and_zero_points_are_the_trained_networks_and_the_rest_is_averaged():
    module = torch.nn.Module()
    module.backbone = quantize(small_net(), [images()])
    prune(module.backbone, 0.5)
    average = AveragedModel(module, use_buffers=True)
    average.update_parameters(module)
    with torch.no_grad():
        for name, layer in layers(module.backbone).items():
            layer.weight_mask.copy_(1 - layer.weight_mask)
            layer.weight.add_(1.0 if name == "head" else 0.0)
        for quantizer in activation_quantizers(module.backbone).values():
            quantizer.zero_point.add_(3)
    average.update_parameters(module)
    averaged = average.module.backbone
    assert float(layers(averaged)["head"].weight_mask.mean()) == pytest.approx(0.5)
    shift = layers(module.backbone)["head"].weight - layers(averaged)["head"].weight
    holder = SimpleNamespace(_average_model=average)
    keep_grids(SimpleNamespace(callbacks=[object(), holder]), module)
    for name, layer in layers(module.backbone).items():
        assert torch.equal(layers(averaged)[name].weight_mask, layer.weight_mask)
    for name, quantizer in activation_quantizers(module.backbone).items():
        assert torch.equal(activation_quantizers(averaged)[name].zero_point, quantizer.zero_point)
    torch.testing.assert_close(shift, torch.full_like(shift, 0.5))
    after = layers(module.backbone)["head"].weight - layers(averaged)["head"].weight
    assert torch.equal(after, shift)  # weights stay an average


@pytest.mark.skipif(not hasattr(pl.callbacks, "WeightAveraging"), reason="came with Lightning 2.6")
def test_lightnings_own_callback_is_known_as_averaging():
    assert is_averaging(pl.callbacks.WeightAveraging())
    assert not is_averaging(pl.callbacks.ModelCheckpoint())
