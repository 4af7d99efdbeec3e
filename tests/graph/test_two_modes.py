"""A network that acts on its mode is, traced, the same network in either mode."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import googlenet

import qat_tricks
from qat_tricks.errors import QatTricksError
from qat_tricks.graph import rebuild, spec_of, trace
from qat_tricks.graph.equivalence import buffers_kept, sqnr, tensors_in
from qat_tricks.graph.two_modes import EVALUATION, TRAINING, acts_on_mode, graph_in, only_in
from tests.helpers.modes import (
    MODAL,
    AuxiliaryHead,
    Base,
    SoftmaxInEvaluation,
    StochasticDepth,
)


def outputs(network, x, training):
    network.train(training)
    torch.manual_seed(1)
    with buffers_kept(network), torch.no_grad():
        return tensors_in(network(x))


@pytest.mark.parametrize("kind", MODAL)
def test_both_modes_compute_what_the_users_network_computes(kind):
    torch.manual_seed(0)
    net, x = kind(), torch.randn(4, 3, 12, 12)
    traced = trace(copy.deepcopy(net))
    for training in (False, True):
        there, here = outputs(net, x, training), outputs(traced, x, training)
        assert len(there) == len(here)
        assert sqnr(there, here) > 130


def test_auxiliary_heads_of_googlenet_train_and_are_not_deployed(tmp_path):
    torch.manual_seed(0)
    net = googlenet(weights=None, init_weights=False, num_classes=7, aux_logits=True)
    x = torch.randn(4, 3, 64, 64)
    traced = trace(copy.deepcopy(net))
    assert sqnr(outputs(net, x, True), outputs(traced, x, True)) > 130
    assert type(traced.train()(x)).__name__ == "GoogLeNetOutputs"
    in_training = {str(node.target) for node in only_in(traced.graph, TRAINING)}
    assert {"aux1.fc2", "aux2.fc2"} <= in_training
    assert "fc" not in in_training


def test_what_training_alone_computes_is_not_in_the_file(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    quantized = qat_tricks.quantize(AuxiliaryHead(), [x])
    assert not any(name.startswith("other") for name in spec_of(quantized)["layers"])
    assert qat_tricks.export_onnx(quantized, tmp_path / "net.onnx", x).sqnr_db > 60


def test_a_network_without_modes_has_one_graph():
    assert not acts_on_mode(trace(Base()).graph)
    graph = trace(SoftmaxInEvaluation()).graph
    assert any(node.target == "softmax" for node in graph_in(graph, EVALUATION).nodes)
    assert not any(node.target == "softmax" for node in graph_in(graph, TRAINING).nodes)


def test_a_quantized_network_keeps_its_modes_when_it_is_rebuilt():
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    net = StochasticDepth()
    quantized = qat_tricks.quantize(net, [x])
    again = rebuild(StochasticDepth(), spec_of(quantized))
    again.load_state_dict(quantized.state_dict())
    for training in (False, True):
        assert sqnr(outputs(quantized, x, training), outputs(again, x, training)) == 200


def test_a_part_in_another_mode_than_its_network_is_refused_by_name():
    traced = trace(StochasticDepth()).train()
    traced.blocks[0].eval()
    with pytest.raises(QatTricksError, match=r'"blocks.0" acts on its mode'):
        traced(torch.randn(2, 3, 8, 8))


def test_gradients_of_both_outputs_reach_both_heads():
    traced = trace(AuxiliaryHead()).train()
    sum(output.sum() for output in traced(torch.randn(4, 3, 8, 8))).backward()
    assert all(parameter.grad is not None for parameter in traced.parameters())


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


def test_a_batchnorm_that_the_users_own_train_freezes_stays_frozen():
    traced = trace(Frozen().train()).train()
    assert traced.training
    assert not traced.bn.training


class Written(nn.BatchNorm2d):
    """A BatchNorm written out, as timm has it."""

    def forward(self, x):
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        mean, var = self.running_mean, self.running_var
        y = nn.functional.batch_norm(
            x, mean, var, self.weight, self.bias, self.training, momentum, self.eps
        )
        return y.relu()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batchnorm_written_out_is_one_module_whatever_its_momentum(momentum):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Written(4, momentum=momentum), nn.Flatten())
    traced, x = trace(copy.deepcopy(net)), torch.randn(4, 3, 8, 8)
    assert not acts_on_mode(traced.graph)
    for network in (net, traced):
        network.train()
        for batch in (x, x + 1):
            network(batch)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(traced.state_dict()[name], value)
