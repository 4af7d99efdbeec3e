import copy
import io

import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import place_quantizers, rebuild, spec_of, trace
from qat_tricks.graph.surgery import batchnorm_to_conv, give_bias
from qat_tricks.recipes.ptq import quantize
from qat_tricks.tricks import learn_scales, prune
from tests.helpers.nets import images, small_net


@pytest.mark.parametrize(
    ("overrides", "pruned"),
    [
        ((), False),
        (("stages.ptq.tricks.quantize.weight_bits=3",), True),
        (("stages.ptq.tricks.equalize.uncap=true",), True),
    ],
    ids=["int8", "w3-pruned", "uncapped-pruned"],
)
def test_rebuilt_network_loads_strictly_and_computes_the_same(overrides, pruned):
    quantized = quantize(small_net(), [images()], overrides=list(overrides))
    learn_scales(quantized)
    if pruned:
        prune(quantized, 0.4)
    file = io.BytesIO()
    torch.save({"spec": spec_of(quantized), "state": quantized.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)  # nothing but plain data and tensors

    rebuilt = rebuild(small_net(seed=5), saved["spec"])
    rebuilt.load_state_dict(saved["state"], strict=True)
    rebuilt.eval()
    assert torch.equal(rebuilt(images(seed=9)), quantized(images(seed=9)))
    trainable = {name for name, p in quantized.named_parameters() if p.requires_grad}
    assert {name for name, p in rebuilt.named_parameters() if p.requires_grad} == trainable


def test_spec_of_another_network_is_refused():
    spec = copy.deepcopy(spec_of(quantize(small_net(), [images()])))
    with pytest.raises(QatTricksError, match="another network"):
        rebuild(nn.Sequential(nn.Conv2d(1, 2, 1)), spec)


def test_a_spec_with_the_older_key_for_untraced_parts_is_rebuilt():
    traced = trace(small_net(), untraced=["block"])
    place_quantizers(traced)
    spec = copy.deepcopy(spec_of(traced))
    assert spec["untraced"] == ["block"]
    older = {("whole" if key == "untraced" else key): value for key, value in spec.items()}
    rebuilt = rebuild(small_net(), older)
    rebuilt.load_state_dict(traced.state_dict(), strict=True)
    assert spec_of(rebuilt) == spec
    assert "whole" in older


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("own", [True, False, None])
@pytest.mark.parametrize("batchnorm", [True, False, None])
def test_a_bias_trains_if_one_that_it_stands_for_did(weight, own, batchnorm):
    conv = nn.Conv2d(2, 4, 1, bias=own is not None)
    norm = nn.BatchNorm2d(4, affine=batchnorm is not None)
    conv.weight.requires_grad_(weight)
    if own is not None:
        conv.bias.requires_grad_(own)
    if batchnorm is not None:
        norm.bias.requires_grad_(batchnorm)
    give_bias(conv, norm)
    expected = own or batchnorm if (own, batchnorm) != (None, None) else weight
    assert conv.bias.requires_grad == bool(expected)
    assert conv.weight.requires_grad == weight


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_conv_that_was_a_batchnorm_trains_what_the_batchnorm_did(weight, bias):
    traced = trace(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)))
    traced.get_submodule("0").weight.requires_grad_(weight)
    traced.get_submodule("0").bias.requires_grad_(bias)
    conv = batchnorm_to_conv(traced, "0")
    assert (conv.weight.requires_grad, conv.bias.requires_grad) == (weight, bias)
    plain = trace(nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 2, 1)))
    assert not any(p.requires_grad for p in batchnorm_to_conv(plain, "0").parameters())
