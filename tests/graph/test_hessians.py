import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import hessians, layers, trace
from qat_tricks.graph.hessians import input_hessians, patches
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.nets import images, small_net

CONVS = {
    "plain": (nn.Conv2d(4, 6, 3), (2, 4, 9, 8)),
    "groups": (nn.Conv2d(4, 6, (3, 1), groups=2, stride=(2, 1), padding=(1, 2)), (2, 4, 9, 8)),
    "dilated": (nn.Conv2d(4, 4, 3, dilation=2, padding="same", groups=4), (2, 4, 9, 8)),
    "reflected": (nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 7)),
    "1d": (nn.Conv1d(3, 5, 4, stride=3), (2, 3, 20)),
    "3d": (nn.Conv3d(2, 5, 2, padding=1), (2, 2, 4, 5, 6)),
    "linear": (nn.Linear(7, 3), (2, 5, 7)),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_weights_row_times_a_patch_is_an_output_value(name):
    layer, shape = CONVS[name]
    x = torch.randn(shape)
    expected = layer(x) - (layer.bias if name == "linear" else 0)
    groups = getattr(layer, "groups", 1)
    rows = layer.weight.reshape(groups, -1, layer.weight[0].numel())
    values = patches(layer, x) @ rows.transpose(1, 2)
    if name == "linear":
        assert torch.allclose(values.reshape(expected.shape), expected, atol=1e-5)
        return
    bias = layer.bias.view(-1, *[1] * (x.dim() - 2))
    # [groups, N * positions, outputs] to [N, groups * outputs, positions..]
    values = values.unflatten(1, (len(x), -1)).permute(1, 0, 3, 2)
    assert torch.allclose(values.reshape(expected.shape), expected - bias, atol=1e-5)


def test_moments_are_those_of_all_images():
    traced = quantize(trace(small_net()))
    traced.train()
    found, x = layers(traced), images(19)
    with pytest.raises(QatTricksError, match="to measure Hessians on"):
        input_hessians(traced, found, [])
    calibrate(traced, [x])
    once = input_hessians(traced, found, [x])
    assert traced.training
    assert set(once) == set(found)
    stem = patches(found["stem.0"], traced.activation_quantizers.x(x))
    assert torch.allclose(once["stem.0"], stem.transpose(1, 2) @ stem / 19, atol=1e-4)
    assert once["depthwise.0"].shape == (8, 9, 9)
    for name, split in input_hessians(traced, found, list(x.split(6))).items():
        assert torch.allclose(split, once[name], rtol=1e-4, atol=1e-4)


def test_of_very_many_inputs_the_diagonal_is_kept(monkeypatch):
    traced = trace(small_net())
    quantize(traced)
    calibrate(traced, [images(4)])
    whole = input_hessians(traced, layers(traced), [images(4)])
    monkeypatch.setattr(hessians, "WIDEST", 20)
    found = input_hessians(traced, layers(traced), [images(4)])
    assert found["stem.0"].shape == (1, 9, 9)
    assert found["right"].shape == (1, 72)
    assert torch.allclose(found["right"], whole["right"].diagonal(dim1=1, dim2=2), rtol=1e-4)
