import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_tricks.deploy.cost.forecast import forecast_network
from qat_tricks.graph import is_layer, rebuild, spec_of, trace
from qat_tricks.tricks import calibrate, fold_batchnorm, quantize
from tests.helpers.nets import images
from tests.helpers.structures import STRUCTURES, built, inputs


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


SHARED = ["normalized_head", "tied_weight", "two_computed_weights", "tied_embedding",
          "weight_called_and_read", "standardized_conv_beside_the_conv"]  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_a_parameter_used_in_several_ways_is_trained_as_the_users(name):
    build, shape = STRUCTURES[name]
    net, x = built(build), inputs(shape)
    traced = trace(copy.deepcopy(net))
    steps = []
    for network in (net.train(), traced.train()):
        network(x).log_softmax(1)[:, 0].sum().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.01 * parameter.grad
        steps.append(network.eval()(x).detach())
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-5)
    trained = {id(p): p for p in traced.parameters()}
    assert len(trained) == len(list(net.parameters()))  # no weight is there twice


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("normalized_head", 8 * 5),
        ("tied_weight", 8 * 12),
        ("two_computed_weights", 2 * 8 * 5),
        ("standardized_conv_beside_the_conv", 14 * 14 * 8 * 72),
    ],
)
def test_a_call_that_stays_a_function_is_named(name, products):
    build, shape = STRUCTURES[name]
    seen = forecast_network(built(build), inputs(shape, 1))
    assert sum(row.macs for row in seen.in_float) == products
    assert seen.integer_macs + products == seen.total_macs
    assert {row.operation for row in seen.in_float if row.macs} <= {"linear", "conv2d"}


class Blurred(nn.Module):
    """A fixed kernel, a frozen one, and one computed from a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("fixed", torch.full((1, 1, 3, 3), 1 / 9))
        self.frozen = nn.Parameter(torch.randn(1, 1, 3, 3), requires_grad=False)
        self.scaled = nn.Parameter(torch.randn(1, 1, 3, 3), requires_grad=False)
        self.learned = nn.Parameter(torch.randn(2, 1, 3, 3))

    def forward(self, x):
        x = F.conv2d(F.conv2d(x, self.fixed), self.frozen)
        return F.conv2d(F.conv2d(x, self.scaled * 2), self.learned * 2).mean((2, 3))


def test_what_was_not_trained_is_not_trained():
    traced = trace(Blurred())
    trained = {name for name, p in traced.named_parameters() if p.requires_grad}
    assert len(trained) == 1
    assert traced.get_parameter(trained.pop()).shape[0] == 2
