import pytest
import torch
from torch import nn

from qat_tricks.errors import QatTricksError
from qat_tricks.graph import trace
from tests.helpers.nets import images, small_net


def test_function_and_names_stay():
    net = small_net()
    traced = trace(net)
    assert torch.equal(traced(images()), net(images()))
    assert list(traced.state_dict()) == list(net.state_dict())
    assert traced.get_submodule("stem.0") is net.stem[0]


def test_our_own_graph_is_returned_as_it_is():
    traced = trace(small_net())
    assert trace(traced) is traced


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the culprit
            return x
        return -x


def test_line_of_the_users_code_is_named():
    with pytest.raises(
        QatTricksError, match=r'test_trace.py:\d+ "if x.sum\(\) > 0:  # the culprit"'
    ):
        trace(Branching())


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.5, training=self.training)


def test_functional_dropout_follows_the_mode():
    traced = trace(nn.Sequential(FunctionalDropout()).eval())
    x = torch.ones(1000)
    assert torch.equal(traced(x), x)
    assert (traced.train()(x) == 0).sum() > 100


class OwnStochasticDepth(nn.Module):
    def forward(self, x):
        return x * 0 if self.training else x


def test_a_module_that_reads_its_mode_stays_whole():
    traced = trace(nn.Sequential(OwnStochasticDepth()))
    assert torch.equal(traced.train()(torch.ones(2)), torch.zeros(2))
    assert torch.equal(traced.eval()(torch.ones(2)), torch.ones(2))
