import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.graph import is_layer, rebuild, spec_of, trace
from qat_tricks.tricks import calibrate, fold_batchnorm, quantize
from tests.helpers.nets import images


class SamePadded(nn.Conv2d):
    """A conv that pads by itself, as those ported from TensorFlow do."""

    def forward(self, x):
        return self._conv_forward(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class Standardized(nn.Conv2d):
    """A conv on a weight of zero mean and unit variance (Qiao et al. 2019)."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.same = SamePadded(1, 4, 3, stride=2)
        self.twice = Standardized(4, 4, 3)
        self.kernel, self.matrix = (
            nn.Parameter(torch.randn(4, 2, 1, 1)),
            nn.Parameter(torch.randn(5, 4)),
        )

    def forward(self, x):
        x = self.twice(F.relu(self.twice(self.same(x))))
        x = F.relu(F.conv2d(x, self.kernel, groups=2, padding="valid"))
        return F.linear(x.mean([2, 3]), weight=self.matrix)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def test_functions_become_modules_of_the_same_function(net):
    expected = net(images())
    traced = trace(net)
    torch.testing.assert_close(traced(images()), expected)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    names = [name for name in called if is_layer(traced.get_submodule(name))]
    assert names == ["same", "twice", "twice", "layers.conv2d_3", "layers.linear"]
    assert traced.get_submodule("same").stride == (2, 2)
    assert traced.get_submodule("layers.conv2d_3").groups == 2


def test_parameters_stay_the_users_unless_computed(net):
    traced = trace(net)
    assert traced.get_submodule("same").weight is net.same.weight
    assert traced.get_submodule("layers.linear").weight is net.matrix
    computed = traced.get_submodule("twice").weight
    torch.testing.assert_close(computed.std((1, 2, 3)), torch.ones(4))
    assert sorted(dict(traced.named_parameters())) == [
        "layers.conv2d_3.weight",
        "layers.linear.weight",
        "same.bias",
        "same.weight",
        "twice.bias",
        "twice.weight",
    ]


def test_they_are_quantized_and_rebuilt(net):
    traced = calibrate(quantize(trace(net)), [images()]).eval()
    assert all(entry["weight"]["bits"] == 8 for entry in spec_of(traced)["layers"].values())
    assert len(spec_of(traced)["layers"]) == 4
    rebuilt = rebuild(Net(), spec_of(traced)).eval()
    rebuilt.load_state_dict(traced.state_dict())
    assert torch.equal(rebuilt(images()), traced(images()))


class Dynamic(nn.Module):
    def forward(self, x):
        return F.conv2d(x, x[:1, :, :3, :3])


def test_a_weight_that_depends_on_the_input_stays_a_function():
    traced = trace(Dynamic())
    assert [node.op for node in traced.graph.nodes].count("call_module") == 0
    assert torch.equal(traced(images()), Dynamic()(images()))


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with its activation, written out and checking its input, as timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(x)


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 4, 3), NormAct(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean([2, 3]))


def test_a_batchnorm_written_out_is_folded_and_follows_the_mode():
    net = Normalized()
    net(images())  # statistics
    traced = trace(net.eval())
    assert list(traced.state_dict()) == list(net.state_dict())
    expected = net(images())
    torch.testing.assert_close(traced(images()), expected)
    before = traced.get_submodule("bn").running_mean.clone()
    traced.train()(images(seed=3) + 1)
    assert not torch.equal(traced.get_submodule("bn").running_mean, before)
    # the user's own forward does not count
    assert traced.get_submodule("bn").num_batches_tracked == 1
    expected = traced.eval()(images())
    assert fold_batchnorm(traced) == [("conv", "bn")]
    torch.testing.assert_close(traced(images()), expected)
