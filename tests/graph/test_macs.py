import torch
from torch import nn

from qat_tricks.graph import activation_quantizers, trace
from qat_tricks.graph.macs import macs_of_calls
from qat_tricks.tricks import quantize
from tests.helpers.nets import images, small_net


def test_macs_of_convs_groups_and_linears():
    found = macs_of_calls(quantize(trace(small_net())), images(5, size=8))
    calls = {call.layer: call.macs for call in found}
    assert calls["stem.0"] == 8 * 1 * 9 * 8 * 8
    assert calls["depthwise.0"] == 8 * 1 * 9 * 4 * 4
    assert calls["right"] == 8 * 8 * 9 * 4 * 4
    assert calls["head"] == 16 * 10


def test_each_call_has_its_own_positions_and_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.relu(self.conv(x))[..., ::2]).mean([2, 3])

    traced = quantize(trace(Twice().eval()))
    calls = macs_of_calls(traced, images(2, channels=4, size=8))
    assert [(call.layer, call.macs) for call in calls] == [
        ("conv", 4 * 4 * 9 * 64),
        ("conv", 4 * 4 * 9 * 32),
    ]
    grids = activation_quantizers(traced)
    assert calls[0].grid is grids["activation_quantizers.x"]
    assert calls[1].grid is not calls[0].grid
    assert calls[1].grid in grids.values()
