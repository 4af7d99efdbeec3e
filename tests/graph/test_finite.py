"""Networks whose numbers are not finite are refused, and the number is named."""

import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from qat_tricks.graph.finite import check_finite
from qat_tricks.recipes.ptq import quantize
from qat_tricks.tricks import calibrate
from qat_tricks.tricks import quantize as place
from tests.helpers.nets import images, small_net

NUMBERS = [
    "stem.0.weight", "stem.1.running_var", "stem.1.running_mean", "stem.1.bias", "left.bias",
    "head.weight", "head.bias",
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_number_is_named(number, value):
    net = small_net()
    net.state_dict()[number].view(-1)[1] = value
    with pytest.raises(QatTricksError, match=f'^"{number}" of the network holds NaN or infinite'):
        quantize(net, [images()])


def test_a_negative_variance_is_named():
    net = small_net()
    net.stem[1].running_var[0] = -1
    with pytest.raises(QatTricksError, match=r'^"stem\.1\.running_var" .* holds negative numbers'):
        quantize(net, [images()])


def test_a_network_that_is_calibrated_by_itself_is_checked_too():
    traced = place(trace(small_net()))
    with torch.no_grad():
        traced.get_submodule("head").weight[0, 0] = torch.nan
    with pytest.raises(QatTricksError, match=r'"head\.weight"'):
        calibrate(traced, [images()])


def test_masks_and_quantizers_without_a_range_do_not_count():
    net = small_net()
    net.register_buffer("mask", torch.full((3, 3), -torch.inf))
    check_finite(net)
    check_finite(place(trace(net)))
    check_finite(nn.Linear(2, 2, device="meta"))
