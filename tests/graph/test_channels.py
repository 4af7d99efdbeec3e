"""Where the channels of a layer are, behind operations and where another layer reads them."""

import pytest
import torch
from torch import nn

from qat_tricks.graph import trace
from qat_tricks.graph.channels import channel_axis

CONV, LINEAR = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)


def behind(layer, *operations):
    """The dimension of the channels of ``layer`` behind ``operations``."""
    traced = trace(nn.Sequential(layer, *operations).eval())
    axis = channel_axis(layer)
    for node in list(traced.graph.nodes)[2:-1]:
        axis = None if axis is None else axis.behind(node, traced)
    return axis


class Mean(nn.Module):
    def __init__(self, dims, keepdim=False):
        super().__init__()
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x):
        return x.mean(self.dims, keepdim=self.keepdim)


@pytest.mark.parametrize(
    ("operations", "place"),
    [
        ((), (1, 4)),
        ((nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout(0.1)), (1, 4)),
        ((Mean((2, 3)),), (1, 2)),
        ((Mean((-1, -2)),), (1, 2)),
        ((Mean((2, 3), True),), (1, 4)),
        ((nn.Flatten(),), (1, 2)),
        ((nn.Flatten(2),), (1, 3)),
        ((nn.Flatten(1, 2),), (1, 3)),
        ((nn.Flatten(2), nn.Flatten()), (1, 2)),
        ((nn.Flatten(2, 2),), (1, 4)),
    ],
)
def test_behind_a_conv(operations, place):
    axis = behind(CONV, *operations)
    shape = torch.Size([2, 3, 6, 6])
    assert (axis.index, axis.rank) == place
    assert nn.Sequential(CONV, *operations)(torch.randn(shape)).dim() == axis.rank


@pytest.mark.parametrize(
    "operations",
    [(nn.MaxPool2d(2),), (nn.AdaptiveAvgPool2d(2),), (Mean((-1, -2)),), (Mean((2, 3)),)],
)
def test_behind_a_linear_pools_may_mix_channels(operations):
    assert behind(LINEAR, *operations) is None


def test_a_pool_over_flattened_positions_takes_channels_for_rows():
    assert behind(CONV, nn.Flatten(2), nn.MaxPool2d(2)) is None


def test_which_layers_take_the_channels():
    conv, flat, tokens = behind(CONV), behind(CONV, nn.Flatten()), behind(LINEAR)
    assert conv.is_input_of(nn.Conv2d(4, 2, 1), 1)
    assert not conv.is_input_of(nn.Linear(4, 2), 1)  # over the width
    assert not conv.is_input_of(nn.Conv1d(4, 2, 1), 1)
    assert flat.is_input_of(nn.Linear(16, 2), 4)
    assert behind(CONV, nn.Flatten(2)).is_input_of(nn.Conv1d(4, 2, 1), 1)
    assert not behind(CONV, nn.Flatten(2)).is_input_of(nn.Linear(16, 2), 4)
    assert tokens.is_input_of(nn.Linear(4, 2), 1)
    assert not tokens.is_input_of(nn.Conv1d(4, 2, 1), 1)
    # positions lie outside of channels
    assert not behind(LINEAR, nn.Flatten()).is_input_of(nn.Linear(16, 2), 4)
    assert not behind(CONV, nn.Flatten(0, 1)).is_input_of(nn.Linear(4, 2), 1)
