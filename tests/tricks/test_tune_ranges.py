import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, trace
from qat_tricks.numerics.scheme import ACTIVATIONS
from qat_tricks.tricks import calibrate, quantize, tune_ranges
from tests.helpers.nets import images, small_net


class Outlier(nn.Module):
    """A linear whose second input is large, and of use or not."""

    def __init__(self, use: float) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(2))
            self.first.bias.zero_()
            self.last.weight.copy_(torch.tensor([[1.0, use], [-1.0, -use]]))

    def forward(self, x):
        return self.last(self.first(x))


def _tuned_range(use: float, activations: str | None = None) -> float:
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 20.0])
    traced = quantize(trace(Outlier(use).eval()), activations=activations)
    calibrate(traced, [x], estimator="minmax")
    tune_ranges(traced, [x])
    return activation_quantizers(traced)["activation_quantizers.first"].range[1]


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_large_values_are_clipped_where_the_logits_do_not_need_them(activations):
    assert _tuned_range(0.0, activations) < 0.6 * _tuned_range(0.05, activations)


def test_low_bits_follow_the_float_network_more_closely():
    errors = []
    for tuned in (False, True):
        traced = quantize(trace(small_net()), activation_bits=4, first_last_bits=None)
        calibrate(traced, [images(128)], estimator="minmax")
        if tuned:
            tune_ranges(traced, [images(128)])
        errors.append(
            (traced(images(256, seed=3)) - small_net()(images(256, seed=3))).square().mean().item()
        )
    assert errors[1] < 0.9 * errors[0]


def test_nothing_but_ranges_changes():
    traced = calibrate(quantize(trace(small_net().train())), [images()])
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    trainable = [name for name, parameter in traced.named_parameters() if parameter.requires_grad]
    with torch.inference_mode():
        tune_ranges(traced, [images(3), images(20)])
    assert traced.training
    assert [
        name for name, parameter in traced.named_parameters() if parameter.requires_grad
    ] == trainable
    assert all(parameter.grad is None for parameter in traced.parameters())
    for key, value in traced.state_dict().items():
        assert key.startswith("activation_quantizers") or torch.equal(value, before[key])
    traced.eval()(images()).sum().backward()  # no inference tensor was left behind


def test_errors():
    with pytest.raises(QatTricksError, match="calibrate the network first"):
        tune_ranges(quantize(trace(small_net())), [images()])
    with pytest.raises(QatTricksError, match="no images"):
        tune_ranges(calibrate(quantize(trace(small_net())), [images()]), [])
