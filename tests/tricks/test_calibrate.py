import copy

import pytest
import torch
from torch import nn

from qat_tricks.deploy.export import export_onnx
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import activation_quantizers, layers, rebuild, spec_of, trace
from qat_tricks.numerics import ESTIMATORS
from qat_tricks.tricks import calibrate, quantize
from tests.helpers.nets import images, small_net


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_quantized_network_follows_the_float_one(estimator):
    traced = quantize(trace(small_net()))
    calibrate(traced, [images(32), images(32, seed=2)], estimator=estimator)
    expected, got = small_net()(images(64, seed=3)), traced.eval()(images(64, seed=3))
    assert (expected - got).square().mean() < 0.02 * expected.var()


def test_the_range_is_that_of_the_float_values():
    traced = calibrate(quantize(trace(small_net())), [images()], estimator="minmax")
    first = activation_quantizers(traced)["activation_quantizers.x"]
    low, high = images().min(), images().max()
    assert first.scale * 255 == pytest.approx(float(high - low), rel=1e-5)


def test_mode_and_observers_are_left_as_they_were():
    traced = quantize(trace(small_net().train()))
    calibrate(traced, [images()])
    assert traced.training
    assert all(q.observer is None and q.enabled for q in activation_quantizers(traced).values())


def test_errors():
    with pytest.raises(QatTricksError, match="quantize the network first"):
        calibrate(trace(small_net()), [images()])
    with pytest.raises(QatTricksError, match="no images"):
        calibrate(quantize(trace(small_net())), [])
    with pytest.raises(QatTricksError, match="NaN"):
        calibrate(quantize(trace(small_net())), [images() * torch.nan])


class Stream(nn.Module):
    """Two residual branches on a stream without activation functions; each writes the image into a
    channel of its own.
    """

    def __init__(self, gain=1.0):
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(c, 4, 1, bias=False) for c in (1, 4, 4))
        self.head = nn.Linear(4, 5)
        with torch.no_grad():
            self.stem.weight.copy_(torch.tensor([1.0, -1.0, 0, 0]).view(4, 1, 1, 1))
            for conv, channel in ((self.a, 2), (self.b, 3)):
                conv.weight.zero_()[channel, :2, 0, 0] = torch.tensor([1.0, -1.0])
            self.b.weight.mul_(gain)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(torch.relu(x))
        x = x + self.b(torch.relu(x))
        return self.head(x.mean([2, 3]))


def test_tensors_that_are_added_share_a_range_where_that_rounds_less():
    together = calibrate(quantize(trace(Stream())), [images()])
    spec = spec_of(together)["activations"]
    assert spec["stem"]["nodes"] == ["stem", "a", "add", "b", "add_1"]
    assert set(spec) == {"x", "stem", "relu", "relu_1", "mean"}
    apart = calibrate(quantize(trace(Stream(gain=50.0))), [images()])
    assert spec_of(apart)["activations"]["stem"]["nodes"] == ["stem"]
    assert (
        "add"
        in spec_of(calibrate(quantize(trace(Stream())), [images()], share_residuals=False))[
            "activations"
        ]
    )


def test_an_add_on_one_grid_rounds_nothing_and_the_spec_rebuilds_it():
    net = Stream()
    traced = calibrate(quantize(trace(copy.deepcopy(net))), [images()]).eval()
    stream = activation_quantizers(traced)["activation_quantizers.stem"]
    add = traced.get_submodule("kernels.add")
    low, high = stream.range
    x, y = (stream(torch.rand(100) * (high - low) / 2 + low / 2) for _ in range(2))
    with torch.no_grad():
        torch.testing.assert_close(add(x, y), (x + y).clamp(low, high), rtol=0, atol=1e-6)
    rebuilt = rebuild(net, spec_of(traced))
    rebuilt.load_state_dict(traced.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(images()), traced(images()))


def scaled(factor):
    """A network without BatchNorm, and images, whose values are all ``factor`` times as large."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for module in (net[0], net[2], net[5]):
            module.bias.mul_(factor)
    return net, factor * images(64)


@torch.no_grad()
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
@pytest.mark.parametrize("exponent", [-45, -30, -20, 0, 20, 40])
def test_the_size_of_values_does_not_matter(estimator, exponent, tmp_path):
    """With a factor that is a power of two, not one bit differs."""
    net, x = scaled(1.0)
    expected = calibrate(quantize(trace(net)), [x], estimator=estimator)(x)
    net, x = scaled(2.0**exponent)
    traced = calibrate(quantize(trace(net)), [x], estimator=estimator)
    assert torch.equal(traced(x), expected * 2.0**exponent)
    if estimator == "minmax":
        assert export_onnx(traced, tmp_path / "model.onnx", x[:2], images=[x]).sqnr_db > 100


@pytest.mark.parametrize("factor", [1e-20, 1e22])
def test_values_that_kernels_cannot_multiply_are_refused(factor):
    net, x = scaled(factor)
    with pytest.raises(QatTricksError, match=r'^"\w+" has values .* scale the network\'s inputs'):
        calibrate(quantize(trace(net)), [x])


@torch.no_grad()
def test_a_few_dead_channels_are_calibrated(tmp_path):
    """Weights of nearly nothing, as weight decay leaves them: products of scales are normal."""
    net, x = scaled(1.0)
    expected = net(x)
    for value in (0.0, 1e-25, 2e-36):
        net[2].weight[1:3], net[2].bias[1:3] = value, 0.0
        expected = net(x)
        traced = calibrate(quantize(trace(copy.deepcopy(net))), [x])
        assert (traced(x) - expected).square().mean() < 1e-3 * expected.square().mean()
        report = export_onnx(traced, tmp_path / "model.onnx", x[:2], images=[x])
        assert report.sqnr_db > 100
        layer = layers(traced)["2"]
        if value:
            assert (layer.bias_scale() >= torch.finfo(torch.float32).tiny).all()
