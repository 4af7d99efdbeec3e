import math

import pytest
import torch
from torch import nn

from qat_tricks.graph import trace
from qat_tricks.graph.activation_limits import activation_limits
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.nets import images


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [(nn.ReLU(), 0.0, math.inf), (nn.ReLU6(), 0.0, 6.0), (nn.Sigmoid(), -math.inf, math.inf)],
)
def test_a_layer_yields_what_its_activation_function_lets_through(activation, low, high):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), activation, nn.Conv2d(4, 4, 3)).eval()
    traced = quantize(trace(net))
    calibrate(traced, [images(4)])
    first, last = (node for node in traced.graph.nodes if str(node.target) in ("0", "2"))
    assert activation_limits(first, traced) == (low, high)
    assert activation_limits(last, traced) == (-math.inf, math.inf)


def test_a_layer_that_others_read_beside_the_activation_function_has_no_limits():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return self.last(torch.relu(x) + x)

    traced = quantize(trace(Net().eval()))
    calibrate(traced, [images(4)])
    conv = next(node for node in traced.graph.nodes if str(node.target) == "conv")
    assert activation_limits(conv, traced) == (-math.inf, math.inf)
