"""A traced network is the user's own in all but its forward."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import spec_of, trace
from qat_tricks.graph.traceable import TraceSettings
from qat_tricks.graph.traced_network import TracedNetwork, adopt, drop_unused
from tests.helpers.nets import Block, Named, images


@pytest.fixture
def quantized():
    torch.manual_seed(0)
    return qat_tricks.quantize(Named(), [images(32)])


def test_attributes_properties_methods_and_parts_are_the_users(quantized):
    assert isinstance(quantized, Named)
    assert isinstance(quantized, TracedNetwork)
    assert (quantized.num_classes, quantized.width, quantized.kind) == (10, 8, "example")
    assert quantized.describe() == "10 classes"
    assert isinstance(quantized.features, nn.Sequential)
    assert len(quantized.features) == 5
    assert isinstance(quantized.features[0], nn.Conv2d)
    assert isinstance(quantized.features[-1], Block)
    assert isinstance(quantized.features[3], nn.ReLU)
    assert [type(m).__name__ for m in quantized.features[2:4]] == ["Identity", "ReLU"]
    assert [block.kernel_size for block in quantized.blocks] == [(1, 1), (1, 1)]
    assert "unused.weight" in quantized.state_dict()


def test_methods_that_call_the_network_work(quantized):
    expected = quantized(images()).argmax(1)
    assert torch.equal(quantized.predict(images()), expected)
    assert torch.equal(quantized.predict_by_forward(images()), expected)


def test_the_users_own_network_stays_usable():
    net = Named().eval()
    expected = net(images())
    traced = trace(net)
    assert torch.equal(net.forward_features(images()), Named.forward_features(net, images()))
    assert torch.equal(net.features(images()), net.features[0:](images()))
    assert torch.equal(net(images()), expected)
    assert torch.equal(traced(images()), expected)
    assert traced.features[0] is net.features[0]


def test_copies_and_pickles_keep_the_spec(quantized, tmp_path):
    torch.save(quantized, tmp_path / "net.pt")
    for twin in (
        torch.load(tmp_path / "net.pt", weights_only=False),
        pickle.loads(pickle.dumps(quantized)),
        copy.deepcopy(quantized),
        copy.copy(quantized),
    ):
        assert isinstance(twin, Named)
        assert torch.equal(twin(images()), quantized(images()))
        assert spec_of(twin) == spec_of(quantized)
        assert qat_tricks.export_onnx(twin, tmp_path / "net.onnx", images()).sqnr_db > 60
        with pytest.raises(QatTricksError, match="forward_features"):
            twin.forward_features(images())


def test_a_sequential_has_only_the_users_layers():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    quantized = qat_tricks.quantize(nn.Sequential(*net, nn.Linear(4 * 36, 3)), [images()])
    assert len(quantized) == 5
    assert isinstance(quantized[-1], nn.Linear)
    kinds = ["Conv2d", "BatchNormStandIn", "ReLU", "Flatten", "Linear"]
    assert [type(layer).__name__ for layer in quantized] == kinds
    assert len(quantized[1:]) == 4


def test_older_checkpoints_have_only_parts_in_use():
    net = Named()
    traced = adopt(net, torch.fx.symbolic_trace(net).graph)
    drop_unused(traced)
    assert not any(key.startswith("unused") for key in traced.state_dict())
    assert "unused.weight" in net.state_dict()


def test_older_checkpoints_have_parameters_in_the_order_of_use():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.last, self.blocks = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 4), Inner()])

        def forward(self, x):
            for block in reversed(self.blocks):
                x = block(x)
            return self.last(x) * self.scale

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.second(self.first(x))

    net = Reversed()
    before = torch.fx.GraphModule(net, torch.fx.symbolic_trace(net).graph)
    older = trace(net, settings=TraceSettings(training_mode=False, keep_unused=False))
    assert [n for n, _ in older.named_parameters()] == [n for n, _ in before.named_parameters()]
    assert list(trace(net).state_dict()) == list(net.state_dict())
    assert next(iter(net.state_dict())) == "scale"
